"""Degradation: deeper plain networks train worse, residual ones do not.

    python -m experiments.plain_vs_residual [--scale=full]

Claim. Without shortcuts, the deeper of two networks has the higher training error as
well as the higher test error, so that it is not overfitting that hurts; with shortcuts
depth does no harm (He et al. 2015, arXiv 1512.03385, section 4.2 and figure 6).

Method. Version 1 with and without shortcuts, 20, 32, 44 and 56 layers, otherwise
equal. Training errors are means over an epoch, on augmented images.

Cost. Smoke: digits, width 8, ten epochs at rate 0.1; three minutes from scratch on two
cores of a shared x86 machine. Full: CIFAR-10, the paper's recipe of 164 epochs, 24
runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; percent):
- Plain, 20, 32, 44, 56 layers: training error 10.2 (9.7-10.3), 38.1 (34.6-51.7), 66.5
  (62.6-69.0), 78.9 (76.7-81.5); test error 6.4 (6.1-7.5), 29.7 (26.9-44.4), 60.8
  (60.3-66.9), 78.1 (73.6-78.3).
- Residual: training error 1.9 (1.3-2.2), 2.6 (1.7-2.6), 3.1 (1.7-4.6), 3.5 (3.1-4.0);
  test error 3.3 (1.7-3.9), 2.8 (1.9-3.3), 2.8 (1.9-4.7), 4.4 (2.2-4.4).
- So the degradation is there in every seed, and shortcuts remove nearly all of it: with
  56 layers a little is left, 3.5 against 1.9 with 20, and the ranges do not overlap. A
  benefit of depth does not show at this scale: 20 layers are enough for the digits, and
  one test image is 0.3 points.
"""

import itertools

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

SCALES = {
    "smoke": {"depths": (20, 32, 44, 56), "epochs": 10},
    "full": {"depths": (20, 32, 44, 56), "epochs": 0},
}


def run(experiment: Study) -> dict[str, list[dict]]:
    """The results of each network ('plain-20'), for each seed."""
    scale, cells = SCALES[experiment.scale], {}
    for residual, depth in itertools.product((False, True), scale["depths"]):
        config = curves.run_config(
            experiment.scale, 1, depth, scale["epochs"], residual=residual
        )
        name = f"{'residual' if residual else 'plain'}-{depth}"
        cells[name] = experiment.seeds(curves.curves, config)
    return cells


def draw(cells: dict[str, list[dict]], depths: tuple[int, ...]) -> Figure:
    """Training error above and test error below; plain left and residual right."""
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
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    print(curves.table(cells, ("train_error", "test_error")))
    experiment.save(draw(cells, SCALES[experiment.scale]["depths"]))


if __name__ == "__main__":
    command_line.run(main)
