"""Which version, and how deep: error, parameters, memory and time.

    python -m experiments.depth_and_version [--scale=full]

Claim. Deeper residual networks are better, but cost more: 8.75, 6.97 and 6.61 percent
test error on CIFAR-10 with 20, 56 and 110 layers of version 1 (He et al. 2015, arXiv
1512.03385, table 6; 110 layers: the mean of five runs). Version 2, whose blocks are
bottlenecks that begin with BatchNorm and ReLU, gains more from depth (He et al. 2016,
arXiv 1603.05027, table 3).

Method. Both versions at the same depths, trained alike. At either scale, costs are
those of the paper's networks: width 16, updates of 128 images of 32x32 pixels. Memory
is XLA's count for the program of one update on one device (state, batch and
temporaries), time the median of three updates; remat keeps only the blocks' inputs for
the backward pass.

Cost. Smoke: digits, width 8, five epochs at rate 0.1; four minutes from scratch on two
cores of a shared x86 machine. Full: CIFAR-10, the paper's recipe, 24 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; percent):
- v1, 20, 56, 110 layers: training error 6.3 (6.1-6.3), 12.6 (10.5-33.7), 77.8
  (73.5-79.9); test error 4.7 (3.9-5.0), 6.7 (6.4-24.7), 75.8 (64.4-76.4).
- v2: training error 9.2 (8.1-9.3), 15.4 (13.0-15.7), 15.0 (13.8-15.1); test error 4.4
  (4.4-6.4), 8.1 (6.7-10.8), 8.3 (6.1-10.8).
- So the benefit of depth does not show: 20 layers are enough for the digits. What shows
  is which version tolerates depth: after five epochs with 110 layers, v1 has learnt
  little, in any seed, and v2 most of the digits.
- Memory, MiB, at 20, 56, 110 layers: v1 270, 701, 1346, v2 399, 1430, 2866: it grows
  with depth, and v2 takes 1.5 to 2.1 times as much, with 0.8 to 0.65 of the parameters
  and MACs, since its blocks' outputs have four times the channels. With remat, less
  than a third remains at 110 layers: v1 339, v2 789.
- Time of an update on two cores, s: v1 0.36, 1.07, 2.13, v2 0.39, 1.59, 2.81: v2 is
  slower, despite having two thirds to three quarters of the MACs. Remat, which computes
  more, takes about as long (v1-110 2.13, v2-110 2.45), which suggests that memory
  bandwidth is this CPU's bottleneck.
"""

import itertools
import statistics
import time

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import common
from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line, optimizers, parallel
from resnet_jax.config import build_network
from resnet_jax.cost import layers, totals
from resnet_jax.step import Batch, create_state, make_train_step

SCALES = {
    "smoke": {"depths": (20, 56, 110), "epochs": 5, "batch_size": 128},
    "full": {"depths": (20, 56, 110, 164), "epochs": 0, "batch_size": 128},
}
VERSIONS = (1, 2)
IMAGE_SHAPE = (32, 32, 3)
TIMED_UPDATES = 3


def cost(version: int, depth: int, remat: bool, batch_size: int) -> dict:
    """'params', 'macs' per image, 'memory' in bytes and 'seconds' of an update."""
    config = common.get_config("paper", version, depth, scan=True, remat=remat)
    one = jax.devices()[:1]  # however many the trainings had JAX create
    device = parallel.Parallel.over(one, "jit", batch_size, IMAGE_SHAPE)
    net = build_network(config, num_classes=10)
    tx = optimizers.optimizer(config.optimizer, lambda _: 0.01)
    train_step = make_train_step(
        net, tx, config, (np.zeros(3, np.float32), np.ones(3, np.float32))
    )

    def update(state, images, labels, positions):
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return train_step(state, Batch(images, labels, positions), key)[0]

    rng = np.random.default_rng(0)
    state = device.replicate(create_state(net, tx, 0, IMAGE_SHAPE))
    batch = [
        device.shard(rng.integers(0, 256, (batch_size, *IMAGE_SHAPE), np.uint8)),
        device.shard(rng.integers(0, 10, batch_size, np.int32)),
        device.shard(np.arange(batch_size, dtype=np.int32)),
    ]
    update = device.compile(update, state, *batch, donated=(0,))
    state = jax.block_until_ready(update(state, *batch))
    seconds = []
    for _ in range(TIMED_UPDATES):
        start = time.perf_counter()
        state = jax.block_until_ready(update(state, *batch))
        seconds.append(time.perf_counter() - start)
    counted = update.result().memory_analysis()
    # The state that an update returns replaces the one that it reads.
    held = counted.temp_size_in_bytes + counted.argument_size_in_bytes
    return {
        **totals(layers(net, IMAGE_SHAPE)),
        "memory": held,
        "seconds": study.numbers(statistics.median(seconds)),
    }


def run(experiment: Study) -> dict[str, dict[tuple, list[dict]]]:
    """'trained' by version and depth, for each seed; 'costs' by these and remat."""
    scale, trained, costs = SCALES[experiment.scale], {}, {}
    for version, depth in itertools.product(VERSIONS, scale["depths"]):
        config = curves.run_config(experiment.scale, version, depth, scale["epochs"])
        trained[version, depth] = experiment.seeds(curves.curves, config)
    for version, depth, remat in itertools.product(
        VERSIONS, scale["depths"], (False, True)
    ):
        costs[version, depth, remat] = experiment.cell(
            cost,
            version=version,
            depth=depth,
            remat=remat,
            batch_size=scale["batch_size"],
        )
    return {"trained": trained, "costs": costs}


def draw(cells: dict[str, dict[tuple, list[dict]]], depths: tuple[int, ...]) -> Figure:
    """Errors and parameters above, costs of an update below."""
    figure, axes = study.figure(7.2, 4.2, nrows=2, ncols=3)
    trained, costs = cells["trained"], cells["costs"]

    def plot_cost(panel: Axes, name: str, scale: float, version: int, remat: bool):
        values = [scale * costs[version, depth, remat][name] for depth in depths]
        style = STYLES[version - 1 + 2 * remat]
        label = f"v{version}, remat" if remat else f"v{version}"
        panel.plot(depths, values, **style | {"label": label})

    for version, style in zip(VERSIONS, STYLES, strict=False):
        for panel, name in zip(axes[0], ("train_error", "test_error"), strict=False):
            errors = [100 * curves.last(trained[version, d], name) for d in depths]
            study.plot_seeds(panel, depths, np.transpose(errors), **style)
        plot_cost(axes[0, 2], "params", 1e-6, version, False)
        plot_cost(axes[1, 0], "macs", 1e-6, version, False)
        for remat in (False, True):
            plot_cost(axes[1, 1], "memory", 2**-30, version, remat)
            plot_cost(axes[1, 2], "seconds", 1, version, remat)
    for panel, letter, title in zip(
        axes.flat,
        "abcdef",
        (
            "final training error (%)",
            "final test error (%)",
            "parameters (millions)",
            "MACs per image (millions)",
            "memory per update (GiB)",
            "time per update (s)",
        ),
        strict=True,
    ):
        panel.set(xlabel="depth", xlim=(0, None), ylim=(0, None))
        panel.set_xticks(depths)
        panel.set_title(f"({letter}) {title}", loc="left")
    figure.legend(
        handles=sorted(axes[1, 1].lines, key=lambda line: "remat" in line.get_label()),
        loc="outside upper center",
        ncols=4,
    )
    return figure


def table(cells: dict[str, dict[tuple, list[dict]]]) -> str:
    """Errors as in `curves.table`, and the costs."""
    trained = {f"v{v}-{d}": results for (v, d), results in cells["trained"].items()}
    lines = [curves.table(trained, ("train_error", "test_error"))]
    lines.append(f"{'':<14} {'params':>12} {'MACs':>12} {'MiB':>8} {'seconds':>8}")
    for (version, depth, remat), measured in cells["costs"].items():
        name = f"v{version}-{depth}{', remat' if remat else ''}"
        lines.append(
            f"{name:<14} {measured['params']:>12,} {measured['macs']:>12,} "
            f"{measured['memory'] / 2**20:>8,.0f} {measured['seconds']:>8.3f}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    print(table(cells))
    experiment.save(draw(cells, SCALES[experiment.scale]["depths"]))


if __name__ == "__main__":
    command_line.run(main)
