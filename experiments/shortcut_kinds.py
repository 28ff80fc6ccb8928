"""Why the shortcut must be the identity.

    python -m experiments.shortcut_kinds [--scale=full]

Claim. Any change to the shortcut, be it scaling, gating, convolution or dropout,
compounds over the blocks and makes a deep network harder to train, although gates on
the shortcut alone and convolutions can represent the identity (He et al. 2016, arXiv
1603.05027, section 3, figure 2 and table 1).

Method. Every block of a network has the same one of `arrangements.SHORTCUTS`; the bias
given for a gate is its initial one.

Cost. Smoke: 32 layers of width 8, digits, ten epochs at rate 0.1; five minutes from
scratch on two cores of a shared x86 machine. Full: 110 layers, CIFAR-10, the paper's
recipe, 27 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; final test error, percent):
- Identity 2.2 (1.4-3.9). The gate on the shortcut alone that begins almost open, at
  bias -6, cannot be told from it: 2.8 (2.5-3.1), and training errors of 2.5 (1.8-2.6)
  against 2.3 (1.3-2.6). (In an earlier measurement of the same seeds it was behind in
  every seed.) In the paper, too, it is the closest.
- All others are worse in every seed, on the training set too: 1x1 convolution 11.9
  (10.0-14.2), shortcut x 0.5 18.9 (10.6-22.8), shortcut gate at bias 0 19.2
  (10.6-21.4), both x 0.5 21.4 (9.2-28.1). Their ranges overlap, so that their order
  means little. Without shortcuts the error is 28.3 (21.4-43.3): only the convolution's
  range lies apart from that; shortcut x 0.5 is better in every seed, too. On the
  training set all four lie apart from the network without shortcuts (33.5-49.4): 14.3
  to 32.7.
- The exclusive gate at bias -6, which at first almost shuts off its branch, is the
  worst of those that learn, 47.8 (41.7-50.8). In the paper, whose training is 280 times
  as long, it is among the best.
- The network with dropout stays at chance, 88.9 (88.9-92.2): dropout doubles the values
  that it keeps, which adds to the variance at every block.
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


def measure(config: dict, shortcut: str) -> dict:
    """The curves of one network."""
    if shortcut in ("identity", "none (plain)"):  # runs that other experiments share
        model = config["model"] | {"residual": shortcut == "identity"}
        return curves.curves(config | {"model": model})
    return curves.curves(config, shortcut, partial(with_shortcut, shortcut))


def run(experiment: Study) -> dict[str, list[dict]]:
    """The results by kind of shortcut, for each seed."""
    scale = SCALES[experiment.scale]
    config = curves.run_config(experiment.scale, 1, scale["depth"], scale["epochs"])
    return {
        shortcut: experiment.seeds(measure, config, shortcut=shortcut)
        for shortcut in SHORTCUTS
    }


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Training error by epoch, and the final errors of every seed."""
    figure, ((curve, errors),) = study.figure(
        7.2, 3.5, ncols=2, width_ratios=(1.2, 1), sharey=False
    )
    names = [*cells]
    markers = "osv^Dph<>"
    colours = [style["color"] for style in STYLES]
    colours += ["#cc79a7", "#e69f00", "#7f7f7f", "#7b4a12"]
    for place, (name, results) in enumerate(cells.items()):
        colour, line = colours[place], STYLES[place % 5]["linestyle"]
        style = {"color": colour, "linestyle": line, "marker": markers[place]}
        style["label"] = name
        curves.plot(curve, results, "train_error", **style)
        for kind, fill, above in (
            ("train_error", "none", 0.2),
            ("test_error", colour, -0.2),
        ):
            points = style | {"markerfacecolor": fill}
            last = 100 * curves.last(results, kind)
            study.plot_points(errors, place - above, last, **points)
    curve.set(xlabel="epoch", ylabel="training error (%)", ylim=(0, 100))
    curves.percent_axis(errors, "x")
    errors.set(xlabel="final error (%)")
    study.name_rows(errors, names)
    figure.legend(handles=curve.lines, loc="outside upper center", ncols=5)
    curve.set_title("(a)", loc="left")
    errors.set_title("(b) training (open), test (filled)", loc="left")
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    print(curves.table(cells, ("train_error", "test_error")))
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
