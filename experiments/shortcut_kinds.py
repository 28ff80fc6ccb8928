"""TODO."""

from functools import partial

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.arrangements import SHORTCUTS, with_shortcut
from experiments.study import STYLES, Study
from resnet_jax import command_line

SCALES = {
    "smoke": {"depth": 56, "epochs": 10},
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
        for name, fill in (("train_error", "none"), ("test_error", colour)):
            last = 100 * curves.last(results, name)
            errors.plot(
                *(last, [place] * len(last)),
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
