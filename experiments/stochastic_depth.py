"""Leaving blocks out at random during training.

    python -m experiments.stochastic_depth [--scale=full]

Claim. Deep residual networks generalise better, and train more easily, if each update
drops a random subset of the blocks, late ones more often than early ones: with 110
layers 5.23 against 6.41 percent test error on CIFAR-10, although the training loss is
higher (Huang et al. 2016, arXiv 1603.09382, section 4 and figures 3 and 8).

Method. Version 1; the probability of dropping a block's branch rises linearly with
depth to `model.stochastic_depth` at the last one. Branches that stay are divided by the
probability of staying, where the paper multiplies by it at test time. Training errors
are means over an epoch, of networks without the dropped blocks; test errors are those
of the whole network.

Cost. Smoke: digits, width 8, rate 0.1: a short training of 56 layers, and a long one of
32 on a quarter of the training set, tested on all other digits; four minutes from
scratch on two cores of a shared x86 machine. Full: CIFAR-10, 110 layers, the paper's
500 epochs, 12 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; percent). On digits only the
cost shows, and no benefit.
- Ten epochs of 56 layers: test error 3.6 (2.5-5.3) without, 3.3 (3.1-4.7) with a drop
  probability of 0.2, 78 (44-83) with 0.5, and training error 3.0 (2.8-3.0), 8.2
  (7.1-10), 80 (59-81). It learns more slowly, with 0.5 far more slowly; with 0.2 the
  whole network, too, has test errors of 36 to 45 after three epochs, against 16 to 33
  without, in every seed.
- 100 epochs of 32 layers on 359 digits: nearly all of them are memorised, with
  training errors of 0, 0.3 and 0.9, but the test errors, 3.4 (2.9-3.5), 3.8 (3.6-4.3)
  and 3.3 (3.0-3.7), are no better with stochastic depth. Those of 0.2 are worse here,
  but were not in an earlier measurement of the same seeds. There is little here for it
  to regularise; the paper's setting is the full scale.
"""

import itertools

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

QUARTER = {"train_split": "train[:25%]", "eval_split": "train[25%:]+test"}
SCALES = {
    "smoke": {
        # Depth, epochs, epochs between evaluations, and fields of `config.dataset`.
        "trainings": ((56, 10, 1, {}), (32, 100, 10, QUARTER)),
        "chances": (0.0, 0.2, 0.5),
    },
    "full": {"trainings": ((110, 500, 1, {}),), "chances": (0.0, 0.2, 0.5, 0.8)},
}


def run(experiment: Study) -> dict[tuple, list[dict]]:
    """The results by depth and the last block's chance, for each seed."""
    scale, cells = SCALES[experiment.scale], {}
    choices = itertools.product(scale["trainings"], scale["chances"])
    for (depth, epochs, eval_every, dataset), chance in choices:
        config = curves.run_config(
            experiment.scale, 1, depth, epochs, stochastic_depth=chance
        )
        config["dataset"] |= dataset
        if eval_every > 1:
            config["eval_every"] = config["checkpoint"]["every"] = eval_every
        cells[depth, chance] = experiment.seeds(curves.curves, config)
    return cells


def draw(cells: dict[tuple, list[dict]], scale: dict) -> Figure:
    """A row for each training: errors by epoch, training left and test right."""
    rows = len(scale["trainings"])
    figure, axes = study.figure(6.0, 0.5 + 2.1 * rows, nrows=rows, ncols=2)
    for (depth, _, eval_every, dataset), row in zip(
        scale["trainings"], axes, strict=True
    ):
        part = ", 25% of the training set" if dataset else ""
        for chance, style in zip(scale["chances"], STYLES, strict=False):
            results, style = cells[depth, chance], style | {"label": f"{chance:g}"}
            curves.plot(row[0], results, "train_error", **style)
            curves.plot(row[1], results, "test_error", every=eval_every, **style)
        for panel, name in zip(row, ("training", "test"), strict=True):
            curves.percent_axis(panel)
            panel.set(xlabel="epoch", ylabel=f"{name} error (%)")
            panel.set_title(f"{depth} layers{part}", loc="left")
    figure.legend(
        handles=axes[0, 0].lines,
        title="drop probability of the last block",
        loc="outside upper center",
        ncols=len(scale["chances"]),
    )
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    named = {
        f"{depth} layers, {chance:g}": cells[depth, chance] for depth, chance in cells
    }
    print(curves.table(named, ("train_error", "test_error")))
    experiment.save(draw(cells, SCALES[experiment.scale]))


if __name__ == "__main__":
    command_line.run(main)
