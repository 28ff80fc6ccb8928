"""How much each layer of a trained network responds: residual ones respond little.

    python -m experiments.layer_responses [--scale=full]

Claim. He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
figure 7: the standard deviations of layer responses, after BatchNorm and before ReLU
and addition, are smaller in residual networks than in plain ones, and smaller the
deeper they are. So residual functions are closer to zero: each layer changes its signal
less.

Method. Version 1, trained; standard deviations over test images, positions and
channels. Medians over seeds, bands their range. Responses start at 1, and weight decay
takes 64,000 updates in the paper to bring them down; smoke has 450, with a decay a
hundred times as strong (0.01, rate 0.1).

Cost. Smoke: digits, nine trainings; two minutes on two cores of a shared x86 machine.

Found. As in the paper. Sorted by size, the responses of a residual network are below
those of a plain one of the same depth, most of all the large ones: the plain network's
last layer responds about twice as strongly as any residual layer. With 32 layers
instead of 20 most responses are smaller still. In the network's order one sees how: of
a residual block's two layers the second, which is added to the shortcut, ends near
0.21, and the first, which BatchNorm rescales anyway, at 0.6 of that. The smallest
responses are alike in plain and residual networks.

Numbers (smoke, seeds 0, 1, 2).
- Mean over layers: plain-20 0.23, 0.23, 0.23; residual-20 0.18, 0.18, 0.18; residual-32
  0.15, 0.15, 0.15. Medians: 0.20, 0.20, 0.21; 0.18, 0.19, 0.19; 0.15, 0.15, 0.15.
- Largest: plain-20 0.55, 0.54, 0.54; residual-20 0.24, 0.25, 0.26; residual-32 0.31,
  0.29, 0.29; of both residual ones it is the stem. Smallest: 0.11; 0.10; 0.10.
- Residual-20, medians of the second layers of blocks 0.22, 0.21, 0.21, of the first
  ones 0.12, 0.13, 0.13.
- Test accuracy: 97.5 to 98.9%; 98.9 to 99.4%; 98.3 to 98.9%.
- With the usual decay of 1e-4 at rate 0.02 all responses were still 1.0 to 1.2 after
  450 updates (not stored), and nothing could be seen.
"""

import flax.linen as nn
import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments import study, trained
from experiments.study import STYLES, Study
from resnet_jax import command_line

# Depth, and whether there are shortcuts.
SCALES = {
    "smoke": ((20, False), (20, True), (32, True)),
    "full": ((20, False), (56, False), (20, True), (56, True), (110, True)),
}


def run_config(scale: str, depth: int, residual: bool) -> dict:
    """The config of a network, as JSON holds it.

    Responses start at 1, BatchNorm's initial scale, and weight decay brings them down
    where the loss does not keep them up: in He's recipe by 0.1 * 1e-4 per update, over
    64,000 of them. 'smoke' has 450, so it decays a hundred times faster.
    """
    config = trained.run_config(scale, depth, residual)
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
    """The responses and the accuracy of a trained network on the test set."""
    subject = trained.subject(config)
    deviations = responses(subject.net, subject.variables, subject.images)
    return {
        **subject.made_by,
        "test_accuracy": subject.summary["test_accuracy"],
        "responses": study.numbers(deviations),
    }


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Responses by layer above, sorted below, like He's figure 7."""
    figure, axes = study.figure(6.4, 4.8, nrows=2)
    for (network, results), style in zip(cells.items(), STYLES, strict=False):
        samples = np.array([result["responses"] for result in results])
        layers = 1 + np.arange(samples.shape[1])
        style = style | {"label": network, "markevery": max(1, len(layers) // 10)}
        study.plot_seeds(axes[0, 0], layers, samples, **style)
        study.plot_seeds(axes[1, 0], layers, -np.sort(-samples), **style)
    for panel, title, x in (
        (axes[0, 0], "(a) in network order", "layer"),
        (axes[1, 0], "(b) sorted", "layers, largest response first"),
    ):
        panel.set(xlabel=x, ylabel="standard deviation", ylim=(0, None))
        panel.set_title(title, loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].legend(ncols=3)
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = {}
    for depth, residual in SCALES[experiment.scale]:
        name = f"{'residual' if residual else 'plain'}-{depth}"
        config = run_config(experiment.scale, depth, residual)
        cells[name] = experiment.seeds(measure, config)
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
