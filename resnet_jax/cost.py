"""What a network costs: parameters, multiply-accumulates and memory."""

import dataclasses
import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax import data, models, optimizers


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, BatchNorm or Dense layer, or another module with parameters of its
    own; or several identical ones.

    Attributes:
      name: path in the tree of parameters; `block2-6` stands for five blocks.
      output_shape: for one image.
      parameters: trainable values of one of them.
      macs: multiply-accumulates of one of them for one image, in a forward pass.
      copies: the number of identical ones.
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
    net = net.clone(scan=True, remat=False)  # traces identical blocks once
    by_name = {}

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        module = context.module
        params = {
            name: value
            for name, value in module.variables.get("params", {}).items()
            if not isinstance(value, Mapping)  # of a submodule
        }
        if params and context.method_name == "__call__":
            macs = 0
            if isinstance(module, nn.Conv | nn.Dense):
                macs = params["kernel"].size * math.prod(output.shape[1:-1])
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


def totals(rows: list[Layer]) -> dict[str, int]:
    """'params' and 'macs' of all layers: trainable values, and multiply-accumulates of
    the convolutions and the classifier for one image forward.
    """
    return {
        "params": sum(layer.parameters * layer.copies for layer in rows),
        "macs": sum(layer.macs * layer.copies for layer in rows),
    }


def activation_bytes(net: models.ResNet, rows: list[Layer], batch_size: int) -> int:
    """Bytes of the layers' outputs for a batch, which the backward pass reads.

    Under `net.remat` those at the ends of blocks, and all those of the largest block.
    The memory of a compiled step is of this order: XLA recomputes some of them, and
    also needs temporary memory.
    """
    sizes, ends, inside = [], {}, {}
    for layer in rows:
        dtype = jnp.dtype(net.dtype)
        if layer.name == "classifier":
            dtype = jnp.promote_types(jnp.float32, dtype)
        size = math.prod(layer.output_shape) * dtype.itemsize
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
    """Bytes that each device holds in full while it trains, however many there are.

    'model state' is parameters and BatchNorm's statistics (twice, if their moving
    averages are kept) and the optimizer's state; 'data set' is `examples` images of all
    splits and their labels, 0 where they are streamed. Activations for a device's part
    of the batch come on top.
    """
    variables = models.zeros(net, image_shape)
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
