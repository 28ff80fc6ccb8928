import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments import stochastic_depth
from experiments.stochastic_depth import stochastic, survival
from resnet_jax import models


def config(depth: int):
    settings = common.default()
    settings.model.update(depth=depth, width=4)
    return settings


def drawn(net):
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    images = np.random.default_rng(0).standard_normal((4, 8, 8, 1))
    return variables, jnp.asarray(images, jnp.float32)


def test_survival_falls_linearly_to_the_last_blocks():
    chances = [survival(number, 54, 0.5) for number in range(1, 55)]
    assert chances[0] == pytest.approx(1 - 0.5 / 54)
    assert chances[-1] == 0.5
    np.testing.assert_allclose(np.diff(chances), -0.5 / 54)
    # Section 4 of the paper: of 54 blocks about 40 are there in an update.
    assert sum(chances) == pytest.approx(40, abs=0.5)


@pytest.mark.slow
def test_blocks_that_all_survive_are_the_ordinary_network():
    net = models.resnet(1, 14, 10, width=4)
    variables, images = drawn(net)
    ours = stochastic(1.0, config(14), 10)
    for train in (False, True):
        got, expected = (
            some.apply(
                variables,
                images,
                train=train,
                mutable="batch_stats",
                rngs={"dropout": jax.random.key(0)},
            )[0]
            for some in (ours, net)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_blocks_are_kept_or_left_out_whole_and_weighted_afterwards():
    net = stochastic(0.0, config(8), 10)  # survivals 2/3, 1/3 and 0
    variables, images = drawn(net)

    @jax.jit
    def train(key):
        rngs = {"dropout": jax.random.key(key)}
        return net.apply(
            variables, images, train=True, mutable="batch_stats", rngs=rngs
        )[0]

    outputs = {np.asarray(train(key)).round(4).tobytes() for key in range(40)}
    assert len(outputs) == 4  # two blocks that may be there, and one that never is

    def scaled(factor):
        last = variables["params"]["stage3_block1"]["bn2"]
        other = jax.tree.map(lambda leaf: leaf, variables)
        other["params"]["stage3_block1"]["bn2"] = {
            name: factor * leaf for name, leaf in last.items()
        }
        return net.apply(other, images)

    np.testing.assert_array_equal(scaled(1.0), scaled(100.0))
    assert stochastic_depth.SURVIVALS[0] == 1
