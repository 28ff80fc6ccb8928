"""Where gradients vanish and explode, layer by layer, and what the shortcut changes.

    python -m experiments.gradient_flow [--scale=full]

Claim. At initialisation, gradients through a plain network shrink or grow geometrically
with depth: without BatchNorm at a rate set by the kernels' initial scale (He et al.
2015, arXiv 1502.01852); with it they always grow, by a factor of about sqrt(pi / (pi -
1)) = 1.21 per layer (Yang et al. 2019, arXiv 1902.08129). Shortcuts with BatchNorm turn
that into a power law.

Method. Norms, over a batch of 32, of the loss's gradient with respect to each block's
input; the growth of the norm's logarithm per layer, fitted within the stages (0.1 is a
factor of 1.1). Then SGD updates at rate 0.01. Lines are medians over seeds, bands their
range; grey lines in (g) are theory (`predicted_growth`). Where bottleneck networks have
1001 layers, those of basic blocks and plain ones have 1202 (*). Values outside the
range of float32 are not drawn, and a note says so.

Cost. Smoke: digits at 16x16 pixels, five minutes on two cores of a shared x86 machine.

Found. A plain network of 56 layers without BatchNorm multiplies its gradient by nearly
the same factor in each layer of a stage, about the one that theory gives for that
stage's image size: it vanishes or explodes unless the initial scale is just right.
BatchNorm replaces that with growth that does not depend on the scale, a factor of
10,000 over 56 layers. Shortcuts alone are no cure, contrary to what is often said:
without BatchNorm each block adds its branch's variance to its input's, so that at the
usual scale a residual network's gradients grow geometrically too, and faster than a
plain network's shrink; only where the branch starts small (scale 0.5) do they keep
their size. It takes shortcuts together with BatchNorm: the branch's share of the sum
then falls from block to block, and the gradient follows a power law in the layer
number, at 1001 layers too.

Numbers (smoke, ranges over seeds 0, 1, 2).
- Plain, no BN, depth 56: growth per layer -0.80 to -0.79, -0.43 to -0.40, -0.085 to
  -0.056, 0.26 to 0.29 at initial scales 0.5, 0.71, 1, 1.41; predicted -0.76, -0.41,
  -0.063, 0.28. So He's scale of 1, which a plain network needs, still loses a little to
  the padding; at depth 1202 none of the gradient is left in float32.
- Shortcuts, no BN, depth 56, the same scales: v2 0.002, 0.016, 0.10 to 0.11, 0.34;
  predicted 0.002, 0.018, 0.105, 0.345. v1 0.00, 0.03 to 0.05, 0.14 to 0.17, 0.35 to
  0.38; predicted -0.01, 0.02, 0.13, 0.36, which is up to 0.03 low, since it assumes the
  ReLUs after the sums to be active independently of each other. At scale 1 and 1001
  layers both leave the range of float32, and v1-56 diverges within two updates.
- Plain, BN: 0.158 to 0.168 at depth 56, 0.135 to 0.150 at 1202 (mean-field: 0.19).
  The first block's gradient is 7,800 to 12,300 times the last one's at depth 56.
- Shortcuts, BN: growth falls with depth, v1 0.12, 0.060, 0.034, 0.004 at 20, 56, 110,
  1202; v2 0.14, 0.092, 0.062, 0.011 at 20, 56, 110, 1001 (medians). Within the first
  stage of the deepest, the gradient goes as layer^-1.1 to -1.2 in v1 and layer^-1.4 in
  v2.
- Training: within 20 updates plain-56 with BN brings its growth from 0.16 down to
  between 0.00 and 0.04; the residual ones, at 0.05 (v1) and 0.09 (v2), change little.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from configs import common
from experiments import study
from experiments.blockwise import NETWORKS, passes, split
from experiments.study import STYLES, Study
from resnet_jax import command_line, data, models
from resnet_jax.augment import normalize, statistics

BATCH = 32
SCALES = {
    "smoke": {
        "dataset": {"name": "digits", "image_size": 16},
        "depths": (20, 56, 110, 1001),
        "initial_scales": (0.5, 0.71, 1.41),
        "steps": (0, 1, 2, 5, 10, 20),
    },
    "full": {
        "dataset": {"name": "cifar10", "image_size": 32},
        "depths": (20, 56, 110, 164, 1001),
        "initial_scales": (0.25, 0.5, 0.71, 0.84, 1.19, 1.41, 2.0),
        "steps": (0, 1, 2, 5, 10, 20, 50, 100, 200, 500),
    },
}
# Depths that fit bottlenecks, of which not all fit basic blocks.
NEAREST_BASIC = {164: 164, 1001: 1202}


def depth_of(network: str, depth: int) -> int:
    """The depth itself, or the nearest that fits the network's blocks."""
    return depth if network == "v2" else NEAREST_BASIC.get(depth, depth)


def measure(dataset, network, norm, depth, initial_scale, steps, seed) -> dict:
    """The records of `passes` after each number of SGD updates in `steps`.

    `initial_scale` multiplies the initial kernels of all convolutions.
    """
    config = common.default()
    config.dataset.update(dataset)
    train = data.load(config.dataset).train
    images = jnp.asarray(train.images)
    images = np.asarray(normalize(images, *statistics("mean_std", train.images)))
    model, _ = NETWORKS[network]
    net = models.resnet(depth=depth, num_classes=10, scan=True, **model)
    variables = models.initialize(net, jax.random.key(seed), images.shape[1:])
    variables = jax.tree.map(
        lambda leaf: leaf * initial_scale if leaf.ndim >= 4 else leaf,
        models.unstack(variables),
    )
    variables = split(variables)
    tx = optax.sgd(0.01, momentum=0.9)
    opt_state, records = tx.init(variables), []

    @jax.jit
    def update(gradients, opt_state, variables):
        updates, opt_state = tx.update(gradients, opt_state)
        return optax.apply_updates(variables, updates), opt_state

    rng = np.random.default_rng(seed)
    for step in range(max(steps) + 1):
        chosen = rng.choice(len(images), BATCH, replace=False)
        gradients, record = passes(
            network, norm, variables, images[chosen], train.labels[chosen]
        )
        if step in steps:
            records.append(record)
        if step < max(steps):
            variables, opt_state = update(gradients, opt_state, variables)
    return {name: [record[name] for record in records] for name in records[0]}


def growth(network: str, gradients: list) -> float:
    """The growth of the gradient's logarithm per layer, from the output to the input.

    Least squares over the blocks' outputs, with an intercept for each stage; values
    outside the range of float32 do not count; NaN if none is left.
    """
    _, layers = NETWORKS[network]
    covariance = variance = 0.0
    for norms in np.array(gradients[1:], float).reshape(3, -1):
        inside = norms > np.finfo(np.float32).tiny
        places, logs = layers * np.flatnonzero(inside), np.log(norms[inside])
        if len(places) > 1:
            covariance += np.cov(places, logs, bias=True)[0, 1] * len(places)
            variance += np.var(places) * len(places)
    return float(-covariance / variance) if variance else np.nan


def predicted_growth(network: str, initial_scale: float, image_size: int) -> float:
    """`growth` without BatchNorm, for many channels and layers.

    A ReLU halves the gradient's square and He's initialisation doubles it, so that a
    plain layer multiplies the gradient's norm by the initial scale. A 3x3 convolution
    loses what falls on the padding of images of that size: it keeps the largest
    eigenvalue of the mean of three neighbours, (1 + 2 cos(pi / (size + 1))) / 3.
    A shortcut adds 1 to the square of what the branch multiplies the norm by. In v2
    that is all. In v1 the branch doubles the square once more, having one ReLU
    for two convolutions, and the ReLU after the sum takes a part away.
    """
    sizes = image_size / np.array([1, 2, 4])
    kept = np.exp(np.log((1 + 2 * np.cos(np.pi / (sizes + 1))) / 3).mean())
    if network == "plain":
        return float(np.log(initial_scale * kept))
    if network == "v2":
        branch = initial_scale**6 * kept**2
        return float(np.log(1 + branch) / 2 / 3)
    branch = 2 * initial_scale**4 * kept**4
    return float(np.log((1 + branch) * _active(branch)) / 2 / 2)


def _active(branch: float) -> float:
    """The fraction of v1's ReLUs after a sum that are active, deep in the network.

    A branch gives normal values with a mean square of `branch` times the input's.
    """
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(100_000))
    for _ in range(50):
        y = x + np.sqrt(branch * (x**2).mean()) * rng.standard_normal(x.size)
        x = np.maximum(y, 0) / y.std()
    return (y > 0).mean()


def run(experiment: Study) -> dict[tuple, list[dict]]:
    """All cells, a value for each seed.

    The keys are network, norm, depth, initial scale and whether it was trained.
    """
    scale, cells = SCALES[experiment.scale], {}
    depths, initial_scales = scale["depths"], scale["initial_scales"]
    choices = [
        *((norm, depth, 1.0, False) for norm in (True, False) for depth in depths),
        # BatchNorm cancels a kernel's scale.
        *((False, depths[1], factor, False) for factor in initial_scales),
        *((norm, depths[1], 1.0, True) for norm in (True, False)),
    ]
    for network, choice in itertools.product(NETWORKS, choices):
        norm, depth, initial_scale, trained = choice
        cells[network, *choice] = [
            experiment.cell(
                measure,
                dataset=scale["dataset"],
                network=network,
                norm=norm,
                depth=depth_of(network, depth),
                initial_scale=initial_scale,
                steps=list(scale["steps"]) if trained else [0],
                seed=seed,
            )
            for seed in study.SEEDS
        ]
    return cells


def draw(cells: dict[tuple, list[dict]], scale: dict) -> Figure:
    """A row with BatchNorm, one without, and one of what changes the growth."""
    figure, axes = study.figure(7.2, 6.4, nrows=3, ncols=3)
    depths, middle, deepest = scale["depths"], scale["depths"][1], scale["depths"][-1]
    factors = np.sort([1.0, *scale["initial_scales"]])

    def growths(*key) -> list[list[float]]:
        """By seed and step."""
        return [
            [growth(key[0], gradients) for gradients in cell["gradients"]]
            for cell in cells[key]
        ]

    def profile(panel, name: str, *key, **style) -> None:
        """Draws a quantity by layer, before the first update."""
        samples = np.array([cell[name][0] for cell in cells[key]], float)
        layers = 1 + NETWORKS[key[0]][1] * np.arange(samples.shape[1])
        marked = [int(np.abs(layers - at).argmin()) for at in marks[key[2]]]
        study.plot_seeds(panel, layers, samples, markevery=marked, **style)

    marks = {middle: np.linspace(1, middle, 10), deepest: np.geomspace(1, deepest, 10)}
    for network, style in zip(NETWORKS, STYLES, strict=False):
        style = style | {"label": network}
        own_depths = [depth_of(network, depth) for depth in depths]
        for row, norm in enumerate((True, False)):
            key = (network, norm, middle, 1.0, False)
            profile(axes[row, 0], "activations", *key, **style)
            profile(axes[row, 1], "gradients", *key, **style)
            by_depth = [growths(network, norm, d, 1.0, False) for d in depths]
            study.plot_seeds(
                axes[row, 2], own_depths, np.squeeze(by_depth, 2).T, **style
            )
        by_factor = [growths(network, False, middle, f, False) for f in factors]
        study.plot_seeds(axes[2, 0], factors, np.squeeze(by_factor, 2).T, **style)
        profile(axes[2, 1], "gradients", network, True, deepest, 1.0, False, **style)
        key = (network, True, middle, 1.0, True)
        study.plot_seeds(axes[2, 2], scale["steps"], growths(*key), **style)
        size = scale["dataset"]["image_size"]
        predicted = [predicted_growth(network, factor, size) for factor in factors]
        theory = {"color": "0.6", "linewidth": 2.5, "zorder": 0}
        axes[2, 0].plot(factors, predicted, label="predicted", **theory)
    handles = [*axes[0, 0].lines, axes[2, 0].lines[-1]]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    activation, gradient = "activation (RMS)", "gradient norm"
    rate = "gradient growth per layer (ln)"
    starred = f"layer (*plain and v1: {depth_of('v1', deepest)})"
    for panel, letter, (title, x, y, log, ticks) in zip(
        axes.flat,
        "abcdefghi",
        (
            (f"BN, depth {middle}", "layer", activation, "", None),
            (f"BN, depth {middle}", "layer", gradient, "y", None),
            ("BN", "depth", rate, "x", depths),
            (f"no BN, depth {middle}", "layer", activation, "y", None),
            (f"no BN, depth {middle}", "layer", gradient, "y", None),
            ("no BN", "depth", rate, "x", depths),
            (f"no BN, depth {middle}", "initial scale", rate, "x", factors),
            (f"BN, depth {deepest}*", starred, gradient, "xy", (1, 10, 100, 1000)),
            (f"BN, depth {middle}", "updates", rate, "", None),
        ),
        strict=True,
    ):
        panel.set(xlabel=x, ylabel=y)
        panel.set_title(f"({letter}) {title}", loc="left")
        if "y" in log:
            panel.set_yscale("log")
        if "x" in log:
            panel.set_xscale("log")
            panel.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks], minor=False)
            panel.xaxis.set_minor_locator(NullLocator())
        if y == rate:
            panel.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[2, 1].set_ylim(1e-4, 1e20)
    for panel, x, norm in ((axes[1, 2], 1, False), (axes[2, 1], 0.85, True)):
        first = {
            network: cells[network, norm, deepest, 1.0, False][0]["gradients"][0][0]
            for network in NETWORKS
        }
        lost = [network for network, value in first.items() if not value]  # 0, or None
        if lost:
            text = f"{', '.join(lost)}\nat {deepest}*: outside\nfloat32's range"
            place = {"transform": panel.transAxes, "ha": "right", "va": "top"}
            panel.text(x, 0.97, text, fontsize=6.5, **place)
    return figure


def main(argv: list[str]) -> None:
    """Measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    experiment.save(draw(run(experiment), SCALES[experiment.scale]))


if __name__ == "__main__":
    command_line.run(main)
