import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.flatten_util import ravel_pytree

from experiments import loss_landscape, study, trained
from resnet_jax import models
from tests.quick import quick_jit, random_variables


def small_loss():
    """A loss of 372 parameters, in which nothing is zero, and where it is taken."""
    net = models.resnet(1, 8, 10, width=1)
    variables, rng = random_variables(net, (8, 8, 1)), np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((16, 8, 8, 1)), jnp.float32)
    labels = rng.integers(0, 10, 16)
    loss = loss_landscape.make_loss(net, variables["batch_stats"], images, labels)
    return loss, variables, net, images, labels


@pytest.mark.slow
def test_the_extreme_eigenvalues_are_those_of_a_dense_hessian(monkeypatch):
    """The dense one is JAX's own, of a network of JAX's own convolutions."""
    loss, variables, *_ = small_loss()
    product, length = loss_landscape.make_hessian_product(loss, variables["params"])
    rng = np.random.default_rng(1)
    largest, smallest = loss_landscape.extremes(product, length, rng)
    monkeypatch.setattr(models, "convolve", lax.conv_general_dilated)
    loss, *_ = small_loss()
    flat, unravel = ravel_pytree(variables["params"])
    dense = quick_jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
    expected = np.linalg.eigvalsh(np.asarray(dense, np.float64))
    np.testing.assert_allclose(largest, expected[:-6:-1], rtol=2e-3)
    np.testing.assert_allclose(smallest, expected[:5], rtol=2e-3)


def test_directions_have_the_norm_of_each_filter():
    net = models.resnet(1, 8, 10, width=4)
    params = random_variables(net, (8, 8, 1))["params"]
    direction = loss_landscape.filter_normalized(np.random.default_rng(0), params)
    kernel, drawn = (
        tree["stage2_block1"]["conv1"]["kernel"] for tree in (params, direction)
    )
    for filter_ in range(8):
        assert np.linalg.norm(drawn[..., filter_]) == pytest.approx(
            np.linalg.norm(kernel[..., filter_]), rel=1e-5
        )
    assert not direction["stage2_block1"]["bn1"]["scale"].any()


@pytest.mark.slow
def test_surface_is_the_loss_at_moved_parameters():
    loss, variables, net, images, labels = small_loss()
    params = variables["params"]
    rng = np.random.default_rng(1)
    x, y = (loss_landscape.filter_normalized(rng, params) for _ in range(2))
    losses = loss_landscape.surface(loss, params, (x, y), 3)
    assert losses.shape == (3, 3)
    moved = jax.tree.map(lambda p, x, y: p - x + y, params, x, y)
    logits = quick_jit(net.apply)(variables | {"params": moved}, images)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert losses[0, 2] == pytest.approx(float(expected), rel=1e-4)


def test_profile_of_a_cone():
    axis = np.linspace(-1, 1, 9)
    distances, losses = loss_landscape.profile(np.hypot(*np.meshgrid(axis, axis)))
    np.testing.assert_allclose(distances, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(losses, distances, atol=0.13)


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, quick_training):
    monkeypatch.chdir(tmp_path)
    tiny = {"networks": ((8, True),), "points": 3, "examples": 16}
    monkeypatch.setitem(loss_landscape.SCALES, "smoke", tiny)
    monkeypatch.setattr(study, "SEEDS", (0,))
    run_config = trained.run_config
    monkeypatch.setattr(
        trained,
        "run_config",
        lambda *args, **smaller: (
            run_config(*args, **smaller) | {"steps": 2, "epochs": 1}
        ),
    )
    loss_landscape.main(["loss_landscape", f"--out={tmp_path / 'results'}"])
    line = json.loads((tmp_path / "results" / "smoke.jsonl").read_text())
    assert len(line["result"]["largest"]) == 5
    assert (tmp_path / "results" / "smoke.png").exists()
