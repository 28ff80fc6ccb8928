import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from resnet_jax import models, optimizers
from tests.quick import quick_jit

RATES = (0.1, 0.1, 0.03, 0.2)


def settings(name="sgd", **changes) -> ConfigDict:
    """`config.optimizer` without decay, unless it is among the changes."""
    config = common.default().optimizer
    config.update(name=name, weight_decay=0.0)
    config.update(**changes)
    return config


def random_tree(seed):
    """Parameters of a small network, or gradients of them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "conv": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)},
        "bn": {"scale": draw(4), "bias": draw(4)},
        "classifier": {"kernel": draw(4, 3), "bias": draw(3)},
    }


def trained(config, params, gradients, rates=RATES):
    """The parameters after each update."""
    tx = optimizers.optimizer(config, lambda step: jnp.asarray(rates)[step])
    state, history = tx.init(params), []

    @quick_jit
    def update(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = update(gradient, state, params)
        history.append(jax.device_get(params))
    return history


def assert_same(tree, expected):
    def same(path, a, b):
        np.testing.assert_allclose(
            a, b, rtol=2e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(same, tree, expected)


# The definitions, for one parameter `w`: each yields the direction of an update when
# it is sent the gradient, and `w` moves by -rate * direction.


def sgd(momentum, nesterov=False):
    """torch.optim.SGD: the rate is outside of the momentum, as it is not in Caffe."""
    buffer = 0
    g, _ = yield
    while True:
        buffer = momentum * buffer + g
        g, _ = yield g + momentum * buffer if nesterov else buffer


def adam(epsilon=1e-8, nesterov=False):
    """Kingma and Ba 2015, algorithm 1; torch.optim.Adam.

    Nesterov: Dozat 2016, with a constant beta1; torch.optim.NAdam has a schedule of it.
    """
    m = v = t = 0
    g, _ = yield
    while True:
        t += 1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t)
        if nesterov:
            step = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        g, _ = yield step / (np.sqrt(v / (1 - 0.999**t)) + epsilon)


def rmsprop(momentum, epsilon):
    """Keras: epsilon under the root, rho .9 (Torch: beside it, alpha .99)."""
    v = buffer = 0
    g, _ = yield
    while True:
        v = 0.9 * v + 0.1 * g**2
        buffer = momentum * buffer + g / np.sqrt(v + epsilon)
        g, _ = yield buffer


def adagrad():
    """Keras: the sum starts at .1, epsilon 1e-7 under the root (Torch: 0, 1e-10)."""
    total = 0.1
    g, _ = yield
    while True:
        total = total + g**2
        g, _ = yield g / np.sqrt(total + 1e-7)


def adadelta():
    """Zeiler 2012, algorithm 1; torch.optim.Adadelta."""
    squares = moves = 0
    g, _ = yield
    while True:
        squares = 0.9 * squares + 0.1 * g**2
        move = np.sqrt(moves + 1e-6) / np.sqrt(squares + 1e-6) * g
        moves = 0.9 * moves + 0.1 * move**2
        g, _ = yield move


def lars(momentum, adapted):
    """You et al. 2017, but with decay in the gradient's norm, and the rate outside."""
    buffer = 0
    g, w = yield
    while True:
        trust = 0.001 * np.linalg.norm(w) / np.linalg.norm(g) if adapted else 1
        buffer = momentum * buffer + trust * g
        g, w = yield buffer


def lion():
    """Chen et al. 2023, algorithm 2."""
    m = 0
    g, _ = yield
    while True:
        sign = np.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        g, _ = yield sign


def reference(definition, params, gradients, coupled=0.0, decoupled=0.0):
    """The parameters after each update by a definition, in float64."""

    def run(path, w, *gs):
        w, rule, found = w.astype(np.float64), definition(path), []
        next(rule)
        for rate, g in zip(RATES, gs, strict=True):
            direction = rule.send((g.astype(np.float64) + coupled * w, w))
            w = w - rate * (direction + decoupled * w)
            found.append(w)
        return np.stack(found)

    stacked = jax.tree_util.tree_map_with_path(run, params, *gradients)
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(RATES))]


def lars_of_leaf(path):
    return lars(0.9, adapted=path[-1].key == "kernel")


DEFINITIONS = {
    "sgd": ({}, lambda _: sgd(0.9)),
    "sgd without momentum": ({"momentum": 0.0}, lambda _: sgd(0)),
    "sgd with another momentum": ({"momentum": 0.5}, lambda _: sgd(0.5)),
    "sgd nesterov": ({"nesterov": True}, lambda _: sgd(0.9, True)),
    "adam": ({}, lambda _: adam()),
    "adam with another epsilon": ({"epsilon": 0.1}, lambda _: adam(0.1)),
    "adam nesterov": ({"nesterov": True}, lambda _: adam(nesterov=True)),
    "adamw": ({}, lambda _: adam()),
    "rmsprop": ({}, lambda _: rmsprop(0.9, 1e-8)),
    "rmsprop plain": (
        {"momentum": 0.0, "epsilon": 0.1},
        lambda _: rmsprop(0, 0.1),
    ),
    "adagrad": ({}, lambda _: adagrad()),
    "adadelta": ({}, lambda _: adadelta()),
    "lars": ({}, lars_of_leaf),
    "lion": ({}, lambda _: lion()),
}


def test_every_optimizer_has_a_definition_here():
    assert {name.split()[0] for name in DEFINITIONS} == set(optimizers.OPTIMIZERS)


@pytest.mark.parametrize("decay", ["none", "coupled", "decoupled"])
@pytest.mark.parametrize("case", DEFINITIONS)
def test_updates_are_those_of_the_definition(case, decay):
    changes, definition = DEFINITIONS[case]
    params = random_tree(0)
    gradients = [random_tree(seed) for seed in range(1, 5)]
    weight = 0.0 if decay == "none" else 0.05
    config = settings(case.split()[0], weight_decay=weight, **changes)
    if decay != "none":
        config.decay = decay
    # AdamW is Adam with decoupled decay (Loshchilov and Hutter 2019), always.
    outside = decay == "decoupled" or config.name in ("adamw", "lion")
    weights = {"decoupled": weight} if outside else {"coupled": weight}
    expected = reference(definition, params, gradients, **weights)
    for got, wanted in zip(trained(config, params, gradients), expected, strict=True):
        assert_same(got, wanted)


def decayed_leaves(config, params):
    """Which leaves move when all gradients are zero."""
    zeros = jax.tree.map(np.zeros_like, params)
    (after,) = trained(config, params, [zeros])
    return jax.tree.map(lambda a, b: bool((a != b).all()), after, params)


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize(
    ("decay_on", "expected"),
    [
        ("all", ["kernel", "bias", "scale"]),
        ("kernels", ["kernel"]),
        ("convolutions", []),
    ],
)
def test_decay_on_chooses_the_parameters(decay_on, expected, decay):
    config = settings(weight_decay=0.1, decay=decay, decay_on=decay_on)
    params = random_tree(0) | {"stage1_blocks": {}, "stage2_block1": {}}
    # What nn.scan makes of two blocks, and a block by itself.
    params["stage1_blocks"] = jax.tree.map(
        lambda *leaves: np.stack(leaves), random_tree(1), random_tree(2)
    )
    params["stage2_block1"] = random_tree(3)
    for path, moved in jax.tree_util.tree_leaves_with_path(
        decayed_leaves(config, params)
    ):
        layer, kind = path[-2].key, path[-1].key
        convolution = layer == "conv" and kind == "kernel"
        assert moved == (kind in expected or convolution), path


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    ("version", "depth", "variant"),
    [(1, 20, "paper"), (2, 29, "paper"), (1, 20, "keras")],
)
def test_convolutions_of_networks_decay_and_nothing_else(version, depth, variant, scan):
    net = models.resnet(version, depth, 10, variant=variant, scan=scan, width=2)
    shapes = models.zeros(net, (8, 8, 3))["params"]
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    config = settings(weight_decay=0.1, decay_on="convolutions")
    for path, moved in jax.tree_util.tree_leaves_with_path(
        decayed_leaves(config, params)
    ):
        name = jax.tree_util.keystr(path)
        assert moved == ("kernel" in name and "classifier" not in name), name


@pytest.mark.parametrize(
    ("name", "clip_norm"),
    [*((name, 0.0) for name in optimizers.OPTIMIZERS), ("sgd", 1)],
)
def test_stacking_blocks_for_scan_changes_no_update(name, clip_norm):
    params = {f"stage1_block{b}": random_tree(b) for b in (1, 2, 3)}
    # Blocks of unlike sizes, which a norm over all of them would mix.
    params["stage1_block3"] = jax.tree.map(lambda x: 10 * x, params["stage1_block3"])
    gradients = [
        {f"stage1_block{b}": random_tree(10 * s + b) for b in (1, 2, 3)} for s in (1, 2)
    ]
    config = settings(
        name, weight_decay=0.01, decay_on="convolutions", clip_norm=clip_norm
    )
    unrolled = trained(config, params, gradients)
    stacked = trained(config, *map(models.stack, (params, gradients)))
    for first, second in zip(unrolled, stacked, strict=True):
        assert_same(models.unstack(second), first)


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_clipping_scales_the_whole_gradient_to_its_norm(clip_norm):
    params, gradient = random_tree(0), random_tree(1)
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    assert 0.5 < norm < 100
    factor = min(1, clip_norm / norm)
    expected = jax.tree.map(lambda w, g: w - 0.1 * factor * g, params, gradient)
    config = settings(momentum=0.0, clip_norm=clip_norm)
    assert_same(trained(config, params, [gradient])[0], expected)


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_decay_is_not_clipped(decay):
    params, gradient = random_tree(0), random_tree(1)
    norm = math.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    expected = jax.tree.map(
        lambda w, g: w - 0.1 * (0.5 * g / norm + 0.3 * w), params, gradient
    )
    config = settings(momentum=0.0, clip_norm=0.5, weight_decay=0.3, decay=decay)
    assert_same(trained(config, params, [gradient])[0], expected)


@pytest.mark.parametrize(("of_batch", "peak"), [(0, 0.1), (256, 0.4), (2048, 0.05)])
def test_linear_rule_multiplies_the_rate_by_the_batch(of_batch, peak):
    config = common.default()
    config.batch_size = 1024
    config.optimizer.linear_rate_batch = of_batch
    assert optimizers.peak_rate(config) == pytest.approx(peak, rel=1e-12)


def rates(config, steps, total, per_epoch=1.0, peak=0.1):
    """The learning rate of each of some updates."""
    schedule = optimizers.schedule(config, peak, total, per_epoch)
    return np.asarray(quick_jit(jax.vmap(schedule))(jnp.asarray(steps)))


def schedule_of(name, **changes) -> ConfigDict:
    config = common.default().schedule
    config.update(name=name, **changes)
    return config


def test_paper_divides_the_rate_at_32k_and_48k_of_64k_updates():
    steps = [0, 1, 31_999, 32_000, 47_999, 48_000, 63_999]
    got = rates(schedule_of("step"), steps, 64_000, 390.625)
    np.testing.assert_allclose(got, [0.1] * 3 + [0.01] * 2 + [0.001] * 2, rtol=1e-6)


def test_paper_warms_up_deep_networks_for_400_updates_at_a_hundredth():
    config = common.get_config("paper", version=1, depth=110).schedule
    steps = [0, 1, 399, 400, 401, 31_999, 32_000, 47_999, 48_000, 63_999]
    expected = [0.01] * 3 + [0.1] * 3 + [0.01] * 2 + [0.001] * 2
    got = rates(config, steps, 64_000, 50_000 / 128)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def keras_rate(epoch):
    """`lr_schedule` of keras-team/keras, examples/cifar10_resnet.py."""
    rate = 1e-3
    if epoch > 180:
        rate *= 0.5e-3
    elif epoch > 160:
        rate *= 1e-3
    elif epoch > 120:
        rate *= 1e-2
    elif epoch > 80:
        rate *= 1e-1
    return rate


@pytest.mark.parametrize("per_epoch", [1563.0, 1562.5])
def test_keras_lowers_the_rate_behind_epochs_80_120_160_and_180(per_epoch):
    config = common.get_config("keras", version=1, depth=20)
    epochs = np.arange(200)
    first = np.ceil(epochs * per_epoch).astype(int)
    last = np.floor((epochs + 1) * per_epoch).astype(int) - 1
    total = math.ceil(200 * per_epoch)
    assert last[-1] == total - 1
    expected = [keras_rate(epoch) for epoch in epochs]
    for steps in (first, last):
        got = rates(
            config.schedule, steps, total, per_epoch, config.optimizer.learning_rate
        )
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("total", [1, 10, 997])
def test_cosine_falls_from_the_peak_to_zero_at_the_end(total):
    steps = np.arange(total + 1)
    got = rates(schedule_of("cosine"), steps, total)
    expected = 0.05 * (1 + np.cos(np.pi * steps / total))
    np.testing.assert_allclose(got, expected, atol=1e-8, rtol=1e-5)
    assert got[0] == np.float32(0.1)
    assert got[-1] == pytest.approx(0, abs=1e-8)


def test_cosine_behind_a_warm_up_takes_what_is_left():
    config = schedule_of("cosine", warmup_epochs=2.0)
    got = rates(config, np.arange(101), 100, per_epoch=10.0)
    np.testing.assert_allclose(got[:21], np.linspace(0.01, 0.1, 21), rtol=1e-5)
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(81) / 80))
    np.testing.assert_allclose(got[20:], expected, atol=1e-8, rtol=1e-5)


def test_warm_up_may_take_the_whole_run():
    config = schedule_of("cosine", warmup_epochs=2.0)
    got = rates(config, np.arange(15), 15, per_epoch=10.0)
    np.testing.assert_allclose(got, np.linspace(0.01, 0.1, 21)[:15], rtol=1e-5)


@pytest.mark.parametrize("name", ["step", "cosine", "onecycle", "constant"])
def test_a_run_without_updates_has_a_schedule(name):
    assert np.isfinite(rates(schedule_of(name), [0], 0)).all()


def test_onecycle_rises_for_three_tenths_and_falls_to_nothing():
    """Smith and Topin 2017, with cosines, as torch's OneCycleLR."""
    got = rates(schedule_of("onecycle"), np.arange(1001), 1000)
    up = 0.5 * (1 - np.cos(np.pi * np.arange(301) / 300))
    down = 0.5 * (1 + np.cos(np.pi * np.arange(701) / 700))
    lowest, end = 0.1 / 25, 0.1 / 25e4
    np.testing.assert_allclose(got[:301], lowest + (0.1 - lowest) * up, rtol=1e-4)
    np.testing.assert_allclose(
        got[300:], end + (0.1 - end) * down, rtol=1e-4, atol=1e-7
    )
    assert got.argmax() == 300
    assert got[[0, 300, 1000]] == pytest.approx([lowest, 0.1, end], rel=1e-4)


def test_constant_stays():
    got = rates(schedule_of("constant"), [0, 1, 50, 99], 100)
    assert (got == np.float32(0.1)).all()


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
@pytest.mark.parametrize("per_epoch", [8.0, 7.8125, 7.9])
def test_linear_warm_up_rises_from_its_factor_to_the_peak(name, per_epoch):
    config = schedule_of(name, warmup_epochs=4.0, warmup_factor=0.2)
    count = round(4 * per_epoch)
    got = rates(config, np.arange(count + 1), 1000, per_epoch)
    np.testing.assert_allclose(got, np.linspace(0.02, 0.1, count + 1), rtol=1e-5)


def test_a_name_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="does not build 'linear'"):
        optimizers.schedule(schedule_of("linear"), 0.1, 100, 1.0)


@pytest.mark.parametrize("name", ["constant", "step", "cosine"])
def test_constant_warm_up_stays_at_its_factor_and_jumps(name):
    config = schedule_of(name, warmup_epochs=4.0, warmup="constant", warmup_factor=0.2)
    got = rates(config, [0, 1, 39, 40], 1000, 10.0)
    np.testing.assert_allclose(got, [0.02, 0.02, 0.02, 0.1], rtol=1e-6)


@pytest.mark.parametrize("warmup_epochs", [0.0, 1.0, 3.7])
def test_boundaries_count_from_the_first_update_whatever_the_warm_up(warmup_epochs):
    config = schedule_of("step", warmup_epochs=warmup_epochs)
    got = rates(config, [499, 500, 749, 750, 999], 1000, per_epoch=100.0)
    np.testing.assert_allclose(got, [0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_boundaries_and_factors_may_be_one_or_many():
    config = schedule_of("step", boundaries=(0.25,), factors=(3.0,))
    got = rates(config, [0, 24, 25, 99], 100)
    np.testing.assert_allclose(got, [0.1, 0.1, 0.3, 0.3], rtol=1e-6)
    config = schedule_of("step", boundaries=(0.29,), factors=(3.0,))
    assert 0.29 * 100 < 29
    got = rates(config, [28, 29], 100)
    np.testing.assert_allclose(got, [0.1, 0.3], rtol=1e-6)
    config = schedule_of("step", boundaries=(), factors=())
    assert (rates(config, [0, 99], 100) == np.float32(0.1)).all()


@pytest.mark.parametrize("name", ["step", "cosine", "onecycle", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 4, 7])
def test_rates_of_very_short_runs_are_finite_and_positive(name, total):
    got = rates(schedule_of(name), np.arange(total), total)
    assert np.isfinite(got).all()
    assert (got > 0).all()
    assert got.max() <= np.float32(0.1)


def test_kernels_that_begin_as_zero_move_under_lars():
    """As those of `zero_init`, whose norm is no scale."""
    params = {"conv": {"kernel": np.zeros((3, 3, 2, 2), np.float32)}}
    gradient = jax.tree.map(np.ones_like, params)
    (after,) = trained(settings("lars"), params, [gradient])
    assert (after["conv"]["kernel"] < 0).all()


def test_kernels_without_a_gradient_stay_under_lars():
    """As those of a block that stochastic depth leaves out."""
    params = random_tree(0)
    (after,) = trained(settings("lars"), params, [jax.tree.map(np.zeros_like, params)])
    jax.tree.map(np.testing.assert_array_equal, after, params)


def test_frozen_parameters_keep_every_bit():
    params, gradient = random_tree(0), random_tree(1)
    params["conv"]["bias"][:] = -0.0
    config = settings(freeze="^conv", weight_decay=0.1)
    (after,) = trained(config, params, [gradient])
    for name, leaf in params["conv"].items():
        assert np.asarray(after["conv"][name]).tobytes() == leaf.tobytes()
    assert (after["classifier"]["bias"] != params["classifier"]["bias"]).all()


@pytest.mark.parametrize("version", [1, 2])
def test_biases_of_batch_norm_are_all_found(version):
    net = models.resnet(version, 20, 10, shortcut="B")
    params = models.zeros(net, (8, 8, 1))["params"]
    gradient = jax.tree.map(np.ones_like, params)
    config = settings(bn_bias_factor=3.0, momentum=0.0)
    (after,) = trained(config, params, [gradient], rates=[1.0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        module, name = path[-2].key, path[-1].key
        of_norm = name == "bias" and module != "classifier"
        assert (leaf == (-3 if of_norm else -1)).all(), path


@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
@pytest.mark.parametrize("factor", [0.0, 64.0])
def test_biases_of_batch_norm_have_a_rate_but_no_decay_of_their_own(decay, factor):
    params, gradient = random_tree(0), random_tree(1)

    def update(weight_decay, factor):
        config = settings(nesterov=True, weight_decay=weight_decay, decay=decay)
        config.bn_bias_factor = factor
        tx = optimizers.optimizer(config, optax.constant_schedule(0.1))
        return quick_jit(tx.update)(gradient, tx.init(params), params)[0]

    expected, plain = update(1e-2, 1.0), update(0.0, 1.0)["bn"]["bias"]
    change = expected["bn"]["bias"] - plain if factor else 0
    expected["bn"]["bias"] = factor * plain + change
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8),
        *(update(1e-2, factor), expected),
    )
