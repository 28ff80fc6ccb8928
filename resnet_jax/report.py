"""Pictures of a run."""

from pathlib import Path

from matplotlib.figure import Figure

from resnet_jax import metrics


def draw_curves(workdir: Path) -> None:
    """Draws loss, accuracy and learning rate by epoch into `curves.png`."""
    rows = metrics.read_rows(workdir)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    for axes, quantity in ((loss, "loss"), (accuracy, "accuracy")):
        for split, style in (("train", "-"), ("validation", "--"), ("test", "-.")):
            _plot(axes, rows, f"{split}_{quantity}", style, split)
        axes.set_ylabel(quantity)
        axes.legend()
    loss.set_yscale("log")
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _plot(rate, rows, "learning_rate", "-", None)
    rate.set_ylabel("learning rate")
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.suptitle(str(workdir))
    temporary = workdir / ".curves.png.part"
    figure.savefig(temporary, format="png", dpi=120)
    temporary.replace(workdir / "curves.png")


def _plot(axes, rows: list[dict], name: str, style: str, label: str | None) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2)
