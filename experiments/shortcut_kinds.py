"""What the shortcut must be: the identity.

    python -m experiments.shortcut_kinds [--scale=full]

Claim. Whatever is done to the shortcut, be it scaled, gated, convolved or dropped out,
multiplies over the blocks and makes a deep network harder to train, although all but
the scaling can represent the identity (He et al. 2016, arXiv 1603.05027, section 3,
figure 2 and table 1).

Method. Every block of one network has one of `arrangements.SHORTCUTS`; a gate's bias is
where it begins.

Cost. Smoke: 56 layers of width 8, digits, ten epochs at rate 0.1; six minutes on two
cores of a shared x86 machine when they are free. Full: 110 layers, CIFAR-10, the
paper's recipe, 27 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; last test error in percent):
- Identity 2.8 (1.1-3.3). Next is the gate on the shortcut alone that begins almost
  open, at bias -6: 4.7 (4.2-6.9), and its training error, 6.0 (5.1-6.2), is higher in
  every seed (identity 3.2 (2.9-3.5)). In the paper, too, it is the closest.
- All others have not learnt the training set either: both x 0.5 43.9 (43.9-51.1),
  exclusive gate 49.4 (43.6-51.7), shortcut x 0.5 58.9 (56.7-60.3), shortcut gate at
  bias 0 60.0 (55.6-66.7), 1x1 convolution 60.8 (57.5-65.3). Their ranges overlap, so
  that their order means little; all are better than no shortcut, 69.2 (67.2-75.8).
- Dropout guesses (85.0-91.4), and one seed of three diverges: it doubles what it keeps,
  which adds to the variance at every block.
"""

from functools import partial

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.arrangements import SHORTCUTS, with_shortcut
from experiments.study import STYLES, Study
from resnet_jax import command_line

SCALES = {
    "smoke": {"depth": 32, "epochs": 10},
    "full": {"depth": 110, "epochs": 0},
}
SEEDS = (0, 1, 2)


def measure(config: dict, shortcut: str) -> dict:
    """The curves of one network."""
    if shortcut in ("identity", "none (plain)"):  # runs that other experiments share
        model = config["model"] | {"residual": shortcut == "identity"}
        return curves.curves(config | {"model": model})
    return curves.curves(config, shortcut, partial(with_shortcut, shortcut))


def run(study: Study) -> dict[str, list[dict]]:
    """The results by kind of shortcut, for each seed."""
    scale, cells = SCALES[study.scale], {}
    for shortcut in SHORTCUTS:
        configs = [
            curves.training(study.scale, 1, scale["depth"], seed, scale["epochs"])
            for seed in SEEDS
        ]
        cells[shortcut] = [
            study.cell(measure, config=config, shortcut=shortcut) for config in configs
        ]
    return cells


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Training error by epoch, and the last errors of every seed."""
    figure, ((curve, errors),) = study.figure(
        6.8, 3.0, ncols=2, width_ratios=(1.2, 1), sharey=False
    )
    names = [*cells]
    markers = "osv^DPX<>"
    for place, results in enumerate(cells.values()):
        colour, line = STYLES[place % 5]["color"], STYLES[place // 2 % 5]["linestyle"]
        style = {"color": colour, "linestyle": line, "marker": markers[place]}
        curves.plot(curve, results, "train_error", **style)
        for name, fill, above in (
            ("train_error", "none", 0.15),
            ("test_error", colour, -0.15),
        ):
            last = 100 * curves.last(results, name)
            errors.plot(
                *(last, [place - above] * len(last)),
                **style | {"linestyle": "none", "markerfacecolor": fill},
            )
    curve.set(xlabel="epoch", ylabel="training error (%)", ylim=(0, 100))
    errors.set(xlabel="last error (%)", xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    errors.set_yticks(range(len(names)), names)
    curve.set_title("(a)", loc="left")
    errors.set_title("(b) training (open), test (filled)", loc="left")
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    print(curves.table(cells, ("train_error", "test_error")))
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
