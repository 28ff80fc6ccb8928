"""The pages: `report.html` of a run, and the comparison of several."""

import base64
import collections
import datetime
import io
import shlex
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from resnet_jax import (
    UserError,
    bucket,
    cost,
    metrics,
    models,
    results,
    seeds,
    trained,
    workdir,
)
from resnet_jax.config import Build, build_network, flat
from resnet_jax.report import figures
from resnet_jax.report.analysis import analyse, interval
from resnet_jax.report.command import training_command
from resnet_jax.report.curves import by_epoch

_CLASSES_SHOWN = 20  # in a table; of more classes, only the worst
# Fields in which the runs of one row may differ.
_SAME_TRAINING = {"seed", "dataset.data_dir", "dataset.mirror"}
_SPLITS = ("train", "validation", "test")
_OUT_FIX = "give another --out=FILE"

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("resnet_jax.report", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def update(directory: Path, build: Build = build_network) -> None:
    """Writes a finished run's `report.html` unless it is newer than the results."""
    path, result = directory / "report.html", directory / "summary.json"
    if not path.exists() or path.stat().st_mtime < result.stat().st_mtime:
        print("drawing   the report", flush=True)
        print(f"report    {bucket.display_path(write(directory, build=build))}")


def write(
    directory: Path,
    out: Path | None = None,
    build: Build = build_network,
) -> Path:
    """Writes a run's report to `out` or its `report.html`, and returns the path.

    `build` is as for `train.train_and_evaluate`.

    Raises:
      UserError: the run is missing or has not finished, or its data set is missing.
      WriteError: the file cannot be written.
    """
    result = _finished(directory)
    run = trained.load(directory, build=build)
    if run.step != result["steps"]:
        raise UserError(
            f"--workdir={directory} has results of step {result['steps']:,}, but its "
            f"newest intact checkpoint is of step {run.step:,}: run the training "
            "command again to repeat the steps in between"
        )
    analysis = analyse(run)
    rows = metrics.read_rows(directory)
    net, batch = run.net, run.config.batch_size
    layers = cost.layers(net, run.inputs.image_shape)
    page = _templates.get_template("run.html").render(
        title=f"v{run.config.model.version}-{run.config.model.depth} on "
        f"{run.inputs.dataset}",
        directory=bucket.display_path(directory),
        written=datetime.date.today().isoformat(),
        run=run,
        result=result,
        description=models.describe(net),
        accuracy_interval=interval(
            round(result["test_accuracy"] * result["test_examples"]),
            result["test_examples"],
        ),
        activation_bytes=cost.activation_bytes(net, layers, batch),
        curves=_curves(rows),
        classes=_classes(run.inputs.class_names, analysis.confusion),
        confusion=_confusion(run.inputs.class_names, analysis.confusion),
        mistakes=[
            {name: _shown(value) for name, value in mistake.items()}
            for mistake in analysis.mistakes
        ],
        calibration=analysis.calibration,
        reliability=[
            figures.reliability_diagram(analysis.calibration[name]["bins"], title)
            for name, title in (("before", "as trained"), ("after", "scaled"))
        ],
        gradients=_gradients(analysis.gradients),
        gradient_images=analysis.gradient_images,
        fields=flat(run.config),
        command=f"{training_command(run.config)} "
        f"--workdir={shlex.quote(bucket.display_path(directory) + '-again')}",
    )
    if out:
        workdir.write(out, page, _OUT_FIX)
        return out
    workdir.write(directory / "report.html", page)
    return directory / "report.html"


class _Run(NamedTuple):
    """A finished run."""

    directory: Path
    fields: dict  # of its config, by dotted names, and what else makes it differ
    result: dict  # its summary.json
    history: list[dict]  # the rows of its metrics.jsonl


def compare(directories: list[Path], path: Path) -> None:
    """Writes a page that compares finished runs; those that differ only in the seed
    share a row.

    Raises:
      UserError: one is missing or has not finished.
      WriteError: the file cannot be written.
    """
    runs = [_read(directory) for directory in directories]
    groups, differing = _grouped(runs)
    page = _templates.get_template("comparison.html").render(
        title=f"{len(runs)} runs compared",
        written=datetime.date.today().isoformat(),
        rows=[
            _row(number, members, differing)
            for number, members in enumerate(groups, start=1)
        ],
        differing=differing,
        other_seeds=len({run.fields["seed"] for run in runs}) > 1,
        same_data=len({run.result["dataset"] for run in runs}) == 1,
        curves=_compared_curves(groups),
    )
    workdir.write(path, page, _OUT_FIX)


def _read(directory: Path) -> _Run:
    result = _finished(directory)
    fields = flat(workdir.read_config(directory))
    fields["build"] = result.get("build", "")
    fields["another length"] = results.length_changes(result)
    return _Run(directory, fields, result, metrics.read_rows(directory))


def _grouped(runs: list[_Run]) -> tuple[list[list[_Run]], list[str]]:
    """Runs of the same training, and the fields in which these groups differ.

    A second run of the same seed is not another sample: it has a group of its own.
    """
    names = sorted({name for run in runs for name in run.fields} - _SAME_TRAINING)
    groups: dict[tuple, list[_Run]] = {}
    times = collections.Counter()
    for run in runs:
        key = tuple(repr(run.fields.get(name)) for name in names)
        seed = run.fields["seed"]
        groups.setdefault((*key, times[key, seed]), []).append(run)
        times[key, seed] += 1
    *values, _ = zip(*groups, strict=True)  # of each field, over the groups
    differing = [
        name for name, each in zip(names, values, strict=True) if len(set(each)) > 1
    ]
    return list(groups.values()), differing


def _row(number: int, members: list[_Run], differing: list[str]) -> dict:
    """A row of the table of results: runs that differ in the seed alone."""
    first = members[0]
    accuracies = [run.result["test_accuracy"] for run in members]
    accuracy, low, high = _mean_interval(accuracies, first.result["test_examples"])
    return {
        "number": number,
        "directories": [bucket.display_path(run.directory) for run in members],
        "seeds": [run.fields["seed"] for run in members],
        "accuracy": accuracy,
        "low": low,
        "high": high,
        "result": first.result,
        "seconds": np.mean([run.result["seconds"] for run in members]),
        "fields": {field: first.fields.get(field) for field in differing},
    }


def _compared_curves(groups: list[list[_Run]]) -> list[Markup]:
    """A figure for each quantity, in which the runs of a group have one colour."""
    curves = []
    for name in ("train_loss", "test_accuracy", "validation_accuracy", "learning_rate"):
        series, colors = [], []
        for color, members in enumerate(groups):
            for run in members:
                if points := _points(run.history, name):
                    series.append((str(color + 1), *points))
                    colors.append(color)
        if series:
            curves.append(
                figures.lines(
                    series,
                    ("epoch", name.replace("_", " ")),
                    log=name == "train_loss",
                    percent=name.endswith("accuracy"),
                    colors=colors,
                )
            )
    return curves


def _finished(directory: Path) -> dict:
    """A run's results. Raises UserError where it is no run, or has none yet."""
    config, result = workdir.read_config(directory), workdir.read_summary(directory)
    if result is None or not results.is_whole(result, config):
        raise UserError(
            f"--workdir={directory} has not finished: run its training command again "
            "to resume it"
        )
    return result


def _points(rows: list[dict], name: str) -> tuple[list, list] | None:
    return tuple(map(list, zip(*by_epoch(rows, name), strict=True))) or None


def _curves(rows: list[dict]) -> list[Markup]:
    curves = []
    for quantity in ("loss", "accuracy"):
        series = [
            (split, *points)
            for split in _SPLITS
            if (points := _points(rows, f"{split}_{quantity}"))
        ]
        if series:
            log = quantity == "loss"
            curves.append(figures.lines(series, ("epoch", quantity), log, not log))
    for name, title in (
        ("learning_rate", "learning rate"),
        ("train_gradient_norm", "norm of the whole gradient"),
    ):
        if points := _points(rows, name):
            log = name == "train_gradient_norm"
            curves.append(figures.lines([(title, *points)], ("epoch", title), log))
    return curves


def _gradients(norms: dict[str, dict[str, float]]):
    series = []
    for when, by_layer in norms.items():
        values = np.array(list(by_layer.values()))
        # Zeros, which a log axis cannot show, come from dead units.
        shown = np.flatnonzero(values > 0)
        series.append((when, shown + 1, values[shown]))
    return figures.lines(series, ("layer, from the input", "gradient norm"), log=True)


def _classes(names: tuple[str, ...], confusion: np.ndarray) -> list[dict]:
    """Each class with its accuracy and interval; of very many, only the worst."""
    rows = []
    for label, name in enumerate(names):
        total, correct = int(confusion[label].sum()), int(confusion[label, label])
        if not total:
            continue
        low, high = interval(correct, total)
        wrong = confusion[label].copy()
        wrong[label] = 0
        other = names[wrong.argmax()] if wrong.any() else None
        rows.append(
            {
                "name": name,
                "examples": total,
                "accuracy": correct / total,
                "low": low,
                "high": high,
                "taken_for": other,
                "taken_times": int(wrong.max()),
            }
        )
    if len(names) > _CLASSES_SHOWN:
        rows.sort(key=lambda row: row["accuracy"])
    return rows[:_CLASSES_SHOWN]


def _confusion(names: tuple[str, ...], confusion: np.ndarray) -> dict:
    """The matrix as a table, or, with many classes, as a figure."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    small = len(names) <= _CLASSES_SHOWN
    return {
        "names": names,
        "rows": zip(names, confusion.tolist(), shares.tolist(), strict=True),
        "figure": None if small else figures.matrix(shares),
    }


def _shown(value):
    """A picture as a data URL; anything else as it is."""
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _mean_interval(values: list[float], examples: int) -> tuple[float, float, float]:
    """Mean and 95% interval: over seeds by Student's t; for one, over the examples."""
    if len(values) == 1:
        return values[0], *interval(round(values[0] * examples), examples)
    statistics = seeds.accuracy_interval(values)
    return statistics["mean"], *statistics["interval"]
