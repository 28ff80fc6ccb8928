"""Figures as SVG inside a page: they take the page's text colour, dark or light."""

import io
import itertools
import re

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike

from resnet_jax.report.calibration import Bins

# Visible on white and on black. Series also have line styles, for those who print.
COLORS = ("#3b82c4", "#e07b39", "#2a9d6c", "#b05cc4", "#c9a227", "#d1495b", "#6b7fd7")
DASHES = ("-", "--", "-.", ":")
_TEXT = "#010203"  # becomes currentColor
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "resnet_jax",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color"), _TEXT
    ),
    **{"ytick.color": _TEXT, "grid.color": _TEXT, "grid.alpha": 0.15},
}
_POINTS = 400  # of a line at most; more of them are averaged


def percent_tick(value: float, _: int | None = None) -> str:
    """The label of a tick, with as many decimals as it takes: 98% or 97.5%."""
    return f"{100 * value:.4g}%"


def lines(
    series: list[tuple[str, ArrayLike, ArrayLike]],
    labels: tuple[str, str],
    log: bool = False,
    percent: bool = False,
    colors: list[int] | None = None,
) -> Markup:
    """Draws (name, x, y) lines; those of the same name are in the legend once.

    Args:
      series: finite values.
      labels: of both axes.
      log: a logarithmic y axis.
      percent: y is shown in percent.
      colors: index of each line's colour; None: each has its own.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(labels)
        named = set()
        for number, (name, x, y) in enumerate(series):
            kind = colors[number] if colors else number
            x, y = _thinned(np.asarray(x, float), np.asarray(y, float))
            axes.plot(
                x,
                y,
                color=COLORS[kind % len(COLORS)],
                linestyle=DASHES[kind % len(DASHES)],
                linewidth=1.3,
                marker="o" if len(x) < 5 else None,
                markersize=4,
                label="_" if name in named else name,
            )
            named.add(name)
        if all(float(value).is_integer() for _, x, _ in series for value in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            between = "{x:g}" if high < 100 * low else NullFormatter()
            axes.yaxis.set_minor_formatter(between)
        if percent:
            axes.yaxis.set_major_formatter(percent_tick)
        if len(named) > 1:
            axes.legend()
        return _svg(figure, f"{labels[1]} by {labels[0]}")


def reliability_diagram(bins: Bins, title: str) -> Markup:
    """Draws accuracy against confidence; the diagonal is perfect calibration."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(("confidence", "accuracy"))
        edges = np.linspace(0, 1, len(bins.counts) + 1)
        axes.bar(
            edges[:-1],
            np.nan_to_num(bins.accuracy),
            1 / len(bins.counts),
            align="edge",
            color=COLORS[0],
            alpha=0.75,
            edgecolor=COLORS[0],
        )
        axes.plot([0, 1], [0, 1], color=_TEXT, linewidth=1, linestyle="--")
        axes.scatter(
            bins.confidence,
            bins.accuracy,
            8 + 150 * bins.counts / bins.counts.sum(),
            color=COLORS[1],
            zorder=3,
            clip_on=False,
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), title=title)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(percent_tick)
        return _svg(figure, f"reliability diagram, {title}")


def matrix(shares: np.ndarray) -> Markup:
    """Draws a confusion matrix of many classes: rows are the true ones."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(("predicted class", "true class"), (4.6, 4.4))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        return _svg(figure, "confusion matrix")


def _axes(labels: tuple[str, str], size: tuple[float, float] = (4.6, 3.1)):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.grid()
    axes.set(xlabel=labels[0], ylabel=labels[1])
    return figure, axes


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(x) <= _POINTS:
        return x, y
    x, y = (
        [part.mean() for part in np.array_split(values, _POINTS)] for values in (x, y)
    )
    return np.array(x), np.array(y)


_numbers = itertools.count(1)


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of a page, with ids that no other figure has."""
    number = next(_numbers)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text))
    used = {name for pair in used for name in pair if name}

    def rename(match):
        return f' id="f{number}{match[1]}"' if match[1] in used else ""

    text = re.sub(r' id="([^"]+)"', rename, text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number}", text)
    text = text.replace(_TEXT, "currentColor")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return Markup(
        text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    )
