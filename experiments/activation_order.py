"""TODO."""

from functools import partial

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.arrangements import ORDERS, ordered
from experiments.study import STYLES, Study
from resnet_jax import command_line

# Networks: depth, and what else `config.model` says.
BOTTLENECK = {"block": "bottleneck", "shortcut": "B"}
SCALES = {
    "smoke": {"networks": ((56, {}),), "epochs": 10},
    "full": {"networks": ((110, {}), (164, BOTTLENECK)), "epochs": 0},
}
SEEDS = (0, 1, 2)


def measure(config: dict, order: str) -> dict:
    """The curves of one network."""
    if order == "original":
        return curves.curves(config)  # a run that other experiments share
    return curves.curves(config, order, partial(ordered, order))


def run(study: Study) -> dict[str, dict[str, list[dict]]]:
    """The results by network, as '56, basic', by order, and for each seed."""
    scale, cells = SCALES[study.scale], {}
    for depth, model in scale["networks"]:
        name = f"{depth}, {model.get('block', 'basic')}"
        for order in ORDERS:
            configs = [
                curves.training(study.scale, 1, depth, seed, scale["epochs"], **model)
                for seed in SEEDS
            ]
            cells.setdefault(name, {})[order] = [
                study.cell(measure, config=config, order=order) for config in configs
            ]
    return cells


def draw(cells: dict[str, dict[str, list[dict]]]) -> Figure:
    """Training error by epoch above, test error below; a column for each network."""
    figure, axes = study.figure(6.0, 4.4, nrows=2, ncols=len(cells), sharey="row")
    for column, (network, orders) in enumerate(cells.items()):
        for (order, results), style in zip(orders.items(), STYLES, strict=True):
            for row, name in enumerate(("train_error", "test_error")):
                style = style | {"label": order}
                curves.plot(axes[row, column], results, name, **style)
        axes[0, column].set_title(f"{network} blocks", loc="left")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set(ylabel="training error (%)", ylim=(0, 100))
    axes[1, 0].set(ylabel="test error (%)", ylim=(0, 100))
    figure.legend(handles=axes[0, 0].lines, loc="outside upper center", ncols=3)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    for network, orders in cells.items():
        print(f"{network} blocks")
        print(curves.table(orders, ("train_error", "test_error")))
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
