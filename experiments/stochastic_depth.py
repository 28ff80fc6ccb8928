"""Leaving blocks out at random in training.

    python -m experiments.stochastic_depth [--scale=full]

Claim. Deep residual networks generalise better, and train more easily, if each update
leaves out a random part of the blocks, late ones more often than early ones: with 110
layers 5.23 against 6.41 percent test error on CIFAR-10, although the training loss is
higher (Huang et al. 2016, arXiv 1603.09382, section 4 and figures 3 and 8).

Method. Version 1; the chance to leave a block's branch out rises linearly with depth to
`model.stochastic_depth`, the last one's. Training errors are means over an epoch of
networks without the blocks left out, test errors are of the whole network.

Cost. Smoke: digits, width 8, ten epochs at rate 0.1.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

SCALES = {
    "smoke": {"depths": (110,), "chances": (0.0, 0.2, 0.5), "epochs": 10},
    "full": {"depths": (56, 110), "chances": (0.0, 0.2, 0.5, 0.8), "epochs": 500},
}
SEEDS = (0, 1, 2)


def measure(config: dict) -> dict:
    """The curves of one network."""
    return curves.curves(config)


def run(study: Study) -> dict[tuple, list[dict]]:
    """The results by depth and the last block's chance, for each seed."""
    scale, cells = SCALES[study.scale], {}
    for depth, chance in itertools.product(scale["depths"], scale["chances"]):
        for seed in SEEDS:
            config = curves.training(
                *(study.scale, 1, depth, seed, scale["epochs"]), stochastic_depth=chance
            )
            found = study.cell(measure, config=config)
            cells.setdefault((depth, chance), []).append(found)
    return cells


def draw(cells: dict[tuple, list[dict]], scale: dict) -> Figure:
    """Curves of the deepest network, and last errors of all by the chance."""
    figure, (panels,) = study.figure(7.2, 2.9, ncols=3)
    deepest, chances = scale["depths"][-1], scale["chances"]
    names = ("train_error", "test_error")
    for chance, style in zip(chances, STYLES, strict=False):
        style = style | {"label": f"{chance:g}"}
        for panel, name in zip(panels, names, strict=False):
            curves.plot(panel, cells[deepest, chance], name, **style)
    for depth, style in zip(scale["depths"], STYLES, strict=False):
        for name, fill, line in zip(
            names, ("none", style["color"]), (":", "-"), strict=True
        ):
            errors = [100 * curves.last(cells[depth, c], name) for c in chances]
            more = {"markerfacecolor": fill, "linestyle": line}
            more["label"] = f"{depth} layers, {name.partition('_')[0]}"
            study.plot_seeds(panels[2], chances, np.transpose(errors), **style | more)
    for panel, letter, title, x in zip(
        panels,
        "abc",
        (f"{deepest} layers, training", f"{deepest} layers, test", "last errors"),
        ("epoch", "epoch", "chance of the last block"),
        strict=True,
    ):
        panel.set(xlabel=x, ylabel="error (%)", ylim=(0, 100 if x == "epoch" else None))
        panel.set_title(f"({letter}) {title}", loc="left")
    panels[0].legend(title="chance of the last block")
    panels[2].legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    named = {
        f"{depth} layers, {chance:g}": cells[depth, chance] for depth, chance in cells
    }
    print(curves.table(named, ("train_error", "test_error")))
    own.save(draw(cells, SCALES[own.scale]))


if __name__ == "__main__":
    command_line.run(main)
