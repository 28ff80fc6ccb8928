import numpy as np
import pytest
from scipy.special import softmax

from resnet_jax.report import analysis, calibration


def sampled(factor: float, examples: int = 4000, seed: int = 0):
    """Logits whose labels are drawn from the softmax of logits / factor."""
    rng = np.random.default_rng(seed)
    honest = rng.normal(scale=2, size=(examples, 5))
    labels = np.array([rng.choice(5, p=p) for p in softmax(honest, axis=1)])
    return honest * factor, labels


@pytest.mark.parametrize("factor", [0.1, 0.4, 1.0, 3.0, 10.0])
def test_temperature_is_found(factor):
    logits, labels = sampled(factor)
    assert calibration.temperature(logits, labels) == pytest.approx(factor, rel=0.07)


def test_error_of_hand_made_bins():
    # Four images at 90% of which two are right, and one at 60% that is right.
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]])
    labels = np.array([0, 0, 1, 1, 1])
    bins = calibration.reliability(np.log(probabilities), labels)
    assert bins.counts.sum() == 5
    assert calibration.calibration_error(bins) == pytest.approx((4 * 0.4 + 0.4) / 5)
    loss = calibration.negative_log_likelihood(np.log(probabilities), labels)
    expected = -np.log([0.9, 0.9, 0.1, 0.1, 0.6]).mean()
    assert loss == pytest.approx(expected)


def test_scaling_improves_calibration_with_and_without_a_validation_split():
    logits, labels = sampled(3.0)
    before = calibration.calibration_error(calibration.reliability(logits, labels))
    scaled, fitted = calibration.cross_fitted_temperature(logits, labels)
    after = calibration.calibration_error(calibration.reliability(scaled, labels))
    assert fitted == pytest.approx(3, rel=0.07)
    assert before > 0.1
    assert after < 0.03
    # A label changes the scaling of the other half alone.
    labels[0] = (labels[0] + 1) % 5
    changed, _ = calibration.cross_fitted_temperature(logits, labels)
    np.testing.assert_array_equal(changed[::2], scaled[::2])
    assert not np.array_equal(changed[1::2], scaled[1::2])


def test_the_reported_split_is_scaled_by_the_temperature_of_the_validation_split():
    logits, labels = sampled(3.0)
    found = analysis._calibration(logits, labels, sampled(3.0, seed=1))
    assert found["held_out"]
    assert found["temperature"] == pytest.approx(3, rel=0.07)
    scaled = logits / found["temperature"]
    loss = calibration.negative_log_likelihood(scaled, labels)
    assert found["after"]["loss"] == pytest.approx(loss)
    assert found["after"]["error"] < 0.03 < 0.1 < found["before"]["error"]


def test_interval_is_wilsons():
    """Of 8 in 10, as in textbooks."""
    assert analysis.interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_layers_are_in_the_order_of_their_numbers():
    names = ["stem_conv", "stage1_block2/conv1", "stage1_block10/conv1", "classifier"]
    assert analysis._ordered(sorted(names)) == names


def test_a_certain_network_is_in_the_last_bin():
    logits = np.array([[1000.0, 0], [0, 1000.0]])
    bins = calibration.reliability(logits, np.array([0, 1]))
    assert bins.counts[-1] == 2
    assert calibration.calibration_error(bins) == 0


def test_a_confidence_between_two_bins_is_in_the_lower_one():
    bins = calibration.reliability(np.zeros((4, 5)), np.arange(4))
    (place,) = np.flatnonzero(bins.counts)
    assert (place + 1) / calibration.BINS == 1 / 5


def test_one_example_cannot_be_scaled_by_another():
    logits, labels = np.float32([[1.0, 0.0]]), np.array([0])
    scaled, fitted = calibration.cross_fitted_temperature(logits, labels)
    np.testing.assert_array_equal(scaled, logits)
    assert fitted == 1
