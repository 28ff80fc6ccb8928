"""TODO."""

import itertools

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

SCALES = {
    "smoke": {"depths": (20, 32, 44, 56), "epochs": 10},
    "full": {"depths": (20, 32, 44, 56), "epochs": 0},
}
SEEDS = (0, 1, 2)


def measure(config: dict) -> dict:
    """The curves of one network."""
    return curves.curves(config)


def run(study: Study) -> dict[str, list[dict]]:
    """The results of each network, as 'plain-20', for each seed."""
    scale, cells = SCALES[study.scale], {}
    for residual, depth in itertools.product((False, True), scale["depths"]):
        configs = [
            curves.training(
                study.scale, 1, depth, seed, scale["epochs"], residual=residual
            )
            for seed in SEEDS
        ]
        cells[f"{'residual' if residual else 'plain'}-{depth}"] = [
            study.cell(measure, config=config) for config in configs
        ]
    return cells


def draw(cells: dict[str, list[dict]], depths: tuple[int, ...]) -> Figure:
    """Training error above and test error below, plain left and residual right."""
    figure, axes = study.figure(5.6, 3.8, nrows=2, ncols=2, sharex=True, sharey=True)
    for column, kind in enumerate(("plain", "residual")):
        for depth, style in zip(depths, STYLES, strict=False):
            style = style | {"label": f"{depth} layers"}
            for row, name in enumerate(("train_error", "test_error")):
                curves.plot(axes[row, column], cells[f"{kind}-{depth}"], name, **style)
        axes[0, column].set_title(kind, loc="left")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set(ylabel="training error (%)", ylim=(0, 100))
    axes[1, 0].set_ylabel("test error (%)")
    axes[0, 1].legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    print(curves.table(cells, ("train_error", "test_error")))
    own.save(draw(cells, SCALES[own.scale]["depths"]))


if __name__ == "__main__":
    command_line.run(main)
