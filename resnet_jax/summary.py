"""Layers, parameters and cost of a network.

python -m resnet_jax.summary --config=configs/v2_56.py
python -m resnet_jax.summary --config=configs/v2_56.py --roofline
"""

from functools import partial

import jax
from absl import flags
from ml_collections import ConfigDict

from resnet_jax import command_line, cost, data, models, parallel
from resnet_jax.config import build_network

_NOT_LOOKED_AT = (
    " is not read (give --num_classes, --image_size, --channels, --examples)"
)


def table(
    config: ConfigDict,
    net: models.ResNet,
    rows: list[cost.Layer],
    image_shape: tuple[int, int, int],
    examples: int,
) -> str:
    """The layers of a config's network and their totals, as text."""
    lines = [f"{'layer':<30} {'output':>12} {'parameters':>14} {'MACs':>17}"]
    for layer in rows:
        times = f"{layer.copies} x " if layer.copies > 1 else ""
        lines.append(
            f"{layer.name:<30} {'x'.join(map(str, layer.output_shape)):>12} "
            f"{times + format(layer.parameters, ','):>14} "
            f"{times + format(layer.macs, ',') if layer.macs else '':>17}"
        )
    memory = cost.activation_bytes(net, rows, config.batch_size)
    total = cost.totals(rows)
    totals = {
        "parameters": f"{total['params']:,}",
        "MACs per image, forward": f"{total['macs']:,}",
        f"activations of {config.batch_size} images": f"{memory / 2**20:,.1f} MiB "
        f"({config.model.dtype}{', remat' if net.remat else ''})",
    }
    for name, size in cost.device_bytes(config, net, image_shape, examples).items():
        of = f" (of {examples:,} examples)" if name == "data set" else ""
        shown = f"{size / 2**20:,.1f} MiB{of}" if size else "streamed"
        totals[f"{name}, each device"] = shown
    lines += ["", *(f"{name:<30} {value}" for name, value in totals.items())]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints the layers of the network of `--config`."""

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)
        integer = partial(flags.DEFINE_integer, lower_bound=1, flag_values=values)
        boolean = partial(flags.DEFINE_bool, flag_values=values)
        default = "(default: as in the config's data set, or in CIFAR-10)"
        integer("num_classes", None, f"Number of classes. {default}")
        integer("image_size", None, f"Pixels per side. {default}")
        integer("channels", None, f"Channels per image. {default}")
        integer("examples", None, f"Examples in all splits. {default}")
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
        f"{config.dataset.name}{'' if known else _NOT_LOOKED_AT}: "
        f"{num_classes} classes, {'x'.join(map(str, shape))} pixels, "
        f"{examples:,} examples\n"
    )
    if values.roofline:
        parallel.split_cpu(config.batch_size, image_size=size)  # before JAX is used
    parallel.add_cpu()
    parallel.require_devices()
    net = build_network(config, num_classes)
    rows = cost.layers(net, shape)
    print(table(config, net, rows, shape, examples))
    if values.roofline:
        from resnet_jax import roofline

        macs = cost.totals(rows)["macs"]
        step = roofline.compile_step_cost(config, num_classes, shape, macs)
        kind = jax.devices()[0].device_kind
        name = f"a step of {config.batch_size} images"
        print(f"{name:<30} {roofline.sentence(step, kind)}")


if __name__ == "__main__":
    command_line.run(main)
