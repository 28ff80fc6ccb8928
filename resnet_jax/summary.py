"""Layers, parameters and cost of a network.

python -m resnet_jax.summary --config=configs/v2_56.py
python -m resnet_jax.summary --config=configs/v2_56.py --roofline
"""

import dataclasses
import math
import resource
import sys
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict

from resnet_jax import command_line, data, models, optimizers
from resnet_jax.config import build_network


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, BatchNorm or Dense layer, or as many equal ones.

    Attributes:
      name: path in the tree of parameters; `block2-6` stands for five blocks.
      output_shape: of one image.
      parameters: trainable values of one of them.
      macs: multiply-accumulates of one of them for one image, in a forward pass.
      copies: the number of equal ones.
    """

    name: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    copies: int


def count_parameters(params) -> int:
    """Number of trainable values in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def layers(net: models.ResNet, image_shape: tuple[int, int, int]) -> list[Layer]:
    """The layers of a network in the order in which they run."""
    net = net.clone(scan=True, remat=False)  # traces equal blocks once
    by_name = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        if isinstance(module, nn.Conv | nn.BatchNorm | nn.Dense):
            params = module.variables["params"]
            kernel = params.get("kernel")
            macs = (
                kernel.size * math.prod(output.shape[1:-1]) if kernel is not None else 0
            )
            copies, name = 1, "/".join(module.path)
            if "_blocks" in name:
                stage = int(name.removeprefix("stage").partition("_")[0])
                copies = net.blocks_per_stage[stage - 1] - 1
                last = f"-{copies + 1}" if copies > 1 else ""
                name = name.replace("_blocks", f"_block2{last}")
            parameters = count_parameters(params)
            by_name[name] = Layer(name, output.shape[1:], parameters, macs, copies)
        return output

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(net.init, jax.random.key(0), image)
    return list(by_name.values())


def cost(net: models.ResNet, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """'params' and 'macs': trainable values, and multiply-accumulates of the
    convolutions and the classifier for one image forward.
    """
    rows = layers(net, image_shape)
    return {
        "params": sum(layer.parameters * layer.copies for layer in rows),
        "macs": sum(layer.macs * layer.copies for layer in rows),
    }


def activation_bytes(net: models.ResNet, rows: list[Layer], batch_size: int) -> int:
    """Bytes of the layers' outputs for a batch, which the backward pass reads.

    Under `net.remat` those of the blocks' ends, and of the largest block in full. The
    memory of a compiled step is of this order: XLA computes some of them again, and
    also needs temporary memory.
    """
    sizes, ends, inside = [], {}, {}
    for layer in rows:
        size = math.prod(layer.output_shape) * jnp.dtype(net.dtype).itemsize
        block, _, inner = layer.name.partition("/")
        if net.remat and inner:
            ends[block] = size * layer.copies
            inside[block] = inside.get(block, 0) + size
        else:
            sizes.append(size * layer.copies)
    total = sum(sizes) + sum(ends.values()) + max(inside.values(), default=0)
    return total * batch_size


def device_bytes(
    config: ConfigDict,
    net: models.ResNet,
    image_shape: tuple[int, int, int],
    examples: int,
) -> dict[str, int]:
    """Bytes that each device holds whole while it trains, however many there are.

    'model state' is parameters and BatchNorm's statistics (twice, with moving means of
    them) and the optimizer's state; 'data set' is `examples` images of all splits and
    their labels, 0 where they are streamed. Activations come on top, of a device's part
    of the batch.
    """
    variables = models.variable_shapes(net.clone(scan=True), image_shape)
    tx = optimizers.optimizer(config.optimizer, optax.constant_schedule(0.0))
    opt_state = jax.eval_shape(tx.init, variables["params"])
    ema = variables if config.optimizer.ema else None

    def size(tree) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    pixels, stream = examples * math.prod(image_shape), config.dataset.stream
    streams = pixels > data.RESIDENT_BYTES if stream == "auto" else stream == "always"
    labels = examples * np.dtype(np.int32).itemsize
    return {
        "model state": size((variables, ema, opt_state, np.int32(0))),  # and the step
        "gradients": size(variables["params"]),
        "data set": 0 if streams else pixels + labels,
    }


def peak_memory() -> int:
    """The most bytes that this process has held so far, on its first device.

    On a CPU, whose memory JAX does not count, in all.
    """
    counted = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return counted["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(
    config: ConfigDict,
    num_classes: int,
    image_shape: tuple[int, int, int],
    examples: int,
) -> str:
    """The layers of a config's network and their totals, as text."""
    net = build_network(config, num_classes)
    rows = layers(net, image_shape)
    lines = [f"{'layer':<30} {'output':>12} {'parameters':>14} {'MACs':>17}"]
    for layer in rows:
        times = f"{layer.copies} x " if layer.copies > 1 else ""
        lines.append(
            f"{layer.name:<30} {'x'.join(map(str, layer.output_shape)):>12} "
            f"{times + format(layer.parameters, ','):>14} "
            f"{times + format(layer.macs, ',') if layer.macs else '':>17}"
        )
    memory = activation_bytes(net, rows, config.batch_size)
    total = cost(net, image_shape)
    totals = {
        "parameters": f"{total['params']:,}",
        "MACs an image, forward": f"{total['macs']:,}",
        f"activations of {config.batch_size} images": f"{memory / 2**20:,.1f} MiB "
        f"({config.model.dtype}{', remat' if net.remat else ''})",
    }
    for name, size in device_bytes(config, net, image_shape, examples).items():
        of = f" (of {examples:,} examples)" if name == "data set" else ""
        shown = f"{size / 2**20:,.1f} MiB{of}" if size else "streamed"
        totals[f"{name}, each device"] = shown
    lines += ["", *(f"{name:<30} {value}" for name, value in totals.items())]
    return "\n".join(lines)


def describe(net: models.ResNet) -> str:
    """A network in a few words: 'bottleneck blocks, pre-activation, shortcut B'."""
    variant = ", Keras variant" if net.keras else ""
    block = _name(net.block_class) if net.block_class else net.block
    norm = f", {_name(net.norm_class)} for BatchNorm" if net.norm_class else ""
    shortcut = f"shortcut {net.shortcut}" if net.shortcut else "no shortcuts"
    stem = ", ImageNet stem" if net.stem == "imagenet" else ""
    return (
        f"{block} blocks, {net.activation}-activation, {shortcut}{variant}{stem}{norm}"
    )


def _name(build: Callable) -> str:
    """The name of a class or function, with the arguments that are given to it."""
    if not isinstance(build, partial):
        return build.__name__
    given = ", ".join(f"{name}={value!r}" for name, value in build.keywords.items())
    return f"{_name(build.func)}({given})"


def main(argv: list[str]) -> None:
    """Prints the layers of the network of `--config`."""

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)
        integer = partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
        boolean = partial(flags.DEFINE_bool, flag_values=values)
        default = "(default: the config's data set's, or CIFAR-10's)"
        integer("num_classes", None, f"Classes to tell apart. {default}")
        integer("image_size", None, f"Pixels a side. {default}")
        integer("channels", None, f"Channels of an image. {default}")
        integer("examples", None, f"Examples of all splits. {default}")
        boolean(
            "roofline",
            False,
            "Compile a training step, and print its cost on these devices.",
        )

    values = command_line.parse(argv, __doc__, define)
    config = command_line.checked_config(values)
    known = data.KNOWN.get(data.base_name(config.dataset.name))
    num_classes, (size, _, channels), examples = known or data.KNOWN["cifar10"]
    num_classes = values.num_classes or num_classes
    size = values.image_size or config.dataset.image_size or size
    shape = (size, size, values.channels or channels)
    examples = values.examples or examples
    print(
        f"{config.dataset.name}{'' if known else ', not looked at'}: "
        f"{num_classes} classes, {'x'.join(map(str, shape))} pixels, "
        f"{examples:,} examples\n"
    )
    print(table(config, num_classes, shape, examples))
    if values.roofline:
        from resnet_jax import parallel, roofline

        parallel.split_cpu(config.batch_size)
        macs = cost(build_network(config, num_classes), shape)["macs"]
        step = roofline.of_config(config, num_classes, shape, macs)
        kind = jax.devices()[0].device_kind
        name = f"a step of {config.batch_size} images"
        print(f"{name:<30} {roofline.sentence(step, kind)}")


if __name__ == "__main__":
    command_line.run(main)
