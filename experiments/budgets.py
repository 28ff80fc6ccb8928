"""Recipes on short budgets, on the same images.

    python -m experiments.budgets [--scale=full]

Claim. A recipe is made for a budget. What improves 200 epochs, such as mixed images and
averaged weights, can hurt five, and vice versa.

Method. Version 1, 20 layers, CIFAR-10. Each of RECIPES trains on the same part of the
training set for the same number of epochs, with three seeds; everything that a recipe
counts in epochs is scaled in proportion. The last epochs are compared, on a validation
split that no recipe trains on; the test split plays no part. 'keras' has its own
network and batches of 32, and so makes four times as many updates; 'akamaster' is
'paper' as in akamaster/pytorch_resnet_cifar10, which normalises by each channel's mean
and standard deviation.

Found (smoke: 79 and 235 updates, 313 and 938 for 'keras'; means of three seeds; a
JPEG-compressed copy of CIFAR-10):
- `strong` is ahead of 'paper' by 5 and 6 points, in every seed, and level with 'keras',
  which makes four times as many updates. Half of that lead is due to its normalisation:
  it is 2 points ahead of 'akamaster', which is no more than seeds differ.
- So for `strong`, which mixes images and averages weights, five epochs do not bear out
  the claim. They do so only for `fast`, which has too few updates.
- `fast` has hardly learnt anything after 79 updates: its rate rises to 0.4 within the
  first two epochs, from which it recovers slowly. After 235 it is 5 points ahead of
  'paper', in four fifths of the time, on a shared machine.

Cost. Smoke: 2,000 images, 5 and 15 epochs, 30 runs; 40 minutes on two cores of a shared
x86 machine. Full: 45,000 images.
"""

import numpy as np
from matplotlib.figure import Figure

from configs import common
from experiments import curves, study
from experiments.published import TABLES
from experiments.study import STYLES, Study
from resnet_jax import command_line, workdir
from resnet_jax.seeds import mean_and_interval

SCALES = {
    "smoke": {
        "train_split": "train[:2000]",
        "validation_split": "train[45000:]",
        "eval_split": "test[:1000]",  # plays no part in the comparison
    },
    "full": {"train_split": "train[:45000]", "validation_split": "train[45000:]"},
}
EPOCHS = (5, 15)
DEPTH = 20
# The recipe of configs/common.py, and changes to it.
RECIPES = {
    "paper": ("paper", {}),
    "akamaster": ("paper", TABLES["akamaster"].changes),
    "keras": ("keras", {}),
    "strong": ("strong", {}),
    "fast": ("fast", {}),
}


def run_config(scale: str, recipe: str, epochs: int) -> dict:
    """The config of a run, as JSON holds it."""
    name, changes = RECIPES[recipe]
    config = common.get_config(name, 1, DEPTH)
    config.update_from_flattened_dict(changes)
    curves.shorten(config, epochs)
    config.eval_every = epochs
    config.checkpoint.keep = 1
    config.dataset.update(SCALES[scale])
    return workdir.as_json(config)


def run(experiment: Study) -> dict[tuple[int, str], list[dict]]:
    """The results by epochs and recipe, for each seed."""
    return {
        (epochs, recipe): experiment.seeds(
            curves.last_accuracy, run_config(experiment.scale, recipe, epochs)
        )
        for epochs in EPOCHS
        for recipe in RECIPES
    }


def table(cells: dict[tuple[int, str], list[dict]], scale: str, made_by: str) -> str:
    """Markdown: accuracies by recipe, a column for each budget."""
    budgets = sorted({epochs for epochs, _ in cells})
    header = [f"{epochs} epochs | seconds" for epochs in budgets]
    lines = [
        f"| recipe | {' | '.join(header)} |",
        f"|---|{'--:|' * 2 * len(budgets)}",
    ]
    for recipe in RECIPES:
        row = [f"`{recipe}`"]
        for epochs in budgets:
            results = cells[epochs, recipe]
            summary = mean_and_interval(
                [100 * result["accuracy"] for result in results]
            )
            seconds = [result["seconds"] for result in results if result["seconds"]]
            deviation = summary["standard_deviation"]
            spread = "" if deviation is None else f" ± {deviation:.2f}"
            row.append(f"{summary['mean']:.2f}{spread}")
            row.append(f"{np.median(seconds):.0f}" if seconds else "-")
        lines.append(f"| {' | '.join(row)} |")
    data = SCALES[scale]
    return "\n".join(
        [
            *lines,
            "",
            f"v1-{DEPTH}, CIFAR-10 `{data['train_split']}`, accuracy on "
            f"`{data['validation_split']}` (%) after the last epoch: mean and standard "
            f"deviation of {len(study.SEEDS)} seeds; seconds spent on updates; "
            f"{made_by}. `akamaster` is not a recipe in configs/: it is `paper`, "
            "normalised as in akamaster/pytorch_resnet_cifar10.",
        ]
    )


def draw(cells: dict[tuple[int, str], list[dict]]) -> Figure:
    """A panel for each budget, a row for each recipe, a point for each seed."""
    budgets = sorted({epochs for epochs, _ in cells})
    figure, (axes,) = study.figure(6.0, 2.2, ncols=len(budgets), sharey=True)
    for epochs, panel in zip(budgets, axes, strict=True):
        for place, recipe in enumerate(RECIPES):
            values = [100 * result["accuracy"] for result in cells[epochs, recipe]]
            study.plot_points(panel, place, values, **STYLES[place])
        panel.set_xlabel("validation accuracy (%)")
        panel.set_title(f"{epochs} epochs", loc="left")
    study.name_rows(axes[0], RECIPES)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, draws the figure and writes the table."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    text = table(cells, experiment.scale, experiment.made_by())
    experiment.write_section("budgets", "Recipes on short budgets", text)
    experiment.save(draw(cells))
    print(text)


if __name__ == "__main__":
    command_line.run(main)
