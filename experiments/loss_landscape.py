"""The loss around a trained network: is it a bowl, or mountains?

    python -m experiments.loss_landscape [--scale=full]

Claim. Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets", arXiv
1712.09913: with 20 layers the loss around a trained network is a bowl, with and without
shortcuts. Without them it turns to chaos as depth grows to 56; with them it stays a
bowl.

Method. The loss on the first 128 training examples (full: 10,240), not augmented, on a
plane through the trained network, along two random directions in which each filter has
the norm of the network's own, so that distance 1 changes it by its own length;
BatchNorm keeps the trained network's running statistics. Below, medians over
directions, and the extreme eigenvalues of the loss's Hessian at the centre, to a
thousandth, by ARPACK. A convex loss has no negative eigenvalues; the paper measures how
far from convex it is by |smallest / largest|. Surfaces are of seed 0; lines are medians
over seeds, bands their range.

Cost. Smoke: digits, width 8, ten epochs, twelve trainings, nine of them shared with
lesion; five minutes from scratch on two cores of a shared x86 machine.

Found. The claim holds in part. With shortcuts the loss around the network is a bowl
with one minimum, at 20 layers and at 56. At 20 layers it is a bowl without them, too,
but for a shallow dent halfway out in one seed. The landscape of the plain network of 56
layers is of another kind: a flat middle, and walls that take the loss to 30,000 and
more at a distance of the network's own length, where with shortcuts it is 850 to 1,000.
It has one to three minima, so their number does not distinguish it from the others in
every seed. But it is hardly trained: at this learning rate it gets 22 to 41% of the
digits right, the others 82 to 98%. So this is a landscape in which the network does not
train, not a comparison of two trained networks, as the paper's is. The paper's
|smallest / largest| separates nothing at the centre: it is 0.01 to 0.04 for all but two
plain networks of 56 layers, whose 0.008 and 0.006 make them the most convex by that
measure, since one direction is so sharp. The eigenvalues themselves do differ: in all
seeds the smallest is more negative in plain networks of either depth than in residual
ones. The largest is larger than in the residual networks of the same seed, but not than
in those of every seed.

Numbers (smoke, seeds 0, 1, 2; distances in lengths of the network's filters).
- Largest eigenvalue: plain-20 157, 259, 260; residual-20 120, 138, 184; plain-56 785,
  1439, 288; residual-56 138, 64, 84. Earlier trainings with the same seeds had 149 to
  217 and 326 to 394 in plain-20. The second of them had 349 to 18,484 in plain-56, and
  all plain networks above all residual ones. So three seeds do not show how widely
  trainings vary.
- Smallest eigenvalue: plain-20 -5.2, -4.3, -4.2; residual-20 -2.6, -2.0, -2.5; plain-56
  -6.0, -8.6, -6.1; residual-56 -2.8, -2.3, -1.4. In an earlier training with the same
  seeds, plain and residual ones were only just apart. The next four eigenvalues are
  each more than half as large.
- |smallest / largest|: plain-20 0.033, 0.017, 0.016; residual-20 0.022, 0.015, 0.013;
  plain-56 0.008, 0.006, 0.021; residual-56 0.021, 0.036, 0.017.
- Loss at the centre and at distance 1 (medians over directions): plain-20 0.3 to 0.6
  and 200 to 400; residual-20 0.06 to 0.07 and 100 to 210; plain-56 1.7 to 2.0 and
  30,000 to 690,000; residual-56 0.02 to 0.06 and 850 to 1,000.
- Minima on the grid of 21 by 21 points: 2, 1, 3 in plain-56, 1, 1, 2 in plain-20, and
  one in all others. An earlier training with the same seeds had 4, 3, 2 in plain-56,
  and one in all others.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, eigsh

from experiments import study, trained
from experiments.study import STYLES, Study
from resnet_jax import command_line, models

# Networks are depth, and whether there are shortcuts.
SCALES = {
    "smoke": {
        "networks": ((20, False), (56, False), (20, True), (56, True)),
        "points": 21,
        "examples": 128,
    },
    "full": {
        "networks": ((20, False), (56, False), (20, True), (56, True), (110, True)),
        "points": 51,
        "examples": 10_240,
    },
}
SHOWN = 5  # eigenvalues, from either end
BATCH = 256
LEVELS = (0.1, 0.5, 2, 10, 50)


def filter_normalized(rng: np.random.Generator, params: dict) -> dict:
    """A random direction in which every filter has the norm of the network's own.

    A filter is what makes one output channel, or one logit. Biases and BatchNorm's
    parameters stay as they are (Li et al. 2018, section 4).
    """

    def draw(leaf):
        if leaf.ndim == 1:
            return np.zeros_like(leaf)
        drawn = rng.standard_normal(leaf.shape, np.float32)
        axes = tuple(range(leaf.ndim - 1))
        norms, drawn_norms = (np.sqrt((x**2).sum(axes)) for x in (leaf, drawn))
        return drawn * (norms / drawn_norms)

    return jax.tree.map(draw, params)


def make_loss(net, batch_stats: dict, images, labels) -> Callable:
    """Builds loss(params): the mean over examples; BatchNorm as in evaluation.

    Computes a batch of 256 at a time, to save memory; more examples than that must be a
    multiple of it.
    """
    batch = min(BATCH, len(images))
    images = images.reshape(-1, batch, *images.shape[1:])
    labels = jnp.asarray(labels).reshape(-1, batch)

    def loss(params):
        def of_batch(examples):
            logits = net.apply(
                {"params": params, "batch_stats": batch_stats}, examples[0], train=False
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, examples[1]
            )
            return losses.mean()

        return lax.map(jax.checkpoint(of_batch), (images, labels)).mean()

    return loss


def surface(loss: Callable, params: dict, directions, points: int) -> np.ndarray:
    """The loss [points, points] at params + a * first + b * second, both in -1..1."""
    axis = jnp.linspace(-1, 1, points)

    @jax.jit
    def row(params, directions, a):
        def at(b):
            moved = jax.tree.map(lambda p, x, y: p + a * x + b * y, params, *directions)
            return loss(moved)

        return lax.map(at, axis)

    return np.array([row(params, directions, a) for a in axis])


def make_hessian_product(loss: Callable, params: dict) -> tuple[Callable, int]:
    """Builds product(vector) = Hessian @ vector; returns it and the vector's length.

    Forward over reverse: the derivative of the gradient along the vector.
    """
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda flat: loss(unravel(flat)))
    product = jax.jit(lambda vector: jax.jvp(gradient, (flat,), (vector,))[1])
    return product, len(flat)


def extremes(
    product: Callable, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The SHOWN largest eigenvalues of a symmetric matrix, falling; smallest, rising.

    Args:
      product: matrix times vector, float32.
      length: of the vector.
      rng: draws the first vector.
    """
    matrix = LinearOperator(
        (length, length),
        lambda vector: np.asarray(product(vector.astype(np.float32)), np.float64),
        dtype=np.float64,
    )
    values = np.sort(
        eigsh(
            matrix,
            k=2 * SHOWN,
            which="BE",  # from both ends
            v0=rng.standard_normal(length),
            tol=1e-3,
            return_eigenvectors=False,
        )
    )
    return values[: -SHOWN - 1 : -1], values[:SHOWN]


def measure(config: dict, points: int, examples: int) -> dict:
    """The training loss around a trained network, and its Hessian's eigenvalues."""
    subject = trained.subject(config)
    rng = np.random.default_rng(config["seed"])
    net, variables = subject.net.clone(scan=True), models.stack(subject.variables)
    images, labels = trained.training_examples(config, examples)
    loss = make_loss(net, variables["batch_stats"], images, labels)
    directions = [
        models.stack(filter_normalized(rng, subject.variables["params"]))
        for _ in range(2)
    ]
    product, length = make_hessian_product(loss, variables["params"])
    largest, smallest = extremes(product, length, rng)
    return {
        **subject.made_by,
        "test_accuracy": subject.summary["test_accuracy"],
        "loss": study.numbers(surface(loss, variables["params"], directions, points)),
        "largest": study.numbers(largest),
        "smallest": study.numbers(smallest),
    }


def profile(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from the centre of a surface, and the median loss at each."""
    axis = np.linspace(-1, 1, len(losses))
    spacing = axis[1] - axis[0]
    rings = np.rint(np.hypot(*np.meshgrid(axis, axis)) / spacing)
    numbers = np.arange(len(losses) // 2 + 1)
    return numbers * spacing, np.array([np.median(losses[rings == n]) for n in numbers])


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Surface and contours of the first seed; profiles and eigenvalues of all."""
    columns = max(3, len(cells))
    figure, axes = study.figure(2.4 * columns, 6.4, nrows=3, ncols=columns)
    around, largest, smallest = axes[2, :3]
    for unused in (*axes[0], *axes[1, len(cells) :], *axes[2, 3:]):
        unused.remove()
    highest = np.log10(max(np.max(results[0]["loss"]) for results in cells.values()))
    for column, ((network, results), style) in enumerate(
        zip(cells.items(), STYLES, strict=False)
    ):
        losses = np.array(results[0]["loss"], float)
        axis = np.linspace(-1, 1, len(losses))
        plane = np.meshgrid(axis, axis, indexing="ij")
        solid = figure.add_subplot(3, columns, 1 + column, projection="3d")
        solid.plot_surface(
            *plane, np.log10(losses), cmap="cividis", rcount=51, ccount=51
        )
        solid.set(zlim=(-2.5, highest), xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        solid.set_zlabel("log10 loss", fontsize=6, labelpad=-6)
        solid.set_title(f"({'abcde'[column]}) {network}", loc="left")
        solid.tick_params(pad=-2, labelsize=6)
        flat = axes[1, column]
        lines = flat.contour(*plane, losses, levels=LEVELS, cmap="cividis")
        flat.clabel(lines, LEVELS[1:], fontsize=6, fmt="%g", inline_spacing=1)
        flat.set(xlabel="first direction", aspect="equal", xticks=(-1, 0, 1))
        style = style | {"label": network}
        rings = [profile(np.array(result["loss"], float)) for result in results]
        study.plot_seeds(around, rings[0][0], [loss for _, loss in rings], **style)
        for panel, end in ((largest, "largest"), (smallest, "smallest")):
            values = np.array([result[end] for result in results])
            study.plot_seeds(panel, 1 + np.arange(SHOWN), values, **style)
    axes[1, 0].set_ylabel("second direction")
    letters = iter("abcdefgh"[len(cells) :])
    for panel, title, x, y in (
        (around, "loss by distance", "distance", "median loss"),
        (largest, "largest eigenvalues", "rank", "Hessian eigenvalue"),
        (smallest, "smallest eigenvalues", "rank", "Hessian eigenvalue"),
    ):
        panel.set(xlabel=x, ylabel=y)
        panel.set_title(f"({next(letters)}) {title}", loc="left")
    around.set_yscale("log")
    largest.set_yscale("log")
    around.legend()
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
        cells[name] = experiment.seeds(
            measure,
            config,
            points=scale["points"],
            examples=scale["examples"],
        )
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
