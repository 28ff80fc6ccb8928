"""Where BatchNorm and ReLU go in a residual block.

    python -m experiments.activation_order [--scale=full]

Claim. Anything that interferes with the sum of shortcut and branch hurts: BatchNorm
after the addition, or a ReLU that keeps branches from being negative. With both before
the convolutions (full pre-activation), deep networks are easier to train and generalise
better, although they end at a slightly higher training loss; with the ReLU alone before
them, they are about as good as the original (He et al. 2016, arXiv 1603.05027, sections
4.1 and 4.2, figure 4 and table 2).

Method. The five orders of figure 4 (`arrangements.ORDERS`) in the same network.

Cost. Smoke: 56 layers of width 8, digits, ten epochs at rate 0.1; three minutes from
scratch on two cores of a shared x86 machine. Full: 110 layers with basic and 164 with
bottleneck blocks, CIFAR-10, the paper's recipe, 30 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; test error in percent):
- BN after addition 43 (41-45), ReLU before addition 46 (23-48): far worse than the
  original order, 3.6 (2.5-5.3), in every seed, and so is their training error: 50 and
  52 against 3.0.
- Pre-activation ends at lower training errors, unlike in the paper: 2.1 (1.6-2.4)
  ReLU-only and 1.9 (1.8-2.3) full, against 3.0 (2.8-3.0). (In an earlier measurement of
  the same seeds the ranges of full, 1.6-3.1, and original, 2.8-7.0, overlapped.)
  ReLU-only is ahead from the first epoch on; full is behind in the first, and in one
  seed until the eighth.
- Whether it generalises better cannot be told: 3.3 (1.4-3.6) and 2.5 (0.8-2.5) overlap
  or touch the original's range. In an earlier measurement of the same seeds both lay
  apart from it; the difference is a few of 360 test images.
"""

from functools import partial

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.arrangements import ORDERS, ordered
from experiments.study import STYLES, Study
from resnet_jax import command_line

# Networks: depth, and other fields of `config.model`.
BOTTLENECK = {"block": "bottleneck", "shortcut": "B"}
SCALES = {
    "smoke": {"networks": ((56, {}),), "epochs": 10},
    "full": {"networks": ((110, {}), (164, BOTTLENECK)), "epochs": 0},
}


def measure(config: dict, order: str) -> dict:
    """The curves of one network."""
    if order == "original":
        return curves.curves(config)  # a run that other experiments share
    return curves.curves(config, order, partial(ordered, order))


def run(experiment: Study) -> dict[str, dict[str, list[dict]]]:
    """The results by network ('56 layers, basic'), by order, and for each seed."""
    scale, cells = SCALES[experiment.scale], {}
    for depth, model in scale["networks"]:
        config = curves.run_config(experiment.scale, 1, depth, scale["epochs"], **model)
        cells[f"{depth} layers, {model.get('block', 'basic')}"] = {
            order: experiment.seeds(measure, config, order=order) for order in ORDERS
        }
    return cells


def draw(cells: dict[str, dict[str, list[dict]]]) -> Figure:
    """Training error on the left, test error on the right; a row for each network."""
    rows = len(cells)
    figure, axes = study.figure(6.0, 0.5 + 2.4 * rows, nrows=rows, ncols=2, sharey=True)
    for row, (network, orders) in zip(axes, cells.items(), strict=True):
        for (order, results), style in zip(orders.items(), STYLES, strict=False):
            style = style | {"label": order}
            curves.plot(row[0], results, "train_error", **style)
            curves.plot(row[1], results, "test_error", **style)
        for panel, name in zip(row, ("training", "test"), strict=True):
            curves.percent_axis(panel)
            panel.set(xlabel="epoch", ylabel=f"{name} error (%)")
            panel.set_title(f"{network} blocks", loc="left")
    figure.legend(handles=axes[0, 0].lines, loc="outside upper center", ncols=3)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    for network, orders in cells.items():
        print(f"{network} blocks")
        print(curves.table(orders, ("train_error", "test_error")))
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
