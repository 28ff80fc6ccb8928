from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments import fixup
from resnet_jax import cost, models
from tests.quick import quick_jit


def build(kind: str, depth: int):
    config = common.default()
    config.model.update(depth=depth, width=4, scan=True)
    net = fixup.without_norm(kind, config, 10)
    return net, models.initialize(net, jax.random.key(0), (8, 8, 1))


def drawn():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((4, 8, 8, 1)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SkipInit", "Fixup"])
def test_blocks_begin_as_the_identity(kind):
    """So that depth changes nothing: the deeper network has the shallower's stem."""
    features, images = [], drawn()
    for depth in (8, 20):
        net, variables = build(kind, depth)
        params = variables["params"]
        params["stem_conv"]["kernel"] = np.full((3, 3, 1, 4), 0.1, np.float32)
        capture = partial(
            net.apply,
            capture_intermediates=lambda module, _: module.name == "features",
            mutable="intermediates",
        )
        _, state = quick_jit(capture)({"params": params}, images)
        features.append(state["intermediates"]["features"]["__call__"][0])
    assert features[0].std() > 0
    np.testing.assert_allclose(*features, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["He", "SkipInit", "Fixup"])
def test_without_norm_examples_do_not_touch_each_other(kind):
    net, variables = build(kind, 14)
    assert variables["batch_stats"] == {}
    # A checkpoint, whose blocks are apart, gives back arrays alone, and no numbers.
    assert all(leaf.ndim for leaf in jax.tree.leaves(models.unstack(variables)))
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])
    images = drawn()
    apply = quick_jit(partial(net.apply, train=True))
    logits = [apply({"params": params}, x) for x in (images, images[:1])]
    np.testing.assert_allclose(logits[0][:1], logits[1], rtol=1e-5)
    assert np.abs(logits[0][0] - logits[0][1]).max() > 0


@pytest.mark.slow
def test_fixup_draws_kernels_by_the_papers_rules():
    """Of 9 blocks of two convolutions, the first are scaled by 9^(-1/2)."""
    _, variables = build("Fixup", 20)
    _, standard = build("He", 20)
    params, he = variables["params"], standard["params"]
    for stage in (1, 2, 3):
        block, expected = (tree[f"stage{stage}_blocks"] for tree in (params, he))
        kernel = block["conv1"]["kernel"]
        assert kernel.std() == pytest.approx(expected["conv1"]["kernel"].std() / 3, 0.1)
        assert not block["conv2"]["kernel"].any()
        np.testing.assert_allclose(block["gain"] * 0.1**0.5, 1, rtol=1e-6)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["classifier"]))
    assert params["stem_conv"]["kernel"].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "learns_first"), [("SkipInit", "gain"), ("Fixup", "classifier")]
)
def test_what_begins_at_zero_gets_a_gradient(kind, learns_first):
    net, variables = build(kind, 14)

    def loss(params):
        logits = net.apply({"params": params}, drawn(), train=True)
        labels = jnp.arange(4)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = quick_jit(jax.grad(loss))(variables["params"])
    if learns_first == "gain":
        assert np.abs(gradient["stage2_blocks"]["gain"]).min() > 0
    else:
        assert optax.tree.norm(gradient["classifier"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["He", "SkipInit", "Fixup"])
def test_parameters_of_blocks_themselves_are_counted(kind):
    net, variables = build(kind, 14)
    counted = cost.totals(cost.layers(net, (8, 8, 1)))["params"]
    assert counted == cost.count_parameters(variables["params"])
