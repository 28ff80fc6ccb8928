"""TODO."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from scipy import stats

from experiments import study
from experiments.blockwise import is_block
from experiments.study import STYLES, Study
from experiments.trained import Trained, trained, training
from resnet_jax import command_line
from resnet_jax.layers import zero_padded_shortcut

# Depth, and whether there are shortcuts.
SCALES = {
    "smoke": {"networks": ((56, True), (20, True), (20, False)), "draws": 3},
    "full": {"networks": ((110, True), (56, True), (20, False)), "draws": 50},
}
SEEDS = (0, 1, 2)
PATH_EXAMPLES = 64  # whose gradients are averaged


def block_names(net) -> list[str]:
    return [
        f"stage{stage}_block{b}"
        for stage in (1, 2, 3)
        for b in range(1, net.blocks_per_stage + 1)
    ]


def logits(net, variables, images, change: Callable):
    """The network's logits where `change(block number, shortcut, output)` is passed on.

    `shortcut` is what a parameter-free shortcut makes of what the block reads, also
    in a network that has none.
    """
    names = block_names(net)

    def replace(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if not is_block(context.module):
            return output
        stride = args[0].shape[1] // output.shape[1]
        shortcut = zero_padded_shortcut(args[0], output.shape[-1], stride)
        return change(names.index(context.module.name), shortcut, output)

    with nn.intercept_methods(replace):
        return net.apply(variables, images, train=False)


def make_error(run: Trained) -> Callable:
    """Builds error(variables, kept): the part of the test set that is got wrong.

    `kept` says for each block whether it stays; else the shortcut stands in for it.
    """

    @jax.jit
    def error(variables, kept):
        def delete(number, shortcut, output):
            return jnp.where(kept[number], output, shortcut)

        scores = logits(run.net, variables, run.images, delete)
        return (scores.argmax(-1) != run.labels).mean()

    return lambda *args: float(error(*args))


def make_path_gradient(run: Trained) -> Callable:
    """Builds gradient(through): of each example's loss with respect to its pixels.

    Forward nothing changes. Back it goes through the branches alone of the blocks that
    `through` names, and through the shortcuts alone of the others: one path. The sum
    over all paths is the gradient.
    """

    def one_way(through, number, shortcut, output):
        branch = output - shortcut
        return jnp.where(
            through[number],
            branch + lax.stop_gradient(shortcut),
            lax.stop_gradient(branch) + shortcut,
        )

    labels = run.labels[:PATH_EXAMPLES]

    def loss(images, through):
        change = functools.partial(one_way, through)
        scores = logits(run.net, run.variables, images, change)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).sum()

    gradient = jax.jit(jax.grad(loss))
    return lambda through: gradient(run.images[:PATH_EXAMPLES], through)


def mean_norm(gradients) -> float:
    """The mean over examples of a gradient's norm."""
    return float(jnp.sqrt((gradients**2).sum((1, 2, 3))).mean())


def swapped(run: Trained, swaps: int, rng: np.random.Generator) -> tuple[dict, float]:
    """Variables after swaps of blocks of one stage, and Kendall's tau of the order."""
    names = block_names(run.net)
    order, n = np.arange(len(names)), run.net.blocks_per_stage
    for _ in range(swaps):
        first = n * rng.integers(3)
        pair = first + rng.choice(np.arange(1, n), 2, replace=False)
        order[pair] = order[pair[::-1]]
    moved = {name: names[source] for name, source in zip(names, order, strict=True)}
    variables = {
        kind: {name: tree[moved.get(name, name)] for name in tree}
        for kind, tree in run.variables.items()
    }
    return variables, float(stats.kendalltau(np.arange(len(names)), order).statistic)


def measure(config: dict, draws: int) -> dict:
    """Test errors of a trained network after lesions, and gradients of its paths."""
    run = trained(config)
    rng = np.random.default_rng(config["seed"])
    count = 3 * run.net.blocks_per_stage
    error = make_error(run)

    def drawn(number: int) -> np.ndarray:
        return np.isin(np.arange(count), rng.choice(count, number, replace=False))

    orders = [swapped(run, swaps, rng) for swaps in range(count)]
    result = {
        "error": error(run.variables, ~drawn(0)),
        "one_deleted": [
            error(run.variables, np.arange(count) != b) for b in range(count)
        ],
        "deleted": [
            [error(run.variables, ~drawn(number)) for _ in range(draws)]
            for number in range(count + 1)
        ],
        "tau": [tau for _, tau in orders],
        "swapped": [error(variables, ~drawn(0)) for variables, _ in orders],
    }
    if config["model"]["residual"]:
        gradient = make_path_gradient(run)
        result["path_gradients"] = [
            [mean_norm(gradient(drawn(length))) for _ in range(draws)]
            for length in range(count + 1)
        ]
    return {name: study.numbers(value) for name, value in result.items()}


def draw(cells: dict[str, list[dict]]) -> Figure:
    """One block, several blocks, order, and paths."""
    figure, ((one, several), (order, paths)) = study.figure(6.4, 5.0, nrows=2, ncols=2)
    for (network, results), style in zip(cells.items(), STYLES, strict=False):
        style = style | {"label": network}
        errors = np.array([result["one_deleted"] for result in results])
        blocks = errors.shape[1]
        study.plot_seeds(one, 1 + np.arange(blocks), 100 * errors, **style)
        errors = np.array([np.median(result["deleted"], 1) for result in results])
        study.plot_seeds(several, np.arange(blocks + 1), 100 * errors, **style)
        tau = np.concatenate([result["tau"] for result in results])
        errors = np.concatenate([result["swapped"] for result in results])
        order.plot(tau, 100 * errors, **style | {"linestyle": "none", "alpha": 0.6})
        if "path_gradients" not in results[0]:
            continue
        lengths = np.arange(blocks + 1)
        each = np.array([np.mean(result["path_gradients"], 1) for result in results])
        chances = stats.binom.pmf(lengths, blocks, 0.5)
        carried = chances * each
        for samples, style, label in (
            (np.array([chances / chances.max()]), STYLES[0], "paths"),
            (each / each.max(1, keepdims=True), STYLES[1], "gradient of a path"),
            (carried / carried.max(1, keepdims=True), STYLES[2], "product"),
        ):
            study.plot_seeds(paths, lengths, samples, **style | {"label": label})
        paths.set_title(f"(d) paths of {network}", loc="left")
    one.set(xlabel="block deleted")
    several.set(xlabel="blocks deleted")
    order.set(xlabel="Kendall's tau of the blocks' order")
    paths.set(xlabel="length (blocks)", ylabel="of the largest", yscale="log")
    paths.set_ylim(1e-6, 2)
    titles = ("(a) one block deleted", "(b) several deleted", "(c) blocks swapped")
    for panel, title in zip((one, several, order), titles, strict=True):
        panel.set(ylabel="test error (%)", ylim=(0, 100))
        panel.set_title(title, loc="left")
    several.legend()
    paths.legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is not there yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    scale, cells = SCALES[own.scale], {}
    for depth, residual in scale["networks"]:
        cells[f"{'residual' if residual else 'plain'}-{depth}"] = [
            own.cell(
                measure,
                config=training(own.scale, depth, residual, seed),
                draws=scale["draws"],
            )
            for seed in SEEDS
        ]
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
