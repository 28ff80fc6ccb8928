"""Measurements of a trained network on its data, for the report."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from scipy.special import softmax
from scipy.stats import binomtest

from resnet_jax import data, explain, freeze, models, trained
from resnet_jax.augment import normalize
from resnet_jax.predict import Predictor
from resnet_jax.report import calibration
from resnet_jax.trained import Trained

_MISTAKES = 12
_GRADIENT_IMAGES = 128


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Measurements of a network on its reported split.

    Attributes:
      confusion: int [true class, predicted class], numbers of images.
      mistakes: the most confident ones, see `_mistakes`.
      calibration: see `_calibration`.
      gradients: see `gradient_norms`.
      gradient_images: the number of training images that they are over.
    """

    confusion: np.ndarray
    mistakes: list[dict]
    calibration: dict
    gradients: dict[str, dict[str, float]]
    gradient_images: int


def analyse(run: Trained) -> Analysis:
    """Measures a run's network. Raises UserError if its data set is missing."""
    dataset = trained.load_data(run)
    images, labels = dataset.eval
    predictor = Predictor(run, len(labels))
    logits = predictor(images)
    confusion = np.zeros([len(run.inputs.class_names)] * 2, int)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    validation = dataset.validation
    held_out = validation and (predictor(validation.images), validation.labels)
    count = min(_GRADIENT_IMAGES, len(dataset.train.labels))
    return Analysis(
        confusion,
        _mistakes(run, images, labels, softmax(np.float64(logits), axis=-1)),
        _calibration(logits, labels, held_out),
        gradient_norms(run, *(array[:count] for array in dataset.train)),
        count,
    )


def interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    limits = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(limits.low), float(limits.high)


def _mistakes(
    run: Trained,
    images: np.ndarray | data.StreamedImages,
    labels: np.ndarray,
    probabilities: np.ndarray,
) -> list[dict]:
    """The wrong answers with the highest probability, and the evidence for them.

    Each has 'number' (of the image in its split), 'true', 'predicted', 'probability',
    'true_probability', 'image', and the overlays 'grad_cam' and 'integrated_gradients'
    for the predicted class.
    """
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    confidence = probabilities[wrong, predicted[wrong]]
    chosen = wrong[np.argsort(-confidence, kind="stable")][:_MISTAKES]
    if not len(chosen):
        return []
    shown = images[chosen]
    explanations = explain.Explainer(run)(shown, predicted[chosen])
    names = run.inputs.class_names
    return [
        {
            "number": int(number),
            "true": names[labels[number]],
            "predicted": names[predicted[number]],
            "probability": probabilities[number, predicted[number]],
            "true_probability": probabilities[number, labels[number]],
            "image": explain.enlarge(image),
            **explanations.overlays(place, image),
        }
        for place, (number, image) in enumerate(zip(chosen, shown, strict=True))
    ]


def _calibration(
    logits: np.ndarray,
    labels: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray] | None,
) -> dict:
    """Calibration before and after temperature scaling.

    Returns:
      'temperature', 'held_out' (whether it is fitted on the validation split), and
      under 'before' and 'after' each 'bins', 'error' (ECE) and 'loss' (NLL).
    """
    if held_out:
        fitted = calibration.temperature(*held_out)
        scaled = logits / fitted
    else:
        scaled, fitted = calibration.cross_fitted_temperature(logits, labels)
    result = {"temperature": fitted, "held_out": held_out is not None}
    for name, values in (("before", logits), ("after", scaled)):
        bins = calibration.reliability(values, labels)
        result[name] = {
            "bins": bins,
            "error": calibration.calibration_error(bins),
            "loss": calibration.negative_log_likelihood(values, labels),
        }
    return result


def gradient_norms(
    run: Trained, images: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """Norms of the loss's gradient on a batch, by layer from the input to the output.

    Returns:
      'at the start', unless the run began with other weights (`config.init_from`), and
      'at the end': for each convolution and the classifier, the norm of its kernel's
      gradient, unless it is frozen.
    """
    config, net = run.config, models.in_float32(run.net.clone(stochastic_depth=0.0))
    variables = {"at the end": run.variables}
    if config.optimizer.freeze:  # it names layers as the unrolled network does
        net = net.clone(scan=False)
        variables = {"at the end": models.unstack(run.variables)}

    @jax.jit
    def norms(variables, images, labels):
        def loss(params):
            with freeze.kept_statistics(config.optimizer):
                logits, _ = net.apply(
                    {**variables, "params": params},
                    normalize(images, *run.inputs.normalization),
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.key(config.seed)},
                )
            targets = jax.nn.one_hot(labels, net.num_classes, dtype=logits.dtype)
            targets = optax.smooth_labels(targets, config.label_smoothing)
            return optax.softmax_cross_entropy(logits, targets).mean()

        gradients = models.unstack(jax.grad(loss)(variables["params"]))
        return {
            keystr(path[:-1], simple=True, separator="/"): jnp.linalg.norm(leaf.ravel())
            for path, leaf in jax.tree.leaves_with_path(gradients)
            if path[-1].key == "kernel"
            and not freeze.is_frozen(config.optimizer, freeze.joined(path))
        }

    if not config.init_from:
        key = jax.random.key(config.seed)
        first = models.initialize(net, key, run.inputs.image_shape)
        variables = {"at the start": first} | variables
    by_layer = {when: norms(each, images, labels) for when, each in variables.items()}
    return {
        when: {name: float(each[name]) for name in _ordered(each)}
        for when, each in by_layer.items()
    }


def _ordered(names) -> list[str]:
    """Layers from the input to the output: stem, blocks by number, classifier."""

    def place(name: str):
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        return (not name.startswith("stem"), name.startswith("classifier"), numbers)

    return sorted(names, key=place)
