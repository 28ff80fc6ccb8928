"""A picture of a run: curves.png."""

import io
import itertools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from resnet_jax import bucket, metrics
from resnet_jax.report.figures import percent_tick
from resnet_jax.workdir import write


def draw_curves(workdir: Path) -> None:
    """Draws loss, accuracy and learning rate by epoch into `curves.png`.

    Nothing for a run that only evaluated its weights.
    """
    rows = metrics.read_rows(workdir)
    if not any(row["step"] for row in rows):
        return
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        for split, color, line in (
            ("train", "C0", "-"),
            ("validation", "C2", "--"),
            ("test", "C1", "-."),
        ):
            style = {"color": color, "linestyle": line, "label": split}
            _plot(axes, by_epoch(rows, f"{split}_{quantity}"), style)
        axes.set_ylabel(quantity)
        axes.legend()
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(LogFormatter())  # no labels where there are many
    accuracy.yaxis.set_major_formatter(percent_tick)
    _plot(rate, by_epoch(rows, "learning_rate"), {"color": "C0"})
    rate.set_ylabel("learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(bucket.display_path(workdir), parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write(workdir / "curves.png", picture.getvalue())


def by_epoch(rows: list[dict], name: str) -> list[tuple[float, float]]:
    """The values of a metric, such as 'train_loss', each with its epoch.

    A call of few updates, such as the last of an epoch, has noisier means than others:
    those of training are merged into the previous call's.
    """
    rows = [row for row in rows if row.get(name) is not None]
    steps = [row["step"] for row in rows]
    counts = [after - before for before, after in itertools.pairwise([0, *steps])]
    few = max(counts, default=0) / 2 if name.startswith("train_") else 0
    merged = []
    for row, count in zip(rows, counts, strict=True):
        value = row[name]
        if merged and count < few:
            earlier, _, mean = merged.pop()
            value = (earlier * mean + count * value) / (earlier + count)
            count += earlier
        merged.append((count, row["epoch"], value))
    return [(epoch, value) for _, epoch, value in merged]


def _plot(axes, line: list[tuple[float, float]], style: dict) -> None:
    if line:
        marker = "o" if len(line) < 5 else None  # a line through one point is invisible
        axes.plot(*zip(*line, strict=True), linewidth=1.2, marker=marker, **style)
