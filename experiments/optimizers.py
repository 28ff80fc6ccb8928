"""TODO."""

import itertools

import numpy as np
from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

# What is usual for each, and five learning rates around the usual one.
OPTIMIZERS = {
    "sgd": ({"nesterov": True}, (0.01, 0.03, 0.1, 0.3, 1.0)),
    "adam": ({}, (3e-4, 1e-3, 3e-3, 0.01, 0.03)),
    "adamw": ({"weight_decay": 1e-2}, (3e-4, 1e-3, 3e-3, 0.01, 0.03)),
}
SCALES = {
    "smoke": {
        "depths": {1: 20, 2: 20},
        "epochs": 10,
        "train_split": "train[:1149]",
        "validation_split": "train[1149:]",
    },
    "full": {
        "depths": {1: 56, 2: 56},
        "epochs": 0,
        "train_split": "train[:45000]",
        "validation_split": "train[45000:]",
    },
}
TUNING_SEED = 100
SEEDS = (0, 1, 2)


def measure(config: dict) -> dict:
    """The curves of one network."""
    return curves.curves(config, config["optimizer"]["name"])


def run(study: Study) -> dict[int, dict[str, dict]]:
    """By version and optimizer: 'validation' errors by rate, 'rate', and 'results'."""
    scale, cells = SCALES[study.scale], {}
    for (version, depth), (name, (fields, rates)) in itertools.product(
        scale["depths"].items(), OPTIMIZERS.items()
    ):

        def config(seed: int, rate: float, version=version, depth=depth) -> dict:
            made = curves.training(study.scale, version, depth, seed, scale["epochs"])
            made["optimizer"] |= fields | {"name": name, "learning_rate": rate}  # noqa: B023
            return made

        tuning = []
        for rate in rates:
            made = config(TUNING_SEED, rate)
            made["dataset"] |= {
                split: scale[split] for split in ("train_split", "validation_split")
            }
            tuning.append(study.cell(measure, config=made))
        rate = rates[best(tuning)]
        results = [study.cell(measure, config=config(seed, rate)) for seed in SEEDS]
        cells.setdefault(version, {})[name] = {
            "rates": rates,
            "validation": curves.last(tuning, "validation_error"),
            "rate": rate,
            "results": results,
        }
    return cells


def best(tuning: list[dict]) -> int:
    """The number of the run with the lowest validation error, then loss, at its end."""
    errors = curves.last(tuning, "validation_error")
    losses = [run["validation_loss"][-1:] if "params" in run else [] for run in tuning]
    ends = [loss[0] if loss and loss[0] is not None else np.inf for loss in losses]
    return min(range(len(tuning)), key=lambda run: (errors[run], ends[run]))


def draw(cells: dict[int, dict[str, dict]], depths: dict[int, int]) -> Figure:
    """A row for each version: the tuning, and the curves at the chosen rate."""
    figure, axes = study.figure(6.6, 4.0, nrows=len(cells), ncols=3)
    for row, (version, optimizers) in zip(axes, cells.items(), strict=True):
        for (name, cell), style in zip(optimizers.items(), STYLES, strict=False):
            style = style | {"label": name}
            row[0].plot(cell["rates"], 100 * cell["validation"], **style)
            chosen = cell["rates"].index(cell["rate"])
            row[0].plot(
                *(cell["rate"], 100 * cell["validation"][chosen]),
                **style | {"markersize": 8, "markerfacecolor": "none", "label": None},
            )
            curves.plot(row[1], cell["results"], "train_error", **style)
            curves.plot(row[2], cell["results"], "test_error", **style)
        row[0].set(xscale="log", xlabel="learning rate", ylabel="validation error (%)")
        row[1].set(xlabel="epoch", ylabel="training error (%)", yscale="log")
        row[2].set(xlabel="epoch", ylabel="test error (%)", yscale="log")
        row[0].set_title(f"v{version}-{depths[version]}", loc="left")
    axes[0, 0].legend()
    return figure


def table(cells: dict[int, dict[str, dict]]) -> str:
    """The chosen rates and the last errors, as text."""
    lines = []
    for version, optimizers in cells.items():
        results = {}
        for name, cell in optimizers.items():
            edge = cell["rate"] in (cell["rates"][0], cell["rates"][-1])
            label = f"v{version} {name} {cell['rate']:g}{' (edge)' if edge else ''}"
            results[label] = cell["results"]
        lines.append(curves.table(results, ("train_error", "test_error")))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    print(table(cells))
    own.save(draw(cells, SCALES[own.scale]["depths"]))


if __name__ == "__main__":
    command_line.run(main)
