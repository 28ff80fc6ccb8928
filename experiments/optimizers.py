"""SGD against adaptive optimizers, with learning rates tuned alike.

    python -m experiments.optimizers [--scale=full]

Claim. Adaptive methods are often faster at first and generalise worse than SGD (Wilson
et al. 2017, arXiv 1705.08292); but much of what is said about them comes from unequal
tuning (Choi et al. 2019, arXiv 1910.05446), and the residual networks' own recipe is
SGD with momentum.

Method. Every optimizer gets the same number of learning rates, on a logarithmic grid
from a tenth to a hundred times its usual one. Seed 0 trains with each of them on a part
of the training set; the optimizer gets the rate with the lowest error on the rest of it
(in a tie, the lowest loss there), and three seeds at that rate are reported on the test
set, which plays no part in choosing. Weight decay is part of the gradient except for
AdamW and Lion, whose decoupled decay is such that at the usual rate an update takes as
much off a weight as SGD's. RMSprop has SGD's momentum of 0.9, which makes its steps up
to ten times as long as its rate suggests; Adam's momentum does not.

Cost. Smoke: digits, 8 and 11 layers of width 8, ten epochs, four optimizers, 72 runs;
six minutes from scratch on two cores of a shared x86 machine. Full: CIFAR-10, 56
layers, the paper's 164 epochs, all eight, 144 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; final test error, percent):
- v1: SGD 2.8 (2.2-3.1), Adam 3.3 (2.8-3.6), AdamW 3.3 (1.9-3.6), RMSprop 2.8 (1.9-3.1).
  v2: 2.8 (1.9-4.4), 4.2 (4.2-5.6), 2.8 (2.8-3.9), 3.3 (2.2-4.2). The ranges overlap
  except for Adam's and AdamW's in v2, which did overlap in an earlier measurement of
  the same seeds.
- So with equal tuning no difference shows: three seeds and 360 test images, of which
  one is 0.3 points, would not show one of less than about a point.
- As Wilson et al. say, the adaptive methods begin faster: after the first epoch all
  three have lower training errors than SGD in every seed, in v1 (56-64 against 70-71)
  and in v2 (65-76 against 76-77). In v1 SGD is ahead by the fifth, in every seed
  (7.1-7.6 against 8.7-12.4); at the end none is.
- The largest difference is the cost of an untuned rate. At its usual rate, 0.001, Adam
  has not finished learning: its validation errors are 15 and 19, where SGD's are 2.1
  and 3.1 at 0.1. RMSprop, whose usual rate is the same, has, thanks to its momentum:
  its errors at a given rate are about Adam's at ten times that rate. Adam's and AdamW's
  best rates are 10 to 100 times the usual one. That is the end of the grid, where the
  errors are flat: from 0.01 to 0.1 they are 2.1 to 4.9, and which of these rates one
  seed and 287 images choose is chance (an earlier measurement chose others). SGD's best
  rates are 3 times the usual one, and at 32 times its errors are 9 and 31.
"""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments import curves, study
from experiments.study import STYLES, Study, numbers
from resnet_jax import command_line

# The usual rate, and other fields of `config.optimizer`. SGD's weight decay, 1e-4,
# takes 1e-5 of a weight in an update at its usual rate.
OPTIMIZERS = {
    "sgd": (0.1, {"nesterov": True}),
    "adam": (1e-3, {"nesterov": False}),
    "adamw": (1e-3, {"nesterov": False, "weight_decay": 1e-2}),
    "rmsprop": (1e-3, {"nesterov": False}),
    "lion": (1e-4, {"weight_decay": 0.1}),
    "adagrad": (1e-2, {}),
    "adadelta": (1.0, {}),
    "lars": (10.0, {"nesterov": False}),
}
SPLITS = {
    "smoke": {"train_split": "train[:80%]", "validation_split": "train[80%:]"},
    "full": {"train_split": "train[:90%]", "validation_split": "train[90%:]"},
}
SCALES = {
    "smoke": {
        "names": ("sgd", "adam", "adamw", "rmsprop"),
        "factors": (0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0),
        "networks": ((1, 8), (2, 11)),
        "epochs": 10,
    },
    "full": {
        "names": tuple(OPTIMIZERS),
        "factors": (0.1, 0.316, 1.0, 3.16, 10.0, 31.6, 100.0),
        "networks": ((1, 56), (2, 56)),
        "epochs": 0,
    },
}


def best(results: dict[float, dict]) -> float:
    """The learning rate with the lowest final error, then loss, on the validation set.

    A run that diverged is worse than any other.
    """

    def key(rate: float) -> tuple:
        result = results[rate]
        if "diverged" in result:
            return True, 0, 0
        loss = result["validation_loss"][-1]
        loss = np.inf if loss is None else loss
        return False, result["validation_error"][-1], loss

    return min(results, key=key)


def run(experiment: Study) -> dict[tuple, dict]:
    """By network and optimizer: 'tuning' by rate, 'rate', and its 'results' by seed."""
    scale, cells = SCALES[experiment.scale], {}

    def run_config(version: int, depth: int, name: str, rate: float) -> dict:
        config = curves.run_config(experiment.scale, version, depth, scale["epochs"])
        config["dataset"] |= SPLITS[experiment.scale]
        more = {"name": name, "learning_rate": rate}
        config["optimizer"] |= OPTIMIZERS[name][1] | more
        return config

    for network, name in itertools.product(scale["networks"], scale["names"]):
        usual, _ = OPTIMIZERS[name]
        rates = [numbers(usual * factor) for factor in scale["factors"]]
        configs = {rate: run_config(*network, name, rate) for rate in rates}
        first = {"seed": study.SEEDS[0]}
        tuning = {
            rate: experiment.cell(curves.curves, config=config | first)
            for rate, config in configs.items()
        }
        rate = best(tuning)
        results = experiment.seeds(curves.curves, configs[rate])
        cells["v{}-{}".format(*network), name] = {
            "tuning": tuning,
            "rate": rate,
            "results": results,
        }
    return cells


def draw(cells: dict[tuple, dict], factors: tuple[float, ...]) -> Figure:
    """A row a network: tuning, curves at the chosen rate, and final test errors."""
    networks = list(dict.fromkeys(network for network, _ in cells))
    names = list(dict.fromkeys(name for _, name in cells))
    rows, ticks = len(networks), (1, 2, 5, 10, 20, 50, 100)
    figure, axes = study.figure(7.2, 0.5 + 2.2 * rows, nrows=rows, ncols=3)
    for network, row in zip(networks, axes, strict=True):
        tuned, curve, errors = row
        for place, name in enumerate(names):
            cell, style = cells[network, name], look(place)
            tuning = 100 * np.array(
                [
                    curves.last([result], "validation_error")[0]
                    for result in cell["tuning"].values()
                ]
            )
            tuned.plot(factors, tuning, **style)
            chosen = list(cell["tuning"]).index(cell["rate"])
            tuned.plot(
                factors[chosen],
                tuning[chosen],
                **style | {"markersize": 8, "markerfacecolor": "none"},
            )
            curves.plot(curve, cell["results"], "train_error", **style, label=name)
            last = 100 * curves.last(cell["results"], "test_error")
            study.plot_points(errors, place, last, **style)
        tuned.set(xscale="log", xlabel="learning rate / default")
        tuned.set_ylabel("final validation error (%)")
        curve.set(xlabel="epoch", ylabel="training error (%)")
        curve.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for panel in (tuned, curve):
            panel.set_yscale("log")
            panel.set_yticks(ticks, ticks, minor=False)
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_ylim(1, 100)
        errors.set(xlabel="final test error (%)", xlim=(0, None))
        chosen = [f"{name} {cells[network, name]['rate']:g}" for name in names]
        study.name_rows(errors, chosen)
        titles = ("tuning, seed 0", "chosen rate", "chosen rate")
        for panel, title in zip(row, titles, strict=True):
            panel.set_title(f"{network}: {title}", loc="left")
    lines = axes[0, 1].lines
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines))
    return figure


def look(place: int) -> dict:
    """The style of the optimizer at one of eight places."""
    more = STYLES[place % len(STYLES)]
    return more | {"marker": "os^vDPX*"[place]}


def table(cells: dict[tuple, dict]) -> str:
    """The chosen rates and the final errors, as text."""
    named = {
        f"{network} {name}, rate {cell['rate']:g}": cell["results"]
        for (network, name), cell in cells.items()
    }
    names = ("train_error", "validation_error", "test_error")
    return curves.table(named, names)


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    print(table(cells))
    experiment.save(draw(cells, SCALES[experiment.scale]["factors"]))


if __name__ == "__main__":
    command_line.run(main)
