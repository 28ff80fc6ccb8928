"""A thousand layers: how versions 1 and 2 differ in their first updates.

    python -m experiments.thousand_layers [--scale=full]

Claim. With a thousand layers the order of the layers is decisive: the training loss of
the original residual network falls slowly at first, that of the pre-activation one at
once, and its error ends far lower, 4.92 against 7.61 percent (He et al. 2016, arXiv
1603.05027, section 4.2, figure 1 and table 3). With 1202 layers of basic blocks the
original ends worse than with 110, at 7.93 percent (He et al. 2015, arXiv 1512.03385,
table 6).

Method. Version 1 with basic blocks, version 1 with bottlenecks, which differs from
version 2 only in the order of its layers and in shortcuts, and version 2. First updates
are those of the deepest networks (1202, 1001 and 1001 layers), from initialisation, at
a constant rate; the loss and the norm of the whole gradient are of augmented images,
before each update (full: means over ten).

Cost. Smoke: digits, width 8, rate 0.1; 20 updates of 32 images for the deepest, five
epochs for 218 layers; eight minutes from scratch on two cores of a shared x86 machine.
Full: CIFAR-10, 400 updates at 0.01 as the paper's warm-up, and the paper's recipe for
the deepest, 18 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets):
- Partly as the paper says. Before the first update version 2 has the loss of a guess,
  2.31 (2.24-2.37; ln 10 is 2.30), version 1 has 11 (9-19) with basic blocks and 6.4
  (5.7-7.8) with bottlenecks. In both versions BatchNorm keeps each branch at the same
  size, and the sum grows from block to block (`gradient_flow`), but version 2 has a
  final BatchNorm before the classifier.
- The first update, at ten times the paper's rate for it, throws version 1 to losses of
  218 (151-274) and 199 (122-378). Later ones take it to as much as a million with basic
  blocks, and 526 (462-641) with bottlenecks, and the rest of the 20 is spent on getting
  back to the loss of a guess: with bottlenecks 2.31 (2.31-2.38); with basic blocks two
  seeds have 2.2 and 4.0, one 66,000. Version 2 stays between 1.9 and 2.6 and ends at
  2.08 (1.97-2.16), a change little larger than the differences between its batches.
- The norm of the whole gradient is large in all before the first update, 402 (297-478),
  2.9 (2.4-3.2) million and 4394 (3952-4916): as a whole it does not vanish.
- 218 layers, five epochs: training error 86 (81-90) and 87 (78-88) percent for
  version 1, 26 (19-39) for version 2, test error 86 (81-93), 89 (77-90), 18 (14-36).
  In so few epochs version 1 learns next to nothing, in any seed. Whether it would also
  end worse, as in the paper, only the full scale can show.
"""

import numpy as np
from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

# Version, the deepest that the papers train, and other fields of `config.model`.
NETWORKS = {
    "v1, basic": (1, 1202, {}),
    "v1, bottleneck": (1, 1001, {"block": "bottleneck", "shortcut": "B"}),
    "v2": (2, 1001, {}),
}
SCALES = {
    "smoke": {
        "updates": {"batch_size": 32, "steps": 20, "steps_per_call": 1},
        "learning_rate": 0.1,
        "depth": 218,  # of those that are trained; 0: the deepest
        "epochs": 5,
        "model": {},
    },
    "full": {
        "updates": {"steps": 400, "steps_per_call": 10},
        "learning_rate": 0.01,
        "depth": 0,
        "epochs": 0,
        "model": {"remat": True},
    },
}


def first_updates(config: dict) -> dict:
    """'loss' and 'gradient_norm', means over each call, by its last 'update'."""
    run = curves.run(config)
    rows = [row for row in run.rows if "train_loss" in row]
    return {
        "update": [row["step"] for row in rows],
        "loss": study.numbers([row["train_loss"] for row in rows]),
        "gradient_norm": study.numbers([row["train_gradient_norm"] for row in rows]),
        **(curves.made_by(run.summary) if run.summary else {}),
    }


def run(experiment: Study) -> dict[str, dict[str, list[dict]]]:
    """Results of the 'first' updates and the 'trained', by network, for each seed."""
    scale, cells = SCALES[experiment.scale], {"first": {}, "trained": {}}
    for network, (version, deepest, model) in NETWORKS.items():
        model = model | scale["model"]
        config = curves.run_config(
            experiment.scale, version, deepest, scale["epochs"], **model
        )
        config |= scale["updates"]
        config["optimizer"]["learning_rate"] = scale["learning_rate"]
        config["schedule"] |= {"name": "constant", "warmup_epochs": 0.0}
        cells["first"][network] = experiment.seeds(first_updates, config)
    for network, (version, deepest, model) in NETWORKS.items():
        depth, model = scale["depth"] or deepest, model | scale["model"]
        config = curves.run_config(
            experiment.scale, version, depth, scale["epochs"], **model
        )
        cells["trained"][network] = experiment.seeds(curves.curves, config)
    return cells


def draw(cells: dict[str, dict[str, list[dict]]], depth: int) -> Figure:
    """Loss and gradient of the first updates above; errors by epoch below."""
    figure, axes = study.figure(6.0, 4.4, nrows=2, ncols=2)
    for (network, (_, deepest, _)), style in zip(
        NETWORKS.items(), STYLES, strict=False
    ):
        first, trained = cells["first"][network], cells["trained"][network]
        style = style | {"label": f"{network} (first updates: {deepest} layers)"}
        shared = min(len(result["update"]) for result in first)
        for panel, name in zip(axes[0], ("loss", "gradient_norm"), strict=True):
            samples = np.array([result[name][:shared] for result in first], float)
            study.plot_seeds(panel, first[0]["update"][:shared], samples, **style)
        for panel, name in zip(axes[1], ("train_error", "test_error"), strict=True):
            curves.plot(panel, trained, name, **style)
    axes[0, 0].set(ylabel="training loss", yscale="log")
    axes[0, 0].set_ylim(bottom=1)
    guess = axes[0, 0].axhline(np.log(10), color="0.6", linestyle=":", label="chance")
    axes[0, 1].set(ylabel="gradient norm", yscale="log")
    axes[1, 0].set(ylabel="training error (%)", ylim=(0, 100))
    axes[1, 1].set(ylabel="test error (%)", ylim=(0, 100))
    below = f"{depth} layers" if depth else "trained"
    titles = ("first updates", "first updates", below, below)
    for panel, letter, title in zip(axes.flat, "abcd", titles, strict=True):
        panel.set_xlabel("update" if letter in "ab" else "epoch")
        panel.set_title(f"({letter}) {title}", loc="left")
    lines = [line for line in axes[0, 0].lines if line is not guess]
    figure.legend(handles=[*lines, guess], loc="outside upper center", ncols=1)
    return figure


def table(first: dict[str, list[dict]]) -> str:
    """The first, highest and last losses of each seed, as text."""
    width = max(map(len, first))
    lines = [f"{'':<{width}} {'first':>10} {'highest':>10} {'last':>10}"]
    for network, results in first.items():
        for losses in (np.array(result["loss"], float) for result in results):
            if not len(losses):
                lines.append(f"{network:<{width}} {'diverged':>10}")
                continue
            values = (losses[0], np.nanmax(losses), losses[-1])
            shown = " ".join(f"{value:10.4g}" for value in values)
            lines.append(f"{network:<{width}} {shown}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    print(table(cells["first"]))
    print(curves.table(cells["trained"], ("train_error", "test_error")))
    experiment.save(draw(cells, SCALES[experiment.scale]["depth"]))


if __name__ == "__main__":
    command_line.run(main)
