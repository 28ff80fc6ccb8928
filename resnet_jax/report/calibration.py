"""How far a network's confidence can be trusted, and temperature scaling.

Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

BINS = 15  # as in the paper
Logits = Float[np.ndarray, "examples classes"]
Labels = Int[np.ndarray, "examples"]


class Bins(NamedTuple):
    """Examples by confidence, in bins of equal width; NaN where a bin is empty."""

    counts: np.ndarray
    confidence: np.ndarray  # mean of each bin
    accuracy: np.ndarray


def reliability(logits: Logits, labels: Labels) -> Bins:
    """Confidence against accuracy, for the reliability diagram (section 2)."""
    probabilities = softmax(np.float64(logits), axis=-1)
    confidence = probabilities.max(1)
    correct = probabilities.argmax(1) == labels
    # Bin m holds the confidences in ((m-1)/M, m/M].
    places = np.ceil(confidence * BINS).clip(1, BINS).astype(int) - 1
    counts = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Bins(
            counts,
            np.bincount(places, confidence, BINS) / counts,
            np.bincount(places, correct, BINS) / counts,
        )


def calibration_error(bins: Bins) -> float:
    """The expected calibration error, ECE (equation 3)."""
    gaps = np.nan_to_num(np.abs(bins.accuracy - bins.confidence))
    return float(bins.counts @ gaps / bins.counts.sum())


def negative_log_likelihood(logits: Logits, labels: Labels) -> float:
    scores = log_softmax(np.float64(logits), axis=-1)
    return -float(np.take_along_axis(scores, labels[:, None], axis=1).mean())


def temperature(logits: Logits, labels: Labels) -> float:
    """The logits' divisor with the smallest NLL (section 4.2), from 1/20 to 20."""
    bound = np.log(20.0)
    result = minimize_scalar(
        lambda log: negative_log_likelihood(logits / np.exp(log), labels),
        bounds=(-bound, bound),
        method="bounded",
    )
    return float(np.exp(result.x))


def cross_fitted_temperature(logits: Logits, labels: Labels) -> tuple[Logits, float]:
    """Scales each half of the examples by the temperature that the other half gives.

    For use where there is no other split to fit on: no example's own label is used for
    it. Returns the logits, and the mean of both temperatures; a single example
    stays as it is.
    """
    if len(labels) < 2:
        return logits, 1.0
    halves = np.arange(len(labels)) % 2
    fitted = np.array(
        [temperature(logits[halves != half], labels[halves != half]) for half in (0, 1)]
    )
    return logits / fitted[halves][:, None], float(fitted.mean())
