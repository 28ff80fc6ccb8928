"""TODO."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments import study
from experiments.blockwise import is_block
from experiments.study import STYLES, Study
from experiments.trained import Trained, trained, training, training_examples
from resnet_jax import command_line

# Depth, the size of the images, and epochs (None: as `training` says).
SCALES = {
    "smoke": {"depth": 20, "image_size": 32, "epochs": 8},
    "full": {"depth": 56, "image_size": 0, "epochs": None},
}
SEEDS = (0, 1, 2)
SHOWN = {"examples": 3, "blocks": 9}  # at most
FITTED = 500  # training examples of which the classes' means are taken
TESTED = 1000  # test examples, at most


def config_of(scale: str, seed: int) -> dict:
    """The config of a scale's network, as JSON holds it."""
    chosen = SCALES[scale]
    config = training(scale, chosen["depth"], True, seed)
    config["dataset"]["image_size"] = chosen["image_size"]
    config["epochs"] = chosen["epochs"] or config["epochs"]
    return config


def watch(run: Trained, images, added=None):
    """The logits, and what each block gives, with `added[block]` added to it."""
    outputs = []

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if is_block(context.module):
            if added is not None:
                output += added[len(outputs)]
            outputs.append(output)
        return output

    with nn.intercept_methods(record):
        logits = run.net.apply(run.variables, images, train=False)
    return logits, outputs


def grad_cam(activations, gradients):
    """Where a class is seen (Selvaraju et al. 2017, arXiv 1610.02391, section 3).

    Args:
      activations: of a layer, [batch, height, width, channels].
      gradients: of the class's logit with respect to them.

    Returns:
      Maps [batch, height, width], not negative.
    """
    weights = gradients.mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * activations).sum(-1))


def block_maps(run: Trained, images, labels) -> tuple[list, list]:
    """For each block its activations, and the Grad-CAM of the right class."""

    @jax.jit
    def maps(images):
        shapes = jax.eval_shape(lambda: watch(run, images)[1])
        zeros = [jnp.zeros(shape.shape) for shape in shapes]

        def score(added):
            logits, outputs = watch(run, images, added)
            return logits[jnp.arange(len(labels)), labels].sum(), outputs

        gradients, outputs = jax.grad(score, has_aux=True)(zeros)
        return outputs, list(map(grad_cam, outputs, gradients))

    return maps(images)


def nearest_mean_accuracy(fitted, fitted_labels, features, labels) -> float:
    """How many features [examples, channels] are nearest to their own class's mean."""
    means = [fitted[fitted_labels == label].mean(0) for label in np.unique(labels)]
    distances = ((features[:, None] - np.array(means)) ** 2).sum(-1)
    return float((np.unique(labels)[distances.argmin(1)] == labels).mean())


def area(maps: np.ndarray) -> float:
    """The part of the image that a map covers: 1 if even, 1 / pixels if a point.

    The mean over those of `maps` [examples, height, width] that are not all zero.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat[flat.any(1)]
    if not len(flat):
        return 0.0
    return float((flat.sum(1) ** 2 / (flat**2).sum(1)).mean() / flat.shape[1])


def measure(config: dict) -> dict:
    """By block: how well class means tell the classes apart, and Grad-CAM's area."""
    run = trained(config)
    fitted, fitted_labels = training_examples(config, FITTED)
    pooled = jax.jit(lambda images: [x.mean((1, 2)) for x in watch(run, images)[1]])
    images, labels = run.images[:TESTED], run.labels[:TESTED]
    pairs = zip(pooled(fitted), pooled(images), strict=True)
    _, cams = block_maps(run, images, labels)
    return {
        "test_accuracy": run.summary["test_accuracy"],
        "nearest_mean_accuracy": study.numbers(
            [
                nearest_mean_accuracy(
                    np.asarray(of_fitted), fitted_labels, np.asarray(own), labels
                )
                for of_fitted, own in pairs
            ]
        ),
        "cam_area": study.numbers([area(np.asarray(cam)) for cam in cams]),
    }


def pictures(config: dict, examples: int, blocks: int) -> dict:
    """The stem's filters, and some test images with what blocks make of them.

    Pictures are in whole percent of their range; the blocks are counted from 1, and the
    last is among them.
    """
    run = trained(config)
    _, first = np.unique(run.labels, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, examples).astype(int)]
    images = run.images[chosen]
    outputs, cams = block_maps(run, images, run.labels[chosen])
    every = -(-len(cams) // blocks)
    numbers = range(len(cams), 0, -every)[::-1]
    filters = run.variables["params"]["stem_conv"]["kernel"].transpose(3, 0, 1, 2)
    return {
        "labels": run.labels[chosen].tolist(),
        "blocks": list(numbers),
        "filters": percent(filters, (0, 1, 2, 3)),
        "images": percent(images, (1, 2, 3)),
        "activations": [percent(outputs[n - 1].mean(-1), (1, 2)) for n in numbers],
        "cams": [percent(cams[n - 1], (1, 2)) for n in numbers],
    }


def percent(array, axes) -> list:
    """Whole numbers: 0 for the smallest value over some axes, 100 for the largest."""
    array = np.asarray(array, np.float64)
    low, high = array.min(axes, keepdims=True), array.max(axes, keepdims=True)
    return (
        np.round(100 * (array - low) / np.maximum(high - low, 1e-12))
        .astype(int)
        .tolist()
    )


def draw(found: dict, results: list[dict]) -> Figure:
    """Filters; for each example activations and Grad-CAM by block; numbers by block."""
    shown, examples = len(found["blocks"]), len(found["labels"])
    figure, axes = study.figure(7.2, 7.4, nrows=2 * examples + 3, ncols=shown + 1)
    grid = axes[0, 0].get_gridspec()
    for panel in axes.flat:
        panel.axis("off")

    def show(panel, picture, cmap="gray"):
        picture = np.array(picture).squeeze() / 100
        panel.imshow(picture, cmap, vmin=0, vmax=1, interpolation="nearest")

    strip = figure.add_subplot(grid[0, :])
    beside = ((0, 0), (0, 0), (0, 1), (0, 0))
    filters = np.pad(np.array(found["filters"]), beside, constant_values=100)
    show(strip, np.concatenate(filters, 1))
    strip.set_title("(a) filters of the first layer", loc="left")
    strip.axis("off")
    for example in range(examples):
        rows = axes[1 + 2 * example : 3 + 2 * example]
        show(rows[0, 0], found["images"][example])
        for column in range(shown):
            show(rows[0, 1 + column], found["activations"][column][example])
            show(rows[1, 1 + column], found["cams"][column][example], "inferno")
    axes[1, 0].set_title("(b)", loc="left")
    for column, number in enumerate(found["blocks"], start=1):
        axes[1, column].set_title(f"block {number}", fontsize=7)
    middle = (shown + 1) // 2
    for columns, title, name, label, style in (
        (
            slice(0, middle),
            "(c) nearest class mean",
            "nearest_mean_accuracy",
            "test accuracy (%)",
            STYLES[0],
        ),
        (
            slice(middle, None),
            "(d) area of Grad-CAM",
            "cam_area",
            "of the image (%)",
            STYLES[1],
        ),
    ):
        panel = figure.add_subplot(grid[-2:, columns])
        samples = 100 * np.array([result[name] for result in results])
        numbers = 1 + np.arange(samples.shape[1])
        study.plot_seeds(panel, numbers, samples, **style)
        panel.set(xlabel="block", ylabel=label, ylim=(0, 100), xticks=found["blocks"])
        panel.set_title(title, loc="left")
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is not there yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    results = [own.cell(measure, config=config_of(own.scale, s)) for s in SEEDS]
    found = own.cell(pictures, config=config_of(own.scale, SEEDS[0]), **SHOWN)
    own.save(draw(found, results))


if __name__ == "__main__":
    command_line.run(main)
