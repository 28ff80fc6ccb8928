"""Networks that experiments train and compare: ordinary runs, and their curves."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from ml_collections import ConfigDict

from configs import common
from experiments import study
from resnet_jax import train, workdir
from resnet_jax.config import Build, build_network
from resnet_jax.divergence import DivergedError
from resnet_jax.metrics import read_rows

# The error that a diverged network is given: that of guessing among ten classes.
CHANCE = 0.9


def run_config(scale: str, version: int, depth: int, epochs: int, **model) -> dict:
    """A config, as JSON holds it: 'full' is He's recipe on CIFAR-10, 'smoke' digits.

    Both start at a learning rate of 0.1. `epochs` 0 leaves the recipe's; `model` sets
    more of `config.model`.
    """
    recipe = "smoke" if scale == "smoke" else "paper"
    config = common.get_config(recipe, version, depth, scan=True)
    config.epochs = epochs or config.epochs
    config.checkpoint.keep = 1
    if recipe == "smoke":
        config.checkpoint.every = config.epochs
        config.model.width = 8  # 16 in the papers
        config.schedule.warmup_epochs = config.epochs / 10
    config.model.update(model)
    return workdir.as_json(config)


class Run(NamedTuple):
    """The record of a run: its metrics.jsonl, summary, and where it diverged."""

    rows: list[dict]
    summary: dict
    diverged: str


def run(
    config: dict,
    network: str = "",
    build: Build = build_network,
) -> Run:
    """Trains as a config says, in runs/experiments; a run that was stopped resumes.

    Args:
      config: as JSON holds it.
      network: a name for what `build` builds, where that is not the config's network.
      build: as for `train.train_and_evaluate`.
    """
    directory = run_directory(config, network)
    try:
        summary = train.train_and_evaluate(ConfigDict(config), directory, build)
    except DivergedError as error:
        print(error)
        return Run(read_rows(directory), {}, str(error).partition(" (")[0])
    return Run(read_rows(directory), summary, "")


def run_directory(config: dict, network: str = "") -> Path:
    """Where `run` trains: the same place for equal arguments."""
    key = json.dumps([config, network], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    model = config["model"]
    kind = f"v{model['version']}-{model['depth']}"
    kind += "" if model["residual"] else "-plain"
    parts = [kind, network.replace(" ", "-"), config["dataset"]["name"], digest]
    return Path("runs", "experiments", "-".join(filter(None, parts)))


def curves(
    config: dict,
    network: str = "",
    build: Build = build_network,
) -> dict:
    """Trains like `run`, and returns the curves.

    Returns:
      By epoch 'train_loss' and 'train_error' (means over its steps, on augmented
      images), 'test_error' or, with a validation split, 'validation_error' and
      'validation_loss'; 'params', 'macs', 'images_per_second' and 'seconds'. A run
      that diverges has curves up to there, and 'diverged' says where.
    """
    rows, summary, diverged = run(config, network, build)
    result = {
        "train_loss": _by_epoch(rows, "train_loss"),
        "train_error": 1 - _by_epoch(rows, "train_accuracy"),
        "test_error": 1 - _evaluations(rows, "test_accuracy"),
        "validation_error": 1 - _evaluations(rows, "validation_accuracy"),
        "validation_loss": _evaluations(rows, "validation_loss"),
    }
    result = {name: study.numbers(curve) for name, curve in result.items()}
    result = {name: curve for name, curve in result.items() if curve}
    if diverged:
        return result | {"diverged": diverged}
    costs = ("params", "macs", "images_per_second", "seconds")
    return result | {name: summary[name] for name in costs} | made_by(summary)


def shorten(config: ConfigDict, epochs: int) -> None:
    """Sets `epochs`, and scales everything counted in epochs in proportion.

    A constant warm-up is kept, since the paper counts it in updates.
    """
    config.augment.plain_epochs *= epochs / config.epochs
    if config.schedule.warmup != "constant":
        config.schedule.warmup_epochs *= epochs / config.epochs
    config.epochs = epochs


def last_accuracy(config: dict) -> dict:
    """The last 'accuracy' of one run on validation data, and its updates' 'seconds'."""
    _, summary, diverged = run(config)
    if diverged:
        return {"accuracy": 1 - CHANCE, "seconds": None, "diverged": diverged}
    images = summary["steps"] * config["batch_size"]
    seconds = images / summary["images_per_second"]
    accuracy = summary["validation_accuracy"]
    return {"accuracy": accuracy, "seconds": round(seconds, 2)} | made_by(summary)


def made_by(summary: dict) -> dict:
    """For `Study.cell`, since the run may have been made before."""
    names = ("device", "versions", "git_commit", "seconds")
    return {"made_by": {name: summary[name] for name in names}}


def _by_epoch(rows: list[dict], name: str) -> np.ndarray:
    """Means over each epoch's steps of the values that rows give for calls."""
    rows, sums, steps, before = [row for row in rows if name in row], {}, {}, 0
    for row in rows:
        # The epoch of the call's last update, counted from 1.
        epoch = 1 + int((row["step"] - 1 + 1e-6) * row["epoch"] / row["step"])
        count = row["step"] - before
        value = np.nan if row[name] is None else row[name]
        sums[epoch] = sums.get(epoch, 0.0) + count * value
        steps[epoch] = steps.get(epoch, 0) + count
        before = row["step"]
    return np.array([sums[epoch] / steps[epoch] for epoch in sums])


def _evaluations(rows: list[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows if name in row], float)


def last(results: list[dict], name: str) -> np.ndarray:
    """The last value of a curve for each seed; chance where the run diverged."""
    return np.array(
        [CHANCE if "diverged" in result else result[name][-1] for result in results]
    )


def plot(
    axes: Axes, results: list[dict], name: str, every: int = 1, epochs: int = 1, **style
) -> None:
    """Draws a curve in percent by epoch: the median over seeds, and their range.

    There is a value every `every` epochs. A diverged run counts as guessing from then
    on, even if it diverged before the first value: up to `epochs`, if all runs have
    diverged.
    """
    values = [result.get(name, []) for result in results]
    longest = max(epochs // every, *map(len, values))
    samples = np.full((len(results), longest), CHANCE)
    for sample, curve in zip(samples, values, strict=True):
        sample[: len(curve)] = np.array(curve, float)
    samples = np.nan_to_num(samples, nan=CHANCE)
    places = every * (1 + np.arange(longest))
    marks = {"markevery": max(1, longest // 8)}
    study.plot_seeds(axes, places, 100 * samples, **marks | style)


def percent_axis(axes: Axes, which: str = "y") -> None:
    """Makes an axis one of errors in percent, on which 1 and 2 can be told apart."""
    ticks, scale = (0, 1, 2, 5, 10, 20, 50, 100), {"linthresh": 1, "linscale": 0.4}
    if which == "x":
        axes.set_xscale("symlog", **scale)
        axes.set_xticks(ticks, ticks, minor=False)
        axes.set_xlim(0, 110)
    else:
        axes.set_yscale("symlog", **scale)
        axes.set_yticks(ticks, ticks, minor=False)
        axes.set_ylim(0, 110)


def table(cells: dict[str, list[dict]], names: tuple[str, ...]) -> str:
    """Last values in percent, medians over seeds with their ranges, as text."""
    width = max(map(len, cells))
    lines = [" ".join([" " * width, *(f"{name:>20}" for name in names)])]
    for network, results in cells.items():
        row = f"{network:<{width}}"
        for name in names:
            values = 100 * last(results, name)
            row += f" {np.median(values):8.2f} ({values.min():.1f}-{values.max():.1f})"
        failed = sum("diverged" in result for result in results)
        lines.append(row + (f"  {failed} of {len(results)} diverged" if failed else ""))
    return "\n".join(lines)
