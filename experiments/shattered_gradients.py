"""Gradients of deep plain networks look like white noise; shortcuts keep them smooth.

    python -m experiments.shattered_gradients [--scale=full]

Claim. Balduzzi et al. 2017, "The Shattered Gradients Problem", arXiv 1702.08591: the
correlation of a network's input gradients at two inputs decays as 1 / 2^L in plain
networks of L layers, but as 1 / sqrt(L) in residual ones with BatchNorm.

Method. The paper's: fully connected networks at initialisation, 200 neurons per layer.
(a) to (c): autocorrelation of the gradient at 256 points on a line, means over seeds;
grey is the 95% range of white noise for one seed, darker grey for the mean.
(d): correlation at 256 unrelated inputs; dotted lines are the paper's formulas, solid
ones the same with the variance about the mean (`predicted`). Error bars are two
standard errors. Below 1e-3 there is only noise.

Cost. Smoke, which is the paper's setting: two minutes on two cores of a shared x86
machine.

Found. In a plain network each layer halves the correlation of the gradients at two
inputs, exactly as the paper says: after 24 layers they are unrelated even at
neighbouring points, so that a step that helps one point says nothing about the next.
With shortcuts and BatchNorm the correlation falls by a power of the depth, and some is
left after 100 layers; but the exponent is about -0.73, a faster decay than the paper's
-0.5. The paper's formula lets each block add 1 to the variance that the next BatchNorm
divides by. But a ReLU's outputs have a nonzero mean, which BatchNorm subtracts, so a
block adds only 1 - 1 / pi = 0.68. That correction is ours; a test checks it against a
network written out by hand. With it the formula is within a tenth of the measurements
at all depths.

Numbers (smoke, means over seeds 0 to 19).
- Plain: correlation 0.497, 0.250, 0.061, 0.0013 at 1, 2, 4, 10 layers; 1 / 2^L is 0.5,
  0.25, 0.063, 0.0010; from 24 on it cannot be told from zero. On the line, two
  neighbours still have 0.99 at one layer, 0.47 at 10 and -0.03 at 24.
- Residual with BatchNorm: 0.74, 0.45, 0.27, 0.16, 0.087, 0.053 at 1, 4, 10, 24, 50,
  100; the paper's formula gives 0.75, 0.49, 0.34, 0.22, 0.16, 0.11, the corrected one
  0.75, 0.46, 0.28, 0.16, 0.094, 0.057. Neighbours on the line have 0.71 at 50 layers,
  0.90 at beta 0.1.
- Residual without BatchNorm: 0.37, 0.15, 0.041 at 4, 10, 24, above the paper's (3/4)^L
  (0.32, 0.056, 0.001), since activations of unrelated inputs become alike with depth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from experiments import study
from experiments.study import STYLES, Study
from resnet_jax import command_line

POINTS = 256
LAGS = 16
# Whether there are shortcuts, whether there is BatchNorm, and beta.
NETWORKS = {
    "plain, BN": (False, True, 1.0),
    "residual, BN": (True, True, 1.0),
    "residual, BN, $\\beta=0.1$": (True, True, 0.1),
    "residual, no BN": (True, False, 1.0),
}
# Smoke is the paper's setting.
SCALES = {
    "smoke": {"width": 200, "depths": (1, 2, 4, 10, 24, 50, 100), "seeds": 20},
    "full": {"width": 1000, "depths": (1, 2, 4, 10, 24, 50, 100, 200), "seeds": 100},
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def input_gradients(residual: bool, norm: bool, beta, depth: int, width: int, x, seed):
    """The gradients [points, inputs] of a fully connected network's scalar output.

    `depth` layers: h -> W relu(h), or h + beta W relu(h); He's initialisation, no bias.
    With `norm` a ReLU's input is normalised over all points; its statistics count as
    constants.
    """
    keys = jax.random.split(jax.random.key(seed), 3)
    first = jax.random.normal(keys[0], (x.shape[1], width)) / x.shape[1] ** 0.5
    hidden = jax.random.normal(keys[1], (depth, width, width)) * (2 / width) ** 0.5
    last = jax.random.normal(keys[2], (width,)) / width**0.5

    def layer(h, kernel):
        z = h
        if norm:
            mean, deviation = lax.stop_gradient((h.mean(0), h.std(0)))
            z = (h - mean) / (deviation + 1e-6)
        branch = jax.nn.relu(z) @ kernel
        return h + beta * branch if residual else branch, None

    def output(x):
        return (lax.scan(layer, x @ first, hidden)[0] @ last).sum()

    return jax.grad(output)(x)


def autocorrelation(series: np.ndarray) -> np.ndarray:
    """The autocorrelation of a series [points], at lags 0 to LAGS."""
    centred = series - series.mean()
    products = [centred[lag:] @ centred[: POINTS - lag] for lag in range(LAGS + 1)]
    return np.array(products) / products[0]


def mean_correlation(gradients: np.ndarray) -> float:
    """Mean inner product of two points' gradients, over that of a point with itself."""
    points = len(gradients)
    squares = (gradients**2).sum()
    return float(((gradients.sum(0) ** 2).sum() - squares) / (points - 1) / squares)


def measure(residual, norm, beta, depth, width, seeds) -> dict:
    """Autocorrelation on a line of inputs, and correlation at random ones, by seed."""
    line = jnp.linspace(-2, 2, POINTS)[:, None]
    autocorrelations, correlations = [], []
    for seed in seeds:
        shape = (residual, norm, beta, depth, width)
        on_line = np.asarray(input_gradients(*shape, line, seed), np.float64)
        draws = jax.random.normal(jax.random.key(1000 + seed), (POINTS, width))
        at_draws = np.asarray(input_gradients(*shape, draws, seed), np.float64)
        autocorrelations.append(autocorrelation(on_line[:, 0]))
        correlations.append(mean_correlation(at_draws))
    return {
        "autocorrelation": study.numbers(autocorrelations),
        "correlation": study.numbers(correlations),
    }


def predicted(residual: bool, norm: bool, beta: float, depth: int, centred=True):
    """Correlation of the gradients at two unrelated inputs, for many neurons.

    A ReLU is active for one input in half of all cases, for both in a quarter. So a
    branch that adds b to the gradient's variance adds b / 2 to the covariance: plain
    networks have 1 / 2^L, residual ones the product of (1 + b / 2) / (1 + b), which is
    (3 / 4)^L without BatchNorm. With it b is beta^2 over the variance of what the
    branch reads. The paper lets that grow by beta^2 per layer: about 1 / sqrt(L).
    `centred` leaves out, as BatchNorm does, the mean over the inputs: a ReLU's outputs
    have one, and the variance about it is 1 - 1 / pi of their mean square, so that
    the exponent is -1 / (2 (1 - 1 / pi)) = -0.73.
    """
    if not residual:
        return 0.5**depth
    grown = beta**2 * np.arange(depth) * (1 - centred / np.pi)
    branch = beta**2 / (1 + norm * grown)
    return float(np.prod((1 + branch / 2) / (1 + branch)))


def _mean_and_error(samples) -> tuple[np.ndarray, np.ndarray]:
    """The mean over seeds, and twice its standard error."""
    error = np.std(samples, 0, ddof=1) / len(samples) ** 0.5
    return np.mean(samples, 0), 2 * error


def draw(cells: dict[str, list[dict]], depths: tuple[int, ...]) -> Figure:
    """Autocorrelation of three networks, and correlation against depth of all."""
    figure, axes = study.figure(6.4, 5.0, nrows=2, ncols=2)
    shown = [depth for depth in (2, 4, 10, 24, 50) if depth in depths]
    for panel, letter, network in zip(axes.flat, "abc", NETWORKS, strict=False):
        for depth, style in zip(shown, STYLES, strict=False):
            samples = cells[network][depths.index(depth)]["autocorrelation"]
            style = style | {
                "label": f"{depth} layers",
                "errorevery": 2,
                "markevery": 2,
            }
            panel.errorbar(range(LAGS + 1), *_mean_and_error(samples), **style)
        noise = 1.96 / POINTS**0.5
        for range_, grey in ((noise, "0.9"), (noise / len(samples) ** 0.5, "0.75")):
            panel.axhspan(-range_, range_, color=grey, zorder=0)
        panel.set(xlabel=f"lag (of {POINTS} points)", ylabel="autocorrelation")
        panel.set(ylim=(-0.4, 1.05))
        panel.set_title(f"({letter}) {network}", loc="left")
    axes[1, 0].legend(fontsize=7, loc="lower left", ncols=3)
    panel = axes[1, 1]
    fine = np.unique(np.geomspace(1, depths[-1]).astype(int))
    for (network, settings), style in zip(NETWORKS.items(), STYLES, strict=False):
        samples = np.transpose([cell["correlation"] for cell in cells[network]])
        style = style | {"linestyle": "none", "label": network}
        panel.errorbar(depths, *_mean_and_error(samples), capsize=2, **style)
        theory = [predicted(*settings, depth) for depth in fine]
        panel.plot(fine, theory, color=style["color"], linewidth=0.8)
        paper = [predicted(*settings, depth, centred=False) for depth in fine]
        panel.plot(fine, paper, color=style["color"], linewidth=0.8, linestyle=":")
    panel.set(xscale="log", yscale="log", ylim=(5e-5, 1.5))
    panel.set(xlabel="layers", ylabel="gradient correlation")
    panel.set_title("(d) unrelated inputs", loc="left")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.legend(fontsize=7, loc="lower left", handletextpad=0)
    return figure


def main(argv: list[str]) -> None:
    """Measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    scale = SCALES[experiment.scale]
    cells = {
        network: [
            experiment.cell(
                measure,
                residual=residual,
                norm=norm,
                beta=beta,
                depth=depth,
                width=scale["width"],
                seeds=list(range(scale["seeds"])),
            )
            for depth in scale["depths"]
        ]
        for network, (residual, norm, beta) in NETWORKS.items()
    }
    experiment.save(draw(cells, scale["depths"]))


if __name__ == "__main__":
    command_line.run(main)
