import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments import plain_linen
from resnet_jax import models
from resnet_jax.step import Batch, TrainState, make_train_step


@pytest.mark.slow
@pytest.mark.parametrize(("version", "depth"), [(1, 8), (2, 11)])
def test_benchmark_and_its_peer_compute_the_same_step(version, depth):
    """The variables have the same names, so one network's start in the other."""
    net = models.resnet(version, depth, 10)
    variables = models.initialize(net, jax.random.key(0), (16, 16, 3))
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.01, momentum=0.9))
    opt_state = tx.init(variables["params"])
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    labels = np.arange(8, dtype=np.int32)

    config = common.get_config("paper", version, depth)
    config.augment.update(crop=0.0, flip=False)
    normalization = (np.zeros(3, np.float32), np.ones(3, np.float32))
    step = make_train_step(net, tx, config, normalization)
    state = TrainState(jnp.int32(0), **variables, opt_state=opt_state)
    batch = Batch(jnp.asarray(images), jnp.asarray(labels), jnp.arange(8))
    ours, metrics = jax.jit(step)(state, batch, jax.random.key(0))

    plain_step = plain_linen.make_train_step(plain_linen.ResNet(version, depth), tx)
    params, batch_stats, _, loss = plain_step(
        variables["params"],
        variables["batch_stats"],
        opt_state,
        images.astype(np.float32) / 255,
        labels,
    )
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    for a, b in zip(
        jax.tree.leaves((ours.params, ours.batch_stats)),
        jax.tree.leaves((params, batch_stats)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_augmented_batch_holds_crops_of_its_images():
    images = np.arange(2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1) + 1
    batch = plain_linen.augmented_batch(np.random.default_rng(0), images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for image, source in zip(batch, padded, strict=True):
        crops = [source[r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
        crops += [crop[:, ::-1] for crop in crops]
        assert any(np.array_equal(image, crop) for crop in crops)
