"""How a residual network processes an image, block by block.

    python -m experiments.feature_visualisation [--scale=full]

Claim. The first filters see edges, and later layers more of the class and less of its
position (Zeiler and Fergus 2014, arXiv 1311.2901); a classifier on a layer's features
gets better from layer to layer (Alain and Bengio 2016, arXiv 1610.01644); and residual
blocks refine what they read, instead of computing it from scratch (Greff et al. 2017,
arXiv 1612.07771).

Method. Version 1, trained. (a) The first layer's filters. (b) Each block's output for
test images, averaged over channels, scaled from its smallest value to its largest. (c)
Its Grad-CAM for the right class (Selvaraju et al. 2017, arXiv 1610.02391): where more
of what the block sees would raise the class's logit. (d) Test accuracy of classifying
by the nearest class mean of a block's features, averaged over positions; no layer is
trained for it. (e) The fraction of the image that Grad-CAM covers: 100% if it is
uniform, little if it is a point. Medians over seeds, bands their range.

Cost. Smoke: digits at 32x32 pixels, three trainings of 8 epochs; four minutes from
scratch on two cores of a shared x86 machine.

Found. The picture is refined step by step. After the first block the class means get 4
of 10 digits right, and every block adds to that, much at first and a little at the end,
until the last one is about as good as the network's own classifier. Activations within
a stage look alike, as if blocks that keep the shape changed their input only a little
(how much was not measured), and new features appear in the stages' first blocks (4 and
7). Grad-CAM of the early blocks lies in thin lines along strokes, and at the image's
border; in the last stage it is one blob over the part that distinguishes the digit: the
right arm of the 4, the middle of the 9. Grad-CAM means little where channels do not yet
stand for parts of classes. The first layer's 3x3 filters are differences in some
direction, but too small, and too little needed on digits, to look like the edge
detectors that larger filters become.

Numbers (smoke, seeds 0, 1, 2).
- Test accuracy of the nearest class mean by block (medians): 38, 58, 67, 79, 85, 91,
  95, 96, 96%; of the network itself 96.9, 97.5, 97.8%. It rises from each block to the
  next in all three.
- Area of Grad-CAM: 35, 35, 41, 42, 48, 49, 57, 62, 63% (medians); 31 to 36% in the
  first block, 60 to 63% in the last.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments import study, trained
from experiments.blockwise import is_block
from experiments.study import STYLES, Study
from experiments.trained import Subject
from resnet_jax import command_line

# Depth, the size of the images, and epochs (None: as `trained.run_config` says).
SCALES = {
    "smoke": {"depth": 20, "image_size": 32, "epochs": 8},
    "full": {"depth": 56, "image_size": 0, "epochs": None},
}
SHOWN = {"examples": 3, "blocks": 9}  # at most
FITTED = 500  # training examples for the classes' means
TESTED = 1000  # test examples, at most


def run_config(scale: str) -> dict:
    """The config of a scale's network, as JSON holds it."""
    chosen = SCALES[scale]
    config = trained.run_config(scale, chosen["depth"], True)
    config["dataset"]["image_size"] = chosen["image_size"]
    config["epochs"] = chosen["epochs"] or config["epochs"]
    return config


def watch(subject: Subject, images, added=None):
    """The logits, and each block's output with `added[block]` added to it."""
    outputs = []

    def record(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if is_block(context.module):
            if added is not None:
                output += added[len(outputs)]
            outputs.append(output)
        return output

    with nn.intercept_methods(record):
        logits = subject.net.apply(subject.variables, images, train=False)
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


def block_maps(subject: Subject, images, labels) -> tuple[list, list]:
    """For each block its activations, and the Grad-CAM of the right class."""

    @jax.jit
    def maps(images):
        shapes = jax.eval_shape(lambda: watch(subject, images)[1])
        zeros = [jnp.zeros(shape.shape) for shape in shapes]

        def score(added):
            logits, outputs = watch(subject, images, added)
            return logits[jnp.arange(len(labels)), labels].sum(), outputs

        gradients, outputs = jax.grad(score, has_aux=True)(zeros)
        return outputs, list(map(grad_cam, outputs, gradients))

    return maps(images)


def nearest_mean_accuracy(fitted, fitted_labels, features, labels) -> float:
    """The share of features [examples, channels] nearest to their own class's mean."""
    means = [fitted[fitted_labels == label].mean(0) for label in np.unique(labels)]
    distances = ((features[:, None] - np.array(means)) ** 2).sum(-1)
    return float((np.unique(labels)[distances.argmin(1)] == labels).mean())


def area(maps: np.ndarray) -> float:
    """The fraction of the image that a map covers: 1 if uniform, 1 / pixels if a point.

    The mean over those of `maps` [examples, height, width] that are not all zero.
    """
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    flat = flat[flat.any(1)]
    if not len(flat):
        return 0.0
    return float((flat.sum(1) ** 2 / (flat**2).sum(1)).mean() / flat.shape[1])


def measure(config: dict) -> dict:
    """By block: the accuracy of the nearest class mean, and Grad-CAM's area."""
    subject = trained.subject(config)
    fitted, fitted_labels = trained.training_examples(config, FITTED)
    pooled = jax.jit(lambda images: [x.mean((1, 2)) for x in watch(subject, images)[1]])
    images, labels = subject.images[:TESTED], subject.labels[:TESTED]
    pairs = zip(pooled(fitted), pooled(images), strict=True)
    _, cams = block_maps(subject, images, labels)
    return {
        **subject.made_by,
        "test_accuracy": subject.summary["test_accuracy"],
        "nearest_mean_accuracy": study.numbers(
            [
                nearest_mean_accuracy(
                    np.asarray(of_fitted), fitted_labels, np.asarray(of_tested), labels
                )
                for of_fitted, of_tested in pairs
            ]
        ),
        "cam_area": study.numbers([area(np.asarray(cam)) for cam in cams]),
    }


def pictures(config: dict, examples: int, blocks: int) -> dict:
    """The stem's filters, and some test images with the blocks' outputs for them.

    Pictures are in whole percent of their range; the blocks are counted from 1, and the
    last is among them.
    """
    subject = trained.subject(config)
    _, first = np.unique(subject.labels, return_index=True)
    chosen = first[np.linspace(0, len(first) - 1, examples).astype(int)]
    images = subject.images[chosen]
    outputs, cams = block_maps(subject, images, subject.labels[chosen])
    every = -(-len(cams) // blocks)
    numbers = range(len(cams), 0, -every)[::-1]
    filters = subject.variables["params"]["stem_conv"]["kernel"].transpose(3, 0, 1, 2)
    return {
        **subject.made_by,
        "labels": subject.labels[chosen].tolist(),
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


def mosaic(images: list, pictures: list, colors: str) -> np.ndarray:
    """One RGB picture: a row for each example, its image and then every block's.

    Args:
      images: by example, in percent, gray or RGB.
      pictures: by block and example, in percent, of sizes that divide the images'.
      colors: of Matplotlib's colour maps, for `pictures`.
    """
    size = len(images[0])

    def tile(picture, colors):
        picture = np.array(picture).squeeze() / 100
        if picture.ndim == 2:
            picture = matplotlib.colormaps[colors](picture)[..., :3]
        larger = picture.repeat(size // len(picture), 0)
        larger = larger.repeat(size // len(picture), 1)
        return np.pad(larger, ((1, 1), (1, 1), (0, 0)), constant_values=1)

    rows = [
        np.concatenate([tile(image, "gray"), *(tile(p, colors) for p in of_blocks)], 1)
        for image, *of_blocks in zip(images, *pictures, strict=True)
    ]
    return np.concatenate(rows)


def draw(examples: dict, results: list[dict]) -> Figure:
    """Filters; activations and Grad-CAM by example and block; numbers by block."""
    figure, axes = study.figure(7.2, 7.4, nrows=4, height_ratios=(1, 4, 4, 3))
    beside = ((0, 0), (0, 0), (0, 1), (0, 0))
    filters = np.pad(np.array(examples["filters"]) / 100, beside, constant_values=1)
    axes[0, 0].imshow(
        np.concatenate(filters, 1).squeeze(), cmap="gray", interpolation="none"
    )
    axes[0, 0].set_title("(a) first-layer filters", loc="left")
    tile = len(examples["images"][0]) + 2
    for row, title, name, colors in (
        (1, "(b) activations", "activations", "gray"),
        (2, "(c) Grad-CAM", "cams", "inferno"),
    ):
        axes[row, 0].imshow(
            mosaic(examples["images"], examples[name], colors), interpolation="none"
        )
        axes[row, 0].set_title(title, loc="left")
        labels = ["image", *examples["blocks"]]
        axes[row, 0].set_xticks((0.5 + np.arange(len(labels))) * tile, labels)
        axes[row, 0].set_xlabel("block")
    for panel in axes[:3, 0]:
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        panel.set_yticks([])
    axes[0, 0].set_xticks([])
    halves = axes[3, 0].get_subplotspec().subgridspec(1, 2)
    axes[3, 0].remove()
    for half, title, name, label, style in (
        (0, "(d) nearest class mean", "nearest_mean_accuracy", "test accuracy (%)", 0),
        (1, "(e) area covered by Grad-CAM", "cam_area", "share of image (%)", 1),
    ):
        panel = figure.add_subplot(halves[half])
        samples = 100 * np.array([result[name] for result in results])
        numbers = 1 + np.arange(samples.shape[1])
        study.plot_seeds(panel, numbers, samples, **STYLES[style])
        panel.set(
            xlabel="block", ylabel=label, ylim=(0, 100), xticks=examples["blocks"]
        )
        panel.set_title(title, loc="left")
    return figure


def main(argv: list[str]) -> None:
    """Trains and measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    config = run_config(experiment.scale)
    results = experiment.seeds(measure, config)
    first = config | {"seed": study.SEEDS[0]}
    examples = experiment.cell(pictures, config=first, **SHOWN)
    experiment.save(draw(examples, results))


if __name__ == "__main__":
    command_line.run(main)
