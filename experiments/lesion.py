"""Which blocks of a trained network can be deleted, and how long its paths are.

    python -m experiments.lesion [--scale=full]

Claim. Veit et al. 2016, "Residual Networks Behave Like Ensembles of Relatively Shallow
Networks", arXiv 1605.06431: n blocks with shortcuts form 2^n paths, whose lengths are
binomially distributed. Deleting a block leaves half of the paths, so that a residual
network hardly notices, while a plain one is lost; the error grows smoothly with the
number of blocks deleted or reordered; and since a path's gradient falls exponentially
with its length, only short paths train the network.

Method. Version 1, trained. (a) One block is deleted: a shortcut replaces it, also in a
plain network. (b) Several blocks, drawn at random: the median of all draws and seeds,
and the band that holds 80% of them. (c) Blocks within a stage, except its first, are
swapped; Kendall's tau is 1 for the right order. (d) Norm of the loss's gradient with
respect to the pixels along one path: back through the branches of some blocks and only
the shortcuts of all others; also times the number of such paths.
Elsewhere lines are medians over seeds, bands their range.

Cost. Smoke: digits, width 8, ten epochs, nine trainings, all shared with
loss_landscape; four minutes from scratch on two cores of a shared x86 machine.

Found. Most of the claim holds on digits. Deleting any one block of the plain network
destroys it, while any one of the last 10 of a residual network's 27 blocks can go at a
cost of 4.5 points or less, and any of the last 17 at 5.9 or less. The exception is the
first stage: without its first block a residual network, too, gets most digits wrong,
since there is no good signal yet for shortcuts to carry. (Veit finds that for the
blocks that change the shape. Here those cost 1 to 9 points with 56 layers; with 20 the
first of them costs 13 to 35.) When more blocks go or change places, the median error
rises smoothly over several of them, whereas the plain network is at chance from the
first on; but which blocks go matters more than how many: one draw of 3 does next to no
harm, another nearly as much as 10. With 56 layers most of the gradient comes along
paths shorter than half the network, though not as short as Veit's, whose networks are
deeper and trained for longer; with 20, hardly more than half of it does.

Numbers (smoke, seeds 0, 1, 2, test error in percent).
- Whole: residual-56 3.3, 3.3, 2.5; residual-20 2.5, 3.1, 3.9; plain-20 18, 9, 14.
- One block deleted, median over the blocks: 6.4, 4.4, 3.9; 8.3, 12, 22; 89, 89, 91,
  where guessing is 90. The worst block: 87, 68, 72; 84, 92, 85; 96, 93, 94. It is the
  first one, except in seed 2 of residual-56, where the first gives 68. Deleting a block
  costs the plain network at least 54 points.
- 1, 2, 3, 5, 7, 10 blocks deleted from residual-56, medians of 25 draws and 3 seeds: 5,
  9, 26, 47, 79, 88; 80% of the draws are in 3-40, 4-49, 6-70, 17-86, 44-90, 73-92. Half
  of the digits are wrong from 6 blocks on; in residual-20 from 2 on (53, 14-89), in
  plain-20 from 1 on (91, 84-95).
- Order of residual-56, medians: 5 at tau 0.9 to 1 (2.5 to 68), 50 at 0.8 to 0.9, 75 at
  0.7 to 0.8.
- Paths of residual-56: each block on a path multiplies the gradient by 0.76 to 0.78, so
  that 90% of it comes along paths of 7 to 16 of 27 blocks, 11.5 to 11.8 on average,
  against 13.5 if all paths counted alike. In residual-20 the factor is 0.96 to 0.99.
- An earlier training with the same seeds had 80, 58, 82 without the first block of
  residual-56, 2.5 points or less for each of its last 10, half of the digits wrong from
  5 blocks on, and a factor of 0.93 to 0.96 in residual-20.
"""

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

from experiments import study, trained
from experiments.blockwise import is_block
from experiments.study import STYLES, Study
from experiments.trained import Subject
from resnet_jax import command_line
from resnet_jax.layers import zero_padded_shortcut

# Depth, and whether there are shortcuts.
SCALES = {
    "smoke": {"networks": ((56, True), (20, True), (20, False)), "draws": 25},
    "full": {"networks": ((110, True), (56, True), (20, False)), "draws": 50},
}
PATH_EXAMPLES = 64  # whose gradients' norms are averaged


def block_names(net) -> list[str]:
    return [
        f"stage{stage}_block{b}"
        for stage in (1, 2, 3)
        for b in range(1, net.blocks_per_stage[0] + 1)
    ]


def logits(net, variables, images, change: Callable):
    """The network's logits where blocks return `change(number, shortcut, output)`.

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


def make_error(subject: Subject) -> Callable:
    """Builds error(variables, kept): the share of the test set that is misclassified.

    `kept` says for each block whether it stays; otherwise the shortcut replaces it.
    """

    @jax.jit
    def error(variables, kept):
        def delete(number, shortcut, output):
            return jnp.where(kept[number], output, shortcut)

        scores = logits(subject.net, variables, subject.images, delete)
        return (scores.argmax(-1) != subject.labels).mean()

    return lambda *args: float(error(*args))


def make_path_gradient(subject: Subject) -> Callable:
    """Builds gradient(through): of each example's loss with respect to its pixels.

    The forward pass is unchanged. The backward pass follows one path: only the branches
    of the blocks that `through` names, and only the shortcuts of the others. The sum
    over all paths is the gradient.
    """

    def one_way(through, number, shortcut, output):
        branch = output - shortcut
        return jnp.where(
            through[number],
            branch + lax.stop_gradient(shortcut),
            lax.stop_gradient(branch) + shortcut,
        )

    labels = subject.labels[:PATH_EXAMPLES]

    def loss(images, through):
        change = functools.partial(one_way, through)
        scores = logits(subject.net, subject.variables, images, change)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).sum()

    gradient = jax.jit(jax.grad(loss))
    return lambda through: gradient(subject.images[:PATH_EXAMPLES], through)


def mean_norm(gradients) -> float:
    """The mean over examples of a gradient's norm."""
    return float(jnp.sqrt((gradients**2).sum((1, 2, 3))).mean())


def swapped(
    subject: Subject, swaps: int, rng: np.random.Generator
) -> tuple[dict, float]:
    """Variables after swaps of blocks of one stage, and Kendall's tau of the order."""
    names = block_names(subject.net)
    order, n = np.arange(len(names)), subject.net.blocks_per_stage[0]
    for _ in range(swaps):
        first = n * rng.integers(3)
        pair = first + rng.choice(np.arange(1, n), 2, replace=False)
        order[pair] = order[pair[::-1]]
    moved = {name: names[source] for name, source in zip(names, order, strict=True)}
    variables = {
        kind: {name: tree[moved.get(name, name)] for name in tree}
        for kind, tree in subject.variables.items()
    }
    return variables, float(stats.kendalltau(np.arange(len(names)), order).statistic)


def measure(config: dict, draws: int) -> dict:
    """Test errors of a trained network after lesions, and gradients of its paths."""
    subject = trained.subject(config)
    rng = np.random.default_rng(config["seed"])
    count = 3 * subject.net.blocks_per_stage[0]
    error = make_error(subject)

    def drawn(number: int) -> np.ndarray:
        return np.isin(np.arange(count), rng.choice(count, number, replace=False))

    orders = [swapped(subject, swaps, rng) for swaps in range(count)]
    result = {
        "error": error(subject.variables, ~drawn(0)),
        "one_deleted": [
            error(subject.variables, np.arange(count) != b) for b in range(count)
        ],
        "deleted": [
            [error(subject.variables, ~drawn(number)) for _ in range(draws)]
            for number in range(count + 1)
        ],
        "tau": [tau for _, tau in orders],
        "swapped": [error(variables, ~drawn(0)) for variables, _ in orders],
    }
    if config["model"]["residual"]:
        gradient = make_path_gradient(subject)
        result["path_gradients"] = [
            [mean_norm(gradient(drawn(length))) for _ in range(draws)]
            for length in range(count + 1)
        ]
    result = {name: study.numbers(value) for name, value in result.items()}
    return result | subject.made_by


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Panels for one block, several blocks, order, and paths."""
    figure, ((one, several), (order, paths)) = study.figure(6.4, 5.0, nrows=2, ncols=2)
    for (network, results), style in zip(cells.items(), STYLES, strict=False):
        style = style | {"label": network}
        errors = np.array([result["one_deleted"] for result in results])
        blocks = errors.shape[1]
        study.plot_seeds(one, 1 + np.arange(blocks), 100 * errors, **style)
        drawn = 100 * np.concatenate([result["deleted"] for result in results], 1)
        several.plot(np.median(drawn, 1), **style)
        band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
        ends = np.quantile(drawn, (0.1, 0.9), axis=1)
        several.fill_between(np.arange(blocks + 1), *ends, **band)
        tau = np.concatenate([result["tau"] for result in results])
        errors = np.concatenate([result["swapped"] for result in results])
        order.plot(tau, 100 * errors, **style | {"linestyle": "none", "alpha": 0.6})
        if "path_gradients" not in results[0] or paths.lines:
            continue
        lengths = np.arange(blocks + 1)
        each = np.array([np.mean(result["path_gradients"], 1) for result in results])
        chances = stats.binom.pmf(lengths, blocks, 0.5)
        carried = chances * each
        for samples, style, label in (
            (np.array([chances / chances.max()]), STYLES[0], "paths"),
            (each / each.max(1, keepdims=True), STYLES[1], "gradient of a path"),
            (carried / carried.max(1, keepdims=True), STYLES[2], "paths x gradient"),
        ):
            study.plot_seeds(paths, lengths, samples, **style | {"label": label})
        paths.set_title(f"(d) paths through {network}", loc="left")
    one.set(xlabel="block deleted")
    several.set(xlabel="blocks deleted")
    order.set(xlabel="Kendall's tau of the block order")
    paths.set(xlabel="path length (blocks)", ylabel="relative to maximum", yscale="log")
    paths.set_ylim(1e-6, 2)
    titles = ("(a) one block deleted", "(b) several deleted", "(c) blocks swapped")
    for panel, title in zip((one, several, order), titles, strict=True):
        panel.set(ylabel="test error (%)", ylim=(0, 100))
        panel.set_title(title, loc="left")
    several.legend()
    paths.legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    scale, cells = SCALES[experiment.scale], {}
    for depth, residual in scale["networks"]:
        config = trained.run_config(
            experiment.scale, depth, residual, epochs=10, width=8
        )
        name = f"{'residual' if residual else 'plain'}-{depth}"
        cells[name] = experiment.seeds(measure, config, draws=scale["draws"])
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
