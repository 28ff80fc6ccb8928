import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import feature_visualisation, study, trained
from experiments.trained import Subject
from resnet_jax import models
from tests.quick import random_variables


@pytest.mark.slow
def test_grad_cam_of_the_last_block_is_the_class_activation_map():
    """Behind it come only a mean and a linear layer (Zhou et al. 2016)."""
    net = models.resnet(1, 8, 10, width=4)
    variables = random_variables(net, (16, 16, 1))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((6, 16, 16, 1)), jnp.float32)
    labels = rng.integers(0, 10, 6)
    subject = Subject({}, net, variables, images, labels)
    outputs, cams = feature_visualisation.block_maps(subject, images, labels)
    assert [cam.shape for cam in cams] == [(6, 16, 16), (6, 8, 8), (6, 4, 4)]
    kernel = variables["params"]["classifier"]["kernel"]
    expected = np.einsum("bhwc,cb->bhw", outputs[-1], kernel[:, labels])
    expected = np.maximum(expected, 0) / 16
    assert expected.any()
    np.testing.assert_allclose(cams[-1], expected, rtol=1e-4, atol=1e-6)


def test_nearest_mean_accuracy():
    means = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    labels = np.repeat([0, 1, 2], 20)
    noise = 0.3 * np.random.default_rng(0).standard_normal((2, 60, 2))
    fitted, features = means[labels] + noise
    accuracy = feature_visualisation.nearest_mean_accuracy
    assert accuracy(fitted, labels, features, labels) == 1
    moved = np.where(np.arange(60) < 15, 1, labels)  # 15 of the 60 are wrong
    assert accuracy(fitted, labels, features, moved) == 0.75


def test_area():
    even, point = np.ones((1, 4, 4)), np.zeros((1, 4, 4))
    point[0, 1, 2] = 5
    assert feature_visualisation.area(even) == pytest.approx(1)
    assert feature_visualisation.area(point) == pytest.approx(1 / 16)
    nothing = np.zeros((1, 4, 4))
    assert feature_visualisation.area(np.concatenate([even, nothing])) == 1


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, quick_training):
    monkeypatch.chdir(tmp_path)
    tiny = {"depth": 8, "image_size": 8, "epochs": 1}
    monkeypatch.setitem(feature_visualisation.SCALES, "smoke", tiny)
    monkeypatch.setattr(study, "SEEDS", (0,))
    run_config = trained.run_config
    monkeypatch.setattr(
        trained, "run_config", lambda *args: run_config(*args) | {"steps": 2}
    )
    out = tmp_path / "results"
    feature_visualisation.main(["feature_visualisation", f"--out={out}"])
    lines = (out / "smoke.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert len(lines[0]["result"]["cam_area"]) == 3
    assert len(lines[1]["result"]["cams"]) == 3
    assert (out / "smoke.png").exists()
