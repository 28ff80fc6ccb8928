from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments import arrangements
from experiments.arrangements import of_order, of_shortcut
from resnet_jax import cost, models, trained
from resnet_jax.config import build_network
from tests.quick import quick_jit


def drawn(net):
    """Variables whose BatchNorms scale and shift, and images."""
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) ** 2,
        variables,
    )
    return variables, jnp.asarray(rng.standard_normal((4, 8, 8, 1)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("activation", ["post", "pre"])
@pytest.mark.parametrize(
    ("version", "depth", "block"), [(1, 14, "basic"), (2, 20, "bottleneck")]
)
def test_the_orders_of_the_standard_blocks_give_their_logits(
    version, depth, block, activation, train
):
    net = models.resnet(version, depth, 10, width=4, activation=activation)
    order = "original" if activation == "post" else "full pre-activation"
    ours = of_order(net, order).clone(activation=activation)
    variables, images = drawn(net)

    def logits(net):
        apply = partial(net.apply, train=train, mutable="batch_stats")
        return quick_jit(apply)(variables, images)[0]

    np.testing.assert_allclose(logits(ours), logits(net), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "residual"), [("identity", True), ("none (plain)", False)]
)
def test_constant_shortcuts_of_1_and_0_are_the_standard_networks(kind, residual):
    net = models.resnet(1, 14, 10, width=4, residual=residual)
    ours = of_shortcut(models.resnet(1, 14, 10, width=4), arrangements.SHORTCUTS[kind])
    variables, images = drawn(net)
    np.testing.assert_allclose(
        *(quick_jit(each.apply)(variables, images) for each in (ours, net)), rtol=1e-5
    )


def test_networks_that_differ_in_their_blocks_are_told_apart():
    assert trained.own_network(build_network(config(8), 10), config(8)) == ""
    half, gated = (
        arrangements.with_shortcut(kind, config(8), 10)
        for kind in ("shortcut x 0.5", "shortcut gate, bias 0")
    )
    names = [trained.own_network(net, config(8)) for net in (half, gated)]
    assert names[0].startswith("ShortcutBlock(kind=('constant', 0.5, 1.0)) blocks")
    assert len(set(names)) == 2


def count(net) -> int:
    return cost.count_parameters(models.zeros(net, (32, 32, 3))["params"])


def config(depth: int, **model):
    settings = common.default()
    settings.model.update(depth=depth, **model)
    return settings


@pytest.mark.slow
@pytest.mark.parametrize("order", arrangements.ORDERS)
def test_every_order_has_as_many_parameters(order):
    """A convolution has one BatchNorm, wherever it stands."""
    assert count(arrangements.ordered(order, config(20), 10)) == 269_722


@pytest.mark.slow
def test_parameters_of_the_shortcuts():
    found = {
        kind: count(arrangements.with_shortcut(kind, config(20), 10))
        for kind in arrangements.SHORTCUTS
    }
    blocks = [(16, 16)] * 3 + [(16, 32)] + [(32, 32)] * 2 + [(32, 64)] + [(64, 64)] * 2
    kernels = sum(inputs * outputs for inputs, outputs in blocks)
    features = sum(outputs for _, outputs in blocks)
    for kind, number in found.items():
        extra = {"gate": kernels + features, "1x1": kernels + 2 * features}
        expected = sum(extra[word] for word in extra if word in kind)
        assert number == 269_722 + expected, kind


@pytest.mark.slow
def test_a_gate_that_is_shut_leaves_the_shortcut_and_an_open_one_the_branch():
    kinds = {bias: ("exclusive gate", bias) for bias in (-1e4, 1e4)}
    base = models.resnet(1, 8, 10, width=4)
    nets = {bias: of_shortcut(base, kind) for bias, kind in kinds.items()}
    for bias, net in nets.items():
        variables, images = drawn(net)
        shared = of_shortcut(base, ("constant", bias < 0, bias > 0))
        found, expected = (
            quick_jit(each.apply)(variables, images) for each in (net, shared)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_dropout_drops_half_of_the_shortcut_in_training_alone_and_in_a_loop():
    settings = config(20, width=4, scan=True)
    net = arrangements.with_shortcut("dropout 0.5", settings, 10)
    variables, images = drawn(net)

    @quick_jit
    def logits(key):
        more = {"train": True, "mutable": "batch_stats", "rngs": {"dropout": key}}
        return net.apply(variables, images, **more)[0]

    first, second = (logits(jax.random.key(seed)) for seed in (0, 1))
    assert not np.allclose(first, second, rtol=1e-2)
    identity = arrangements.with_shortcut("identity", settings, 10)
    np.testing.assert_allclose(
        *(quick_jit(each.apply)(variables, images) for each in (net, identity)),
        rtol=1e-5,
    )


@pytest.mark.slow
def test_relu_only_preactivation_ends_with_a_relu():
    net = arrangements.ordered("ReLU-only pre-activation", config(14, width=4), 10)
    variables, images = drawn(net)

    @quick_jit
    def last(variables, images):
        _, state = net.apply(
            variables,
            images,
            capture_intermediates=lambda module, _: module.name == "stage3_block2",
            mutable="intermediates",
        )
        return state["intermediates"]["stage3_block2"]["__call__"][0]

    assert last(variables, images).min() >= 0
