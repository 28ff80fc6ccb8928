"""TODO."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import common
from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line, data, optimizers, parallel, summary
from resnet_jax.augment import statistics
from resnet_jax.step import Batch, create_state, make_train_step
from resnet_jax.trainer import Trainer

# Depths by version, and the batch of which an update is timed.
SCALES = {
    "smoke": {"depths": {1: (8, 20, 56), 2: (11, 20, 56)}, "epochs": 10, "batch": 32},
    "full": {
        "depths": {1: (20, 32, 44, 56, 110), 2: (20, 29, 56, 110, 164)},
        "epochs": 0,
        "batch": 128,
    },
}
SEEDS = (0, 1, 2)


def cost(version: int, depth: int, batch_size: int, image_size: int) -> dict:
    """What one update of a network of the papers' width costs on this machine.

    Returns:
      'milliseconds' of an update, the least of several, since what else runs on the
      machine can only make it longer; 'bytes' that the update takes: its arguments,
      results and temporaries; 'parameters' and 'macs' (multiply-accumulates of an
      image, forward).
    """
    config = common.get_config("paper", version, depth, scan=True)
    config.update(batch_size=batch_size, steps=10**6, steps_per_call=1)
    config.dataset.update(name="fake", train_split=f"train[:{8 * batch_size}]")
    config.dataset.update(eval_split="test[:1]", image_size=image_size)
    parallel.split_cpu(batch_size)
    parallel.use_compilation_cache()
    dataset = data.load(config.dataset)
    trainer = Trainer(config, dataset)
    state, seconds = trainer.place(trainer.new_state()), []
    trainer.compile(state)
    for step in range(8):
        start = time.perf_counter()
        state, _ = trainer.train(state, step, step + 1)
        seconds.append(time.perf_counter() - start)
    size = summary.cost(trainer.net, dataset.image_shape)
    return {
        "parameters": size["params"],
        "macs": size["macs"],
        "milliseconds": study.numbers(1e3 * min(seconds)),
        "bytes": update_bytes(config, dataset, trainer.net),
    }


def update_bytes(config: ConfigDict, dataset: data.Dataset, net) -> int:
    """Memory of one compiled update on one device, as XLA plans it."""
    tx = optimizers.optimizer(config.optimizer, lambda step: 0.1)
    state = create_state(net, tx, config.seed, dataset.image_shape)
    normalization = statistics("pixel_mean", dataset.train.images)
    size = config.batch_size
    batch = Batch(
        jnp.zeros((size, *dataset.image_shape), jnp.uint8),
        jnp.zeros(size, jnp.int32),
        jnp.arange(size),
    )
    train_step = jax.jit(
        make_train_step(net, tx, config, normalization), donate_argnums=0
    )
    compiled = train_step.lower(state, batch, jax.random.key(0)).compile()
    plan = compiled.memory_analysis()
    return (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )


def accuracy(config: dict) -> dict:
    """The curves of one network."""
    return curves.curves(config)


def run(study: Study) -> dict[int, list[dict]]:
    """By version, a dict for each depth: 'depth', 'cost', and 'results' by seed."""
    scale, cells = SCALES[study.scale], {}
    for version, depths in scale["depths"].items():
        for depth in depths:
            costs = study.cell(
                cost,
                version=version,
                depth=depth,
                batch_size=scale["batch"],
                image_size=32,
            )
            configs = [
                curves.training(study.scale, version, depth, seed, scale["epochs"])
                for seed in SEEDS
            ]
            results = [study.cell(accuracy, config=config) for config in configs]
            cells.setdefault(version, []).append(
                {"depth": depth, "cost": costs, "results": results}
            )
    return cells


def draw(cells: dict[int, list[dict]], batch: int) -> Figure:
    """What depth costs and brings, for both versions."""
    figure, axes = study.figure(6.8, 4.2, nrows=2, ncols=3)
    for (version, rows), style in zip(cells.items(), STYLES, strict=False):
        style = style | {"label": f"v{version}"}
        depths = [row["depth"] for row in rows]
        errors = 100 * np.array(
            [curves.last(row["results"], "test_error") for row in rows]
        )
        measured = {
            "milliseconds": [row["cost"]["milliseconds"] for row in rows],
            "bytes": [row["cost"]["bytes"] / 2**20 for row in rows],
            "parameters": [row["cost"]["parameters"] / 1e6 for row in rows],
        }
        study.plot_seeds(axes[0, 0], depths, errors.T, **style)
        axes[0, 1].plot(depths, measured["milliseconds"], **style)
        axes[0, 2].plot(depths, measured["bytes"], **style)
        axes[1, 0].plot(depths, measured["parameters"], **style)
        study.plot_seeds(axes[1, 1], measured["milliseconds"], errors.T, **style)
        study.plot_seeds(axes[1, 2], measured["bytes"], errors.T, **style)
    error, update = "test error (%)", f"ms an update of {batch} images"
    for panel, letter, (x, y) in zip(
        axes.flat,
        "abcdef",
        (
            ("depth", error),
            ("depth", update),
            ("depth", "MiB of an update"),
            ("depth", "million parameters"),
            (update, error),
            ("MiB of an update", error),
        ),
        strict=True,
    ):
        panel.set(xlabel=x, ylabel=y, ylim=(0, None))
        panel.set_title(f"({letter})", loc="left")
    axes[0, 0].legend()
    return figure


def table(cells: dict[int, list[dict]]) -> str:
    """The numbers of the figure, as text."""
    lines = ["network   parameters      MACs   ms/update  MiB  test error (%)"]
    for version, rows in cells.items():
        for row in rows:
            costs, name = row["cost"], f"v{version}-{row['depth']}"
            errors = 100 * curves.last(row["results"], "test_error")
            lines.append(
                f"{name:<8} {costs['parameters']:>11,} {costs['macs'] / 1e6:>8.2f}M "
                f"{costs['milliseconds']:>10,.0f} {costs['bytes'] / 2**20:>5,.0f} "
                f"{np.median(errors):7.2f} ({errors.min():.1f}-{errors.max():.1f})"
            )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measures what is not measured yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    print(table(cells))
    own.save(draw(cells, SCALES[own.scale]["batch"]))


if __name__ == "__main__":
    command_line.run(main)
