"""How much each layer of a trained network changes its signal.

    python -m experiments.layer_responses [--scale=full]

TODO
"""

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure

from experiments import study
from experiments.study import STYLES, Study
from experiments.trained import trained, training
from resnet_jax import command_line

# Depth, and whether there are shortcuts.
SCALES = {
    "smoke": ((20, False), (20, True), (32, True)),
    "full": ((20, False), (56, False), (20, True), (56, True), (110, True)),
}
SEEDS = (0, 1, 2)


def config_of(scale: str, depth: int, residual: bool, seed: int) -> dict:
    """The config of a network, as JSON holds it.

    Responses start at 1, BatchNorm's first scale, and weight decay brings them down
    where the loss does not keep them up: in He's recipe by 0.1 * 1e-4 an update, in
    64,000 of them. 'smoke' has 450, so it decays a hundred times faster.
    """
    config = training(scale, depth, residual, seed)
    if scale == "smoke":
        config["optimizer"] |= {"learning_rate": 0.1, "weight_decay": 0.01}
    return config


def responses(net, variables, images) -> list[float]:
    """The standard deviation of each BatchNorm's output, in the layers' order."""

    @jax.jit
    def run(variables, images):
        deviations = []

        def record(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if isinstance(context.module, nn.BatchNorm):
                deviations.append(output.std())
            return output

        with nn.intercept_methods(record):
            net.apply(variables, images, train=False)
        return deviations

    return [float(deviation) for deviation in run(variables, images)]


def measure(config: dict) -> dict:
    """Of a trained network, on the test set."""
    run = trained(config)
    deviations = responses(run.net, run.variables, run.images)
    return {
        "test_accuracy": run.summary["test_accuracy"],
        "responses": study.numbers(deviations),
    }


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Above by layer, below sorted, as He's figure 7."""
    figure, axes = study.figure(6.4, 4.8, nrows=2)
    for (network, results), style in zip(cells.items(), STYLES, strict=False):
        samples = np.array([result["responses"] for result in results])
        layers = 1 + np.arange(samples.shape[1])
        style = style | {"label": network, "markevery": max(1, len(layers) // 10)}
        study.plot_seeds(axes[0, 0], layers, samples, **style)
        study.plot_seeds(axes[1, 0], layers, -np.sort(-samples), **style)
    for panel, title, x in (
        (axes[0, 0], "(a) in the network's order", "layer"),
        (axes[1, 0], "(b) sorted", "layers, largest response first"),
    ):
        panel.set(xlabel=x, ylabel="standard deviation", ylim=(0, None))
        panel.set_title(title, loc="left")
    axes[0, 0].legend(ncols=3)
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is not there yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = {}
    for depth, residual in SCALES[own.scale]:
        name = f"{'residual' if residual else 'plain'}-{depth}"
        cells[name] = [
            own.cell(measure, config=config_of(own.scale, depth, residual, seed))
            for seed in SEEDS
        ]
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
