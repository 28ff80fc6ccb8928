"""A picture of a run: curves.png."""

import io
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from resnet_jax import bucket, metrics
from resnet_jax.report.figures import percent_tick
from resnet_jax.workdir import write


def draw_curves(workdir: Path) -> None:
    """Draws loss, accuracy and learning rate by epoch into `curves.png`."""
    rows = metrics.read_rows(workdir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        for split, color, line in (
            ("train", "C0", "-"),
            ("validation", "C2", "--"),
            ("test", "C1", "-."),
        ):
            style = {"color": color, "linestyle": line, "label": split}
            _plot(axes, rows, f"{split}_{quantity}", style)
        axes.set_ylabel(quantity)
        axes.legend()
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter(LogFormatter())  # none where there are many
    accuracy.yaxis.set_major_formatter(percent_tick)
    _plot(rate, rows, "learning_rate", {"color": "C0"})
    rate.set_ylabel("learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(bucket.display_path(workdir), parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write(workdir / "curves.png", picture.getvalue())


def _plot(axes, rows: list[dict], name: str, style: dict) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        marker = "o" if len(points) < 5 else None  # a line through one is not seen
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker=marker, **style)
