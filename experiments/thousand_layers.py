"""TODO."""

from functools import partial

from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

# Version, depth, and what else `config.model` says. The paper's figure compares the two
# of 1001 layers, which have the same convolutions.
NETWORKS = {
    "v1-1202": (1, 1202, {}),
    "v1-1001, bottleneck": (1, 1001, {"block": "bottleneck", "shortcut": "B"}),
    "v2-1001": (2, 1001, {}),
}
# The paper's warm-up: 0.01 for 400 updates, then 0.1.
SCALES = {
    "smoke": {
        "examples": 1437,
        "warmup": 10,
        "steps": 30,
        "seeds": (0, 1, 2),
        "trained": (),
    },
    "full": {
        "examples": 50_000,
        "warmup": 400,
        "steps": 800,
        "seeds": (0, 1, 2),
        "trained": (0,),
    },
}


def first_steps(config: dict, network: str) -> dict:
    """Loss and gradient norm at each of the first updates."""
    rows, summary, diverged = curves.run(config)
    rows = [row for row in rows if "train_loss" in row]
    result = {
        "loss": study.numbers([row["train_loss"] for row in rows]),
        "gradient_norm": study.numbers([row["train_gradient_norm"] for row in rows]),
    }
    if diverged:
        return result | {"diverged": diverged}
    return result | {"params": summary["params"], "macs": summary["macs"]}


def training(config: dict, network: str) -> dict:
    """The curves of a whole run."""
    return curves.curves(config)


def run(study: Study) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """The first updates and, at full scale, the whole runs, by network and seed."""
    scale, first, trained = SCALES[study.scale], {}, {}
    for network, (version, depth, model) in NETWORKS.items():
        model = model | {"remat": study.scale == "full"}
        make = partial(curves.training, study.scale, version, depth, epochs=0, **model)
        configs = [beginning(make(seed=seed), scale) for seed in scale["seeds"]]
        first[network] = [
            study.cell(first_steps, config=config, network=network)
            for config in configs
        ]
        for seed in scale["trained"]:
            result = study.cell(training, config=make(seed=seed), network=network)
            trained.setdefault(network, []).append(result)
    return first, trained


def beginning(config: dict, scale: dict) -> dict:
    """A config for the first updates alone, each of which is reported."""
    warmup_epochs = scale["warmup"] * config["batch_size"] / scale["examples"]
    config["schedule"] |= {
        "name": "constant",
        "warmup_epochs": warmup_epochs,
        "warmup": "constant",
        "warmup_factor": 0.1,
    }
    return config | {"steps": scale["steps"], "steps_per_call": 1}


def draw(first: dict, trained: dict, warmup: int) -> Figure:
    """Loss and gradient norm of the first updates; below the errors of whole runs."""
    rows = 2 if trained else 1
    figure, axes = study.figure(6.0, 2.6 * rows, nrows=rows, ncols=2)
    for network, style in zip(NETWORKS, STYLES, strict=False):
        style = style | {"label": network}
        for panel, name in zip(axes[0], ("loss", "gradient_norm"), strict=True):
            shortest = min(len(result[name]) for result in first[network])
            samples = [result[name][:shortest] for result in first[network]]
            every = {"markevery": max(1, shortest // 10)}
            study.plot_seeds(panel, range(shortest), samples, **every | style)
        for panel, name in zip(axes[-1], ("train_error", "test_error"), strict=True):
            if trained:
                curves.plot(panel, trained[network], name, **style)
                panel.set(xlabel="epoch", ylabel=name.replace("_", " ") + " (%)")
    for panel, name in zip(axes[0], ("training loss", "gradient norm"), strict=True):
        panel.axvline(warmup, color="0.6", linewidth=0.8, zorder=0)
        panel.set(xlabel="update", ylabel=name, yscale="log")
    figure.legend(handles=axes[0, 0].lines[:3], loc="outside upper center", ncols=3)
    return figure


def table(first: dict, warmup: int) -> str:
    """Loss and gradient norm at the first update, the warm-up's last, and the last."""
    width = max(map(len, first))
    lines = [f"{'':<{width}}  update: loss, gradient norm (medians over seeds, ranges)"]
    for network, results in first.items():
        for step in (0, warmup - 1, -1):
            parts = []
            for name in ("loss", "gradient_norm"):
                values = sorted(
                    result[name][step]
                    for result in results
                    if "diverged" not in result or 0 <= step < len(result[name])
                )
                if values:
                    middle = values[len(values) // 2]
                    parts.append(f"{middle:.3g} ({values[0]:.3g}-{values[-1]:.3g})")
            lines.append(f"{network:<{width}}  {step:>3}: {', '.join(parts)}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    first, trained = run(own)
    warmup = SCALES[own.scale]["warmup"]
    print(table(first, warmup))
    if trained:
        print(curves.table(trained, ("train_error", "test_error")))
    own.save(draw(first, trained, warmup))


if __name__ == "__main__":
    command_line.run(main)
