import json

import numpy as np
import pytest

from experiments import shattered_gradients


def test_predictions_are_the_papers():
    predicted = shattered_gradients.predicted
    assert predicted(False, True, 1.0, 10) == 2.0**-10
    assert predicted(True, False, 1.0, 10) == pytest.approx(0.75**10)
    tail = [predicted(True, True, 1.0, depth, centred=False) for depth in (1000, 4000)]
    assert tail[0] / tail[1] == pytest.approx(2, rel=1e-3)  # 1 / sqrt(L)


def test_predictions_hold_for_a_network_written_out_by_hand():
    """NumPy forward and back, without the experiment's code."""
    rng, width, depth = np.random.default_rng(0), 150, 12
    variances, correlations = [], []
    for _ in range(10):
        h = rng.standard_normal((300, width))
        kernels = rng.standard_normal((depth, width, width)) * (2 / width) ** 0.5
        slopes = []  # of relu(BatchNorm(h)), its statistics held
        for kernel in kernels:
            deviation = h.std(0)
            z = (h - h.mean(0)) / deviation
            slopes.append((z > 0) / deviation)
            h = h + np.maximum(z, 0) @ kernel
        variances.append(h.var(0).mean())
        gradients = np.tile(rng.standard_normal(width), (300, 1))
        for kernel, slope in zip(kernels[::-1], slopes[::-1], strict=True):
            gradients = gradients + gradients @ kernel.T * slope
        products = gradients @ gradients.T
        others = products.sum() - np.trace(products)
        correlations.append(others / 299 / np.trace(products))
    expected = 1 + depth * (1 - 1 / np.pi)
    assert np.mean(variances) == pytest.approx(expected, rel=0.03)
    predicted = shattered_gradients.predicted
    assert np.mean(correlations) == pytest.approx(
        predicted(True, True, 1.0, depth), abs=0.02
    )
    # The paper's formula is told apart from it.
    assert predicted(True, True, 1.0, depth, centred=False) > 0.05 + np.mean(
        correlations
    )


def test_white_noise_has_no_correlation_and_a_line_has():
    noise = np.random.default_rng(0).standard_normal(shattered_gradients.POINTS)
    assert abs(shattered_gradients.autocorrelation(noise)[1:]).max() < 0.2
    line = np.arange(shattered_gradients.POINTS, dtype=float)
    assert shattered_gradients.autocorrelation(line)[1] > 0.98
    vectors = np.random.default_rng(0).standard_normal((100, 50))
    assert abs(shattered_gradients.mean_correlation(vectors)) < 0.02
    alike = np.tile(vectors[:1], (10, 1))
    assert shattered_gradients.mean_correlation(alike) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "tolerance"), [(False, 0.02), (True, 0.03)])
def test_correlation_decays_as_predicted(residual, tolerance):
    result = shattered_gradients.measure(residual, True, 1.0, 4, 200, range(5))
    expected = shattered_gradients.predicted(residual, True, 1.0, 4)
    assert np.mean(result["correlation"]) == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch):
    tiny = {"width": 20, "depths": (2,), "seeds": 2}
    monkeypatch.setitem(shattered_gradients.SCALES, "smoke", tiny)
    shattered_gradients.main(["shattered_gradients", f"--out={tmp_path}"])
    lines = (tmp_path / "smoke.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert json.loads(lines[0])["settings"]["seeds"] == [0, 1]
    assert (tmp_path / "smoke.png").exists()
