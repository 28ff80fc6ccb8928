"""The pages: `report.html` of a run, and the comparison of several."""

import base64
import datetime
import io
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from scipy import stats

from resnet_jax import UserError, bucket, metrics, results, summary, trained, workdir
from resnet_jax.report import figures
from resnet_jax.report.analysis import analyse, interval
from resnet_jax.report.command import flat, reproduce

_CLASSES_SHOWN = 20  # in a table; of more classes the worst
# Fields in which the runs of one row may differ.
_SAME_TRAINING = {"seed", "dataset.data_dir", "dataset.mirror"}
_SPLITS = ("train", "validation", "test")

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("resnet_jax.report", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def update(directory: Path) -> None:
    """Writes a finished run's `report.html` unless it is newer than the results."""
    path, result = directory / "report.html", directory / "summary.json"
    if not path.exists() or path.stat().st_mtime < result.stat().st_mtime:
        print(f"report    {bucket.shown(write(directory))}")


def write(directory: Path) -> Path:
    """Writes `report.html`, and returns its path.

    Raises:
      UserError: the run is not there or has not finished, or its data set is not there.
      WriteError: the file cannot be written.
    """
    result = _finished(directory)
    run = trained.load(directory)
    found = analyse(run)
    rows = metrics.read_rows(directory)
    net, batch = run.net, run.config.batch_size
    layers = summary.layers(net, run.inputs.image_shape)
    page = _templates.get_template("run.html").render(
        title=f"v{run.config.model.version}-{run.config.model.depth} on "
        f"{run.inputs.dataset}",
        directory=bucket.shown(directory),
        written=datetime.date.today().isoformat(),
        run=run,
        result=result,
        description=summary.describe(net),
        accuracy_interval=interval(
            round(result["test_accuracy"] * result["test_examples"]),
            result["test_examples"],
        ),
        activation_bytes=summary.activation_bytes(net, layers, batch),
        curves=_curves(rows),
        classes=_classes(run.inputs.class_names, found.confusion),
        confusion=_confusion(run.inputs.class_names, found.confusion),
        mistakes=[
            {name: _shown(value) for name, value in mistake.items()}
            for mistake in found.mistakes
        ],
        calibration=found.calibration,
        reliability=[
            figures.reliability_diagram(found.calibration[name]["bins"], title)
            for name, title in (("before", "as trained"), ("after", "scaled"))
        ],
        gradients=_gradients(found.gradients),
        gradient_images=found.gradient_images,
        fields=flat(run.config),
        command=reproduce(run.config),
    )
    workdir.write(directory / "report.html", page)
    return directory / "report.html"


def compare(directories: list[Path], path: Path) -> None:
    """Writes a page that compares finished runs; those that differ in nothing but the
    seed are one row.

    Raises:
      UserError: one is not there or has not finished.
      WriteError: the file cannot be written.
    """
    runs = []
    for directory in directories:
        result = _finished(directory)
        fields = flat(workdir.read_config(directory))
        runs.append((directory, fields, result, metrics.read_rows(directory)))
    names = {name for _, fields, *_ in runs for name in fields} - _SAME_TRAINING
    names = sorted(names)
    groups: dict[tuple, list] = {}
    for run in runs:
        key = tuple(repr(run[1].get(name)) for name in names)
        groups.setdefault(key, []).append(run)
    differing = [
        name
        for place, name in enumerate(names)
        if len({key[place] for key in groups}) > 1
    ]
    rows = []
    for letter, members in zip(_letters(), groups.values(), strict=False):
        values = [result["test_accuracy"] for _, _, result, _ in members]
        mean, low, high = _mean_interval(values, members[0][2]["test_examples"])
        rows.append(
            {
                "name": letter,
                "directories": [bucket.shown(directory) for directory, *_ in members],
                "seeds": [fields["seed"] for _, fields, *_ in members],
                "accuracy": mean,
                "low": low,
                "high": high,
                "result": members[0][2],
                "seconds": np.mean([result["seconds"] for _, _, result, _ in members]),
                "fields": {name: members[0][1].get(name) for name in differing},
            }
        )
    curves = []
    for name in ("train_loss", "test_accuracy", "validation_accuracy", "learning_rate"):
        series, colors = [], []
        for color, (row, members) in enumerate(zip(rows, groups.values(), strict=True)):
            for *_, history in members:
                if points := _points(history, name):
                    series.append((row["name"], *points))
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
    page = _templates.get_template("comparison.html").render(
        title=f"{len(runs)} runs compared",
        written=datetime.date.today().isoformat(),
        rows=rows,
        differing=differing,
        same_data=len({result["dataset"] for _, _, result, _ in runs}) == 1,
        curves=curves,
    )
    workdir.write(path, page, "give another --out=FILE")


def _finished(directory: Path) -> dict:
    """A run's results. Raises UserError where it is no run, or has none yet."""
    config, result = workdir.read_config(directory), workdir.read_summary(directory)
    if result is None or not results.is_whole(result, config):
        raise UserError(
            f"--workdir={directory} has not finished: give its training's command "
            "again, and it goes on"
        )
    return result


def _points(rows: list[dict], name: str) -> tuple[list, list] | None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return tuple(map(list, zip(*points, strict=True))) if points else None


def _curves(rows: list[dict]) -> list:
    found = []
    for quantity in ("loss", "accuracy"):
        series = [
            (split, *points)
            for split in _SPLITS
            if (points := _points(rows, f"{split}_{quantity}"))
        ]
        if series:
            log = quantity == "loss"
            found.append(figures.lines(series, ("epoch", quantity), log, not log))
    for name, title in (
        ("learning_rate", "learning rate"),
        ("train_gradient_norm", "norm of the whole gradient"),
    ):
        if points := _points(rows, name):
            log = name == "train_gradient_norm"
            found.append(figures.lines([(title, *points)], ("epoch", title), log))
    return found


def _gradients(norms: dict[str, dict[str, float]]):
    series = []
    for when, by_layer in norms.items():
        values = np.array(list(by_layer.values()))
        # Zeros, which a log axis cannot show, come from units that are dead.
        shown = np.flatnonzero(values > 0)
        series.append((when, shown + 1, values[shown]))
    return figures.lines(series, ("layer, from the input", "gradient norm"), log=True)


def _classes(names: tuple[str, ...], confusion: np.ndarray) -> list[dict]:
    """Each class with its accuracy and interval; of very many, the worst."""
    found = []
    for label, name in enumerate(names):
        total, correct = int(confusion[label].sum()), int(confusion[label, label])
        if not total:
            continue
        low, high = interval(correct, total)
        wrong = confusion[label].copy()
        wrong[label] = 0
        other = names[wrong.argmax()] if wrong.any() else None
        found.append(
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
        found.sort(key=lambda row: row["accuracy"])
    return found[:_CLASSES_SHOWN]


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
    """A picture as the address of itself; anything else as it is."""
    if not isinstance(value, Image.Image):
        return value
    buffer = io.BytesIO()
    value.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _mean_interval(values: list[float], examples: int) -> tuple[float, float, float]:
    """Mean and 95% interval: over seeds by Student's t; of one, over the examples."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, *interval(round(mean * examples), examples)
    error = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return mean, max(mean - error, 0.0), min(mean + error, 1.0)


def _letters():
    for number in range(26 * 26):
        first, second = divmod(number, 26)
        yield (chr(64 + first) if first else "") + chr(65 + second)
