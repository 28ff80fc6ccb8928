"""What the ingredients of training recipes are worth, in accuracy and in seconds.

    python -m experiments.ablation [--scale=full]

Claim. Tricks are mostly published with the network, data and budget that suit them;
here each is tested on the same network: alone, added to the `paper` recipe, and, if it
is one of the 7 (of 15) that `strong` uses, also among the others, removed from
`strong`. Where the two differ, ingredients stand in for one another.

Method. Version 1 on CIFAR-10. An ingredient's worth is the last epoch's validation
accuracy with it minus that without it, in points, paired by seed, since equal seeds
share initial weights and image order. Means over seeds have 95% confidence intervals
(Student's t). Three seeds are too few to estimate each ingredient's variance, so all
runs of a recipe share one: that of the residuals once the means of each ingredient and
of each seed are subtracted (randomised blocks).
Times are those of the updates alone, as ratios of medians over seeds. At budgets other
than 200 epochs, everything counted in epochs is scaled in proportion.

Found (smoke: 235 updates; three seeds; a JPEG-compressed copy of CIFAR-10):
- Two ingredients help here, both alone and among the others: Nesterov momentum, 3.3 and
  2.7 points, and the cosine schedule with its warm-up, 2.0 and 1.3. `strong` as a whole
  is 3.8 points ahead of `paper`.
- Two of the regularisers cost accuracy with so few updates: cutmix 4.4 points,
  stochastic depth 3.5. Zero init costs 9.5: blocks that begin as the identity have
  little time to become anything else.
- Growing images cut the time to two thirds, with no visible loss of accuracy.
- The intervals are not widened for the number of comparisons, 22: about one in 22 would
  exclude 0 by chance, and that of the cosine schedule among the others (0.05 to 2.4)
  comes close to 0. They are not independent: all those of a recipe are differences from
  the same three runs. In `budgets`, at 20 layers, the same normalisation was worth more
  (2.5 and 3.6 points) than its interval here allows.
- The intervals of all others, 1.2 to 1.6 points on either side, include 0: six epochs
  do not show what they are worth, nor what they would be worth after 200.
- A shared variance assumes that all runs of a recipe vary alike. EMA of weights and
  test-time flip change only the evaluation, so their runs are paired with those without
  them, and their intervals are too wide. Seed by seed, the EMA is worth -0.16, 0.24 and
  0.24 points in `paper` and -0.14, 0.22 and 0.16 in `strong`, a quarter of a point at
  most, and the flip -0.06, 0.24 and 1.02.
- Times are from a shared machine, and those of equal runs differ by up to two thirds;
  those of 'BN-bias learning rate' were measured on another day and mean nothing.

Cost. Smoke: 8 layers, 5,000 images, six epochs, 72 runs, fifty minutes on two cores.
Full: 20 layers, 45,000 images, 200 epochs, over 70 runs.
"""

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from configs import common
from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line, workdir
from resnet_jax.config import get
from resnet_jax.seeds import mean_and_interval

SCALES = {
    "smoke": {
        "depth": 8,
        "epochs": 6,
        "dataset": {
            "train_split": "train[:5000]",
            "validation_split": "train[45000:]",
            "eval_split": "test[:1000]",  # plays no part in the comparison
        },
    },
    "full": {
        "depth": 20,
        "epochs": 200,
        "dataset": {
            "train_split": "train[:45000]",
            "validation_split": "train[45000:]",
        },
    },
}
_EPOCHS = 200  # of the recipe; the numbers of epochs below assume it
# Changes to a config; where `strong` has the ingredient, its values are used instead.
INGREDIENTS = {
    "per-channel normalisation": {"augment.normalization": "mean_std"},
    "Nesterov": {"optimizer.nesterov": True},
    "weight decay": {"optimizer.weight_decay": 5e-4},
    "cosine, warm-up": {"schedule.name": "cosine", "schedule.warmup_epochs": 5.0},
    "alternating flip": {"augment.alternating_flip": True},
    "cutout": {"augment.cutout": 0.5},
    "mixup": {"augment.mixup": 0.2, "augment.plain_epochs": 15.0},
    "cutmix": {"augment.cutmix": 1.0, "augment.plain_epochs": 15.0},
    "label smoothing": {"label_smoothing": 0.1},
    "stochastic depth": {"model.stochastic_depth": 0.2},
    "EMA of weights": {"optimizer.ema": 0.999},
    "BN-bias learning rate": {"optimizer.bn_bias_factor": 16.0},
    "zero init": {"model.zero_init": True},
    "test-time flip": {"test_time_flip": True},
    "growing images": {"augment.sizes": (16, 24), "augment.size_ends": (0.35, 0.7)},
}


def recipes(depth: int) -> dict[tuple[str, str], dict]:
    """Changes to 'paper' and 'strong', by recipe and the ingredient that differs."""
    paper, strong = (
        common.get_config(recipe, 1, depth) for recipe in ("paper", "strong")
    )
    changes = {("paper", ""): {}, ("strong", ""): {}}
    for name, fields in INGREDIENTS.items():
        in_strong = {field: get(strong, field) for field in fields}
        in_paper = {field: get(paper, field) for field in fields}
        # Fields that two ingredients share do not make one of them part of `strong`.
        first = next(iter(fields))
        used = in_strong[first] != in_paper[first]
        changes["paper", name] = in_strong if used else fields
        if used:
            changes["strong", name] = in_paper
    return changes


def run_config(scale: str, recipe: str, changes: dict) -> dict:
    """The config of a run, as JSON holds it."""
    settings = SCALES[scale]
    config = common.get_config(recipe, 1, settings["depth"])
    config.update_from_flattened_dict(changes)
    config.epochs = _EPOCHS
    curves.shorten(config, settings["epochs"])
    config.eval_every = settings["epochs"]
    config.checkpoint.keep = 1
    config.dataset.update(settings["dataset"])
    return workdir.as_json(config)


def run(experiment: Study) -> dict[tuple[str, str], list[dict]]:
    """The results by recipe and ingredient, for each seed; '' is the recipe itself."""
    cells = {}
    for (recipe, name), changes in recipes(SCALES[experiment.scale]["depth"]).items():
        config = run_config(experiment.scale, recipe, changes)
        cells[recipe, name] = experiment.seeds(curves.last_accuracy, config)
    return cells


def worths(cells: dict[tuple[str, str], list[dict]]) -> dict[tuple[str, str], dict]:
    """The gain from each ingredient in a recipe with all or none of the others.

    Returns:
      By recipe and ingredient the gain in points of accuracy, 'mean' and 'interval'
      (None with one seed), and 'seconds', the time with it over the time without.
    """
    gains = {}
    for recipe in ("paper", "strong"):
        points = {
            name: [100 * result["accuracy"] for result in results]
            for (of, name), results in cells.items()
            if of == recipe
        }
        half = half_interval(list(points.values()))
        for name in filter(None, points):
            pair = ("", name)
            without, added = pair if recipe == "paper" else reversed(pair)
            mean = float(np.mean(points[added]) - np.mean(points[without]))
            gains[recipe, name] = {
                "mean": mean,
                "interval": None if half is None else [mean - half, mean + half],
                "seconds": _seconds(cells[recipe, added])
                / _seconds(cells[recipe, without]),
            }
    return gains


def half_interval(samples: list[list[float]]) -> float | None:
    """Half the width of the 95% interval of a difference between two samples' means.

    Student's t for randomised blocks (Fisher 1935, The Design of Experiments, chapter
    4): the n-th values of all samples share an effect, which cancels in differences,
    and all samples share the variance that remains. None if there are too few values.
    """
    values = np.array(samples)
    freedom = (values.shape[0] - 1) * (values.shape[1] - 1)
    if not freedom:
        return None
    effects = values.mean(1, keepdims=True) + values.mean(0) - values.mean()
    variance = np.square(values - effects).sum() / freedom
    error = np.sqrt(2 * variance / values.shape[1])
    return float(error * stats.t.ppf(0.975, freedom))


def _seconds(results: list[dict]) -> float:
    values = [result["seconds"] for result in results if result["seconds"]]
    return float(np.median(values)) if values else float("nan")


def table(cells: dict[tuple[str, str], list[dict]], scale: str, made_by: str) -> str:
    """Markdown: the two recipes, and the worth of each ingredient in them."""
    gains = worths(cells)
    lines = [
        "| ingredient | added to `paper`, points | time | "
        "lost when removed from `strong`, points | time |",
        "|---|--:|--:|--:|--:|",
    ]
    for name in INGREDIENTS:
        row = [name]
        for recipe in ("paper", "strong"):
            worth = gains.get((recipe, name))
            row += [_points(worth), f"x{worth['seconds']:.2f}"] if worth else ["", ""]
        lines.append(f"| {' | '.join(row)} |")
    ends = {
        recipe: mean_and_interval(
            [100 * result["accuracy"] for result in cells[recipe, ""]]
        )
        for recipe in ("paper", "strong")
    }
    settings = SCALES[scale]
    accuracies = ", ".join(
        f"`{recipe}` {_points(end, '')}" for recipe, end in ends.items()
    )
    data = settings["dataset"]
    return "\n".join(
        [
            *lines,
            "",
            f"v1-{settings['depth']}, CIFAR-10 `{data['train_split']}`, "
            f"{settings['epochs']} epochs, accuracy on `{data['validation_split']}` "
            f"(%): {accuracies}. Means of {len(study.SEEDS)} seeds with 95% intervals, "
            "which are not widened for the number of comparisons. Times are ratios, "
            "with to without, measured on a shared machine, so accurate only to about "
            "a half; "
            f"{made_by}.",
        ]
    )


def _points(estimate: dict, sign: str = "+") -> str:
    text = format(estimate["mean"], f"{sign}.2f")
    if estimate["interval"]:
        text += " ({} to {})".format(
            *(format(end, f"{sign}.2f") for end in estimate["interval"])
        )
    return text


def draw(cells: dict[tuple[str, str], list[dict]]) -> Figure:
    """Gains with 95% intervals, added to `paper` and removed from `strong`."""
    gains = worths(cells)
    names = list(INGREDIENTS)
    figure, (axes,) = study.figure(6.4, 3.6, ncols=2, sharex=True, sharey=True)
    for (recipe, title), panel in zip(
        (("paper", "(a) added to paper"), ("strong", "(b) as part of strong")),
        axes,
        strict=True,
    ):
        panel.axvline(0, color="0.6", linewidth=0.8)
        shown = [name for name in names if (recipe, name) in gains]
        of_recipe = [gains[recipe, name] for name in shown]
        means = [gain["mean"] for gain in of_recipe]
        low = [(gain["interval"] or [gain["mean"]])[0] for gain in of_recipe]
        panel.errorbar(
            means,
            [names.index(name) for name in shown],
            xerr=np.subtract(means, low),
            capsize=2,
            **STYLES[2] | {"linestyle": "none"},
        )
        panel.set_title(title, loc="left")
        panel.set_xlabel("gain in accuracy (points)")
    study.name_rows(axes[0], names)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, draws the figure and writes the table."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    text = table(cells, experiment.scale, experiment.made_by())
    experiment.write_section("ablation", "What each ingredient is worth", text)
    experiment.save(draw(cells))
    print(text)


if __name__ == "__main__":
    command_line.run(main)
