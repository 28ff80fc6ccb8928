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
from tests.quick import quick_jit, random_variables


def drawn(net):
    """Variables whose BatchNorms scale and shift, and images."""
    variables = models.initialize(net, jax.random.key(0), (8, 8, 1))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32) ** 2,
        variables,
    )
    return variables, images()


def images():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((4, 8, 8, 1)), jnp.float32)


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
    variables = random_variables(net, (8, 8, 1))

    def logits(net):
        apply = partial(net.apply, train=train, mutable="batch_stats")
        return quick_jit(apply)(variables, images())[0]

    np.testing.assert_allclose(logits(ours), logits(net), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "residual"), [("identity", True), ("none (plain)", False)]
)
def test_constant_shortcuts_of_1_and_0_are_the_standard_networks(kind, residual):
    net = models.resnet(1, 14, 10, width=4, residual=residual)
    ours = of_shortcut(models.resnet(1, 14, 10, width=4), arrangements.SHORTCUTS[kind])
    variables = random_variables(net, (8, 8, 1))
    np.testing.assert_allclose(
        *(quick_jit(each.apply)(variables, images()) for each in (ours, net)), rtol=1e-5
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


def reference(variables, x):
    """`conv(name, x)`, `bn(name, x)` and the original branch of a block, by hand."""
    params, kept = (tree["stage1_block2"] for tree in map(variables.get, KINDS))

    def conv(name, x):
        kernel = params[name]["kernel"]
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=layout
        )
        return y + params[name].get("bias", 0)

    def bn(name, x):
        inverse = (kept[name]["var"] + 1e-5) ** -0.5
        y = (x - kept[name]["mean"]) * inverse
        return y * params[name]["scale"] + params[name]["bias"]

    inner = jax.nn.relu(bn("bn1", conv("conv1", x)))
    return conv, bn, inner


def of_one_block(net, variables, images):
    """What the second block of the first stage reads and gives."""
    run = partial(net.apply, capture_intermediates=True, mutable="intermediates")
    found = quick_jit(run)(variables, images)[1]["intermediates"]
    return [found[f"stage1_block{n}"]["__call__"][0] for n in (1, 2)]


KINDS = ("params", "batch_stats")


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", ["BN after addition", "ReLU before addition", "ReLU-only pre-activation"]
)
def test_orders_are_those_of_figure_4(order):
    net = of_order(models.resnet(1, 14, 10, width=4), order)
    variables, images = drawn(net)
    x, found = of_one_block(net, variables, images)
    conv, bn, inner = reference(variables, x)
    relu = jax.nn.relu
    if order == "BN after addition":
        expected = relu(bn("bn2", x + conv("conv2", inner)))
    elif order == "ReLU before addition":
        expected = x + relu(bn("bn2", conv("conv2", inner)))
    else:
        first = relu(bn("bn1", conv("conv1", relu(x))))
        expected = x + bn("bn2", conv("conv2", first))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", arrangements.SHORTCUTS)
def test_shortcuts_are_those_of_table_1(kind):
    net = of_shortcut(models.resnet(1, 14, 10, width=4), arrangements.SHORTCUTS[kind])
    variables, images = drawn(net)
    x, found = of_one_block(net, variables, images)
    conv, bn, inner = reference(variables, x)
    y = bn("bn2", conv("conv2", inner))
    if "gate" in kind:
        bias = variables["params"]["stage1_block2"]["gate"]["bias"]
        np.testing.assert_allclose(bias, float(kind.split()[-1]), atol=2)
        gate = jax.nn.sigmoid(conv("gate", x))
        total = (1 - gate) * x + (gate * y if "exclusive" in kind else y)
    elif kind == "1x1 convolution":
        total = bn("shortcut_bn", conv("shortcut_conv", x)) + y
    else:
        total = {
            "identity": x + y,
            "none (plain)": y,
            "shortcut x 0.5": 0.5 * x + y,
            "both x 0.5": 0.5 * x + 0.5 * y,
            "dropout 0.5": x + y,  # in evaluation
        }[kind]
    np.testing.assert_allclose(found, jax.nn.relu(total), rtol=1e-4, atol=1e-4)


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
    alone = arrangements.with_shortcut("dropout 0.5", config(14, width=4), 10)
    found = alone.apply(
        *(drawn(alone)),
        train=True,
        capture_intermediates=True,
        mutable=["batch_stats", "intermediates"],
        rngs={"dropout": jax.random.key(0)},
    )[1]["intermediates"]
    read = np.array(found["stage1_block1"]["__call__"][0])
    kept = np.array(found["stage1_block2"]["Dropout_0"]["__call__"][0])
    np.testing.assert_allclose(kept[kept > 0], 2 * read[kept > 0])
    assert 0.4 < (kept[read > 0] == 0).mean() < 0.6
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
