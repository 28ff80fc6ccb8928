from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from resnet_jax import augment, data, models
from resnet_jax.augment import normalize, statistics
from resnet_jax.averaged import make_statistics_call
from resnet_jax.config import build_network
from resnet_jax.plan import Plan
from resnet_jax.step import (
    METRICS,
    Batch,
    TrainState,
    create_state,
    epoch_order,
    make_train_call,
    make_train_step,
    resident_batches,
    streamed_batches,
)
from tests.quick import quick_jit, random_variables

NO_SUMS = dict.fromkeys(METRICS, np.float32(0))


def counting_run(examples: int, batch_size: int, ends: list[int], seed: int = 0):
    """How often each example was taken after each of the steps `ends`, in one run.

    The labels number the examples, and the 'step' counts them.
    """

    def count(state, batch, rng, *, axis_name):
        seen = state.params["seen"].at[batch.labels].add(1)
        zero = jnp.float32(0)
        metrics = {"loss": zero, "accuracy": zero, "gradient_norm": zero}
        return state.replace(step=state.step + 1, params={"seen": seen}), metrics

    longest = int(np.diff([0, *ends]).max())
    plan = Plan(examples, batch_size, ends[-1], steps_per_call=longest)
    call = quick_jit(make_train_call(lambda _: count, resident_batches(plan), None))
    numbers = jnp.arange(examples, dtype=jnp.int32)
    images = jnp.zeros((examples, 1, 1, 1), jnp.uint8)
    zeros = {"seen": jnp.zeros(examples, jnp.int32)}
    state = TrainState(jnp.int32(0), zeros, {}, ())
    positions, counts = jnp.arange(batch_size, dtype=jnp.int32), []
    for end in ends:
        split = images, numbers, positions, np.uint32(seed)
        state, _ = call(state, NO_SUMS, *split, jnp.int32(end), jnp.zeros(longest))
        counts.append(np.asarray(state.params["seen"]))
    return counts


@pytest.mark.parametrize(("examples", "batch_size"), [(12, 4), (10, 4), (7, 7), (9, 2)])
def test_every_epoch_takes_every_example_once(examples, batch_size):
    for step, counts in enumerate(
        counting_run(examples, batch_size, [*range(1, 21)]), 1
    ):
        taken = step * batch_size
        assert counts.sum() == taken
        assert counts.min() == taken // examples
        assert counts.max() == -(-taken // examples)


def test_every_step_of_every_seed_has_a_key_of_its_own():
    """Crops, flips, mixing and stochastic depth are drawn from it."""

    def keep(state, batch, rng, *, axis_name):
        seen = state.params["seen"].at[state.step].set(jax.random.key_data(rng))
        zero = jnp.float32(0)
        metrics = {"loss": zero, "accuracy": zero, "gradient_norm": zero}
        return state.replace(step=state.step + 1, params={"seen": seen}), metrics

    plan = Plan(8, 4, 6, steps_per_call=6)
    split = jnp.zeros((8, 1, 1, 1), jnp.uint8), jnp.zeros(8, jnp.int32)
    block = jnp.zeros((4, 6, 1, 1, 1), jnp.uint8), jnp.zeros((4, 6), jnp.int32)
    state = TrainState(jnp.int32(0), {"seen": jnp.zeros((6, 2), jnp.uint32)}, {}, ())
    resident = quick_jit(make_train_call(lambda _: keep, resident_batches(plan), None))
    streamed = quick_jit(make_train_call(lambda _: keep, streamed_batches, None))
    places, end, found = jnp.arange(4, dtype=jnp.int32), jnp.int32(6), []
    for seed in map(np.uint32, range(3)):
        until = places, seed, end, jnp.zeros(6)
        kept = resident(state, NO_SUMS, *split, *until)[0].params["seen"]
        other = streamed(state, NO_SUMS, *block, *until)[0]
        np.testing.assert_array_equal(kept, other.params["seen"])
        found += [key.tobytes() for key in np.asarray(kept)]
    assert len(set(found)) == 18


@pytest.mark.slow
def test_examples_mixing_and_the_network_draw_from_keys_of_their_own(
    setting, monkeypatch
):
    config, net, variables, batch, normalization = setting
    config = config.copy_and_resolve_references()
    config.augment.mixup = 1.0
    rng, keys = jax.random.key(1), []

    def mix(config, images, targets, key, plain):
        keys.append(key)
        return images, targets

    def apply(self, variables, images, *, rngs, **_):
        assert rngs["stochastic_depth"] == rngs["dropout"]
        keys.append(rngs["dropout"])
        return jnp.zeros((len(images), 10)), {"batch_stats": {}}

    monkeypatch.setattr("resnet_jax.step.mix", mix)
    monkeypatch.setattr(models.ResNet, "apply", apply)
    tx = optax.sgd(0.1)
    opt_state = tx.init(variables["params"])
    state = TrainState(jnp.int32(0), **variables, opt_state=opt_state)
    make_train_step(net, tx, config, normalization)(state, batch, rng)
    places = jnp.arange(config.batch_size)
    examples = jax.vmap(jax.random.fold_in, (None, 0))(rng, places)
    drawn = np.vstack([jax.random.key_data(key) for key in (examples, *keys)])
    assert len(keys) == 2
    assert len(np.unique(drawn, axis=0)) == len(drawn)


def test_a_device_augments_its_part_of_the_batch_as_one_device_would(
    setting, monkeypatch
):
    config, net, variables, batch, normalization = setting
    config = config.copy_and_resolve_references()
    config.augment.crop = 0.25
    seen = []

    def apply(self, variables, images, **_):
        seen.append(np.asarray(images))
        raise InterruptedError  # what is computed from them does not matter

    monkeypatch.setattr(models.ResNet, "apply", apply)
    state = TrainState(jnp.int32(0), **variables, opt_state=())
    step = make_train_step(net, optax.identity(), config, normalization)
    part = Batch(*(array[16:] for array in batch[:3]))
    for each in (batch, part):
        with pytest.raises(InterruptedError):
            step(state, each, jax.random.key(1))
    np.testing.assert_array_equal(seen[0][16:], seen[1])


def test_parts_of_a_batch_and_devices_drop_other_units_and_the_same_branches(
    setting, monkeypatch
):
    config, net, _, batch, normalization = setting
    config = config.copy_and_resolve_references()
    config.optimizer.accumulate = 2

    def apply(self, variables, images, *, rngs, **_):
        """Keeps in the statistics what each part of the batch draws."""
        seen = variables["batch_stats"]
        drawn = {name: jax.random.uniform(key) for name, key in rngs.items()}
        kept = {name: seen[name].at[seen["part"]].set(drawn[name]) for name in drawn}
        logits = jnp.zeros((len(images), 10)) + variables["params"]["bias"]
        return logits, {"batch_stats": {"part": seen["part"] + 1, **kept}}

    monkeypatch.setattr(models.ResNet, "apply", apply)
    seen = {"part": 0, "dropout": jnp.zeros(2), "stochastic_depth": jnp.zeros(2)}
    state = TrainState(jnp.int32(0), {"bias": jnp.float32(0)}, seen, ())
    step = make_train_step(net, optax.identity(), config, normalization)
    alone = step(state, batch, jax.random.key(1))[0].batch_stats
    on_both = jax.vmap(
        partial(step, axis_name="devices"),
        (None, Batch(0, 0, None, None), None),
        axis_name="devices",
    )
    twice = Batch(*(jnp.stack([array] * 2) for array in batch[:2]), batch.positions)
    means = on_both(state, twice, jax.random.key(1))[0].batch_stats
    assert alone["dropout"][0] != alone["dropout"][1]
    assert alone["stochastic_depth"][0] == alone["stochastic_depth"][1]
    assert (means["dropout"][0] != alone["dropout"]).all()
    np.testing.assert_array_equal(
        means["stochastic_depth"][0], alone["stochastic_depth"]
    )


def test_seeds_begin_with_other_weights():
    net, tx = models.resnet(1, 8, 10, width=2), optax.sgd(0.1)
    states = [create_state(net, tx, seed, (8, 8, 1)) for seed in (0, 1, 0)]
    kernels = [state.params["stem_conv"]["kernel"] for state in states]
    assert not np.allclose(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[0], kernels[2])


def test_order_depends_on_seed_and_epoch_but_not_on_calls():
    one_by_one = counting_run(20, 5, [1, 2, 3, 4, 5, 6])
    in_calls = counting_run(20, 5, [2, 6])
    np.testing.assert_array_equal(one_by_one[1], in_calls[0])
    np.testing.assert_array_equal(one_by_one[5], in_calls[1])
    assert (one_by_one[0] != counting_run(20, 5, [1, 6], seed=1)[0]).any()
    second_epoch = one_by_one[4] - one_by_one[3]
    assert (one_by_one[0] != second_epoch).any()


@pytest.fixture(scope="module")
def setting():
    """A config without augmentation, a network, its variables, and 32 digits."""
    config = digits.get_config()
    config.augment.update(crop=0.0, flip=False)
    dataset = data.load(config.dataset)
    net = models.resnet(1, 8, 10)
    variables = random_variables(net, dataset.image_shape)
    variables = jax.tree.map(jnp.asarray, variables)
    images, labels = (jnp.asarray(x[:32]) for x in dataset.train)
    batch = Batch(images, labels, jnp.arange(32))
    return config, net, variables, batch, statistics("mean", dataset.train.images)


def steps(setting, count, unmixed_from_step=float("inf"), **changes):
    """The states before and after each of some steps, and their metrics."""
    config, net, variables, batch, normalization = setting
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    tx = optax.sgd(0.1)
    state = TrainState(
        jnp.int32(0), **variables, opt_state=tx.init(variables["params"])
    )
    if config.optimizer.ema:
        state = state.replace(ema=state.trained)
    step = make_train_step(
        net, tx, config, normalization, unmixed_from_step=unmixed_from_step
    )
    step, states, metrics = quick_jit(step), [state], []
    for _ in range(count):
        state, measured = step(state, batch, jax.random.key(1))
        states.append(state)
        metrics.append(measured)
    return states, metrics


def one_step(setting, **changes):
    states, metrics = steps(setting, 1, **changes)
    return states[1], metrics[0]


def loss_and_gradient(setting, chosen, batch_stats):
    _, net, variables, batch, normalization = setting
    images = normalize(batch.images[chosen], *normalization)
    (loss, changed), gradient = of_batch(
        net, variables["params"], batch_stats, images, batch.labels[chosen]
    )
    return loss, gradient, changed["batch_stats"]


@partial(quick_jit, static_argnums=0)
@partial(jax.value_and_grad, argnums=1, has_aux=True)
def of_batch(net, params, batch_stats, images, labels):
    logits, changed = net.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
    )
    chance = jax.nn.log_softmax(logits)
    return -chance[jnp.arange(len(labels)), labels].mean(), changed


def close(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_step_is_gradient_descent(setting):
    state, metrics = one_step(setting)
    params = setting[2]["params"]
    loss, gradient, batch_stats = loss_and_gradient(
        setting, np.arange(32), setting[2]["batch_stats"]
    )
    close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    close(state.batch_stats, batch_stats)
    assert state.step == 1
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = np.sqrt(sum((np.asarray(g) ** 2).sum() for g in jax.tree.leaves(gradient)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_accumulation_adds_the_gradients_of_parts(setting):
    state, metrics = one_step(setting, **{"optimizer.accumulate": 4})
    params, batch_stats = setting[2]["params"], setting[2]["batch_stats"]
    losses, gradients = [], []
    for part in range(4):
        loss, gradient, batch_stats = loss_and_gradient(
            setting, np.arange(part, 32, 4), batch_stats
        )
        losses.append(float(loss))
        gradients.append(gradient)
    mean = jax.tree.map(lambda *g: sum(g) / 4, *gradients)
    close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, mean))
    close(state.batch_stats, batch_stats)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.slow
def test_label_smoothing_mixes_in_the_uniform_distribution(setting):
    _, net, variables, batch, normalization = setting
    _, metrics = one_step(setting, label_smoothing=0.2)
    train = quick_jit(partial(net.apply, train=True, mutable=["batch_stats"]))
    logits, _ = train(variables, normalize(batch.images, *normalization))
    chance = np.asarray(jax.nn.log_softmax(logits))
    targets = 0.8 * np.eye(10)[np.asarray(batch.labels)] + 0.2 / 10
    expected = -(targets * chance).sum(1).mean()
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ema_is_the_moving_mean_of_weights(setting):
    states, _ = steps(setting, 5, **{"optimizer.ema": 0.3})
    plain, _ = steps(setting, 5)
    assert same(states[-1].trained, plain[-1].trained)
    expected = [np.float64(leaf) for leaf in jax.tree.leaves(states[0].params)]
    for number, state in enumerate(states[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        leaves = jax.tree.leaves(state.params)
        expected = [
            decay * old + (1 - decay) * np.float64(new)
            for old, new in zip(expected, leaves, strict=True)
        ]
    found = jax.tree.leaves(states[-1].variables["params"])
    for leaf, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, value, rtol=1e-4, atol=1e-6)
    assert same(TrainState.join(states[-1].split()), states[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "batch_size", "batches"),
    [("paper", 64, 22), ("keras", 64, 22), ("paper", 16, 50)],
)
def test_statistics_of_averaged_weights_are_means_over_plain_batches(
    setting, variant, batch_size, batches
):
    """Of the stem, whose inputs are the images: by NumPy. At most 50 batches."""
    config, _, _, _, normalization = setting
    config = config.copy_and_resolve_references()
    config.batch_size = batch_size
    config.model.update(version=1, depth=8, variant=variant, stochastic_depth=0.5)
    train = data.load(config.dataset).train
    plan = Plan.of(config, len(train.labels))
    net = build_network(config, 10)
    variables = random_variables(net, (8, 8, 1))
    given = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    call = make_statistics_call(net, plan, config, normalization, None)
    positions = jnp.arange(plan.batch_size)
    split = jax.tree.map(jnp.asarray, train)
    seed = np.uint32(config.seed)
    found = quick_jit(call)(variables["params"], given, split, positions, seed)

    order = np.asarray(epoch_order(config.seed, 0, plan.examples))
    chosen = order[: batches * plan.batch_size].reshape(batches, -1)
    images = np.asarray(normalize(jnp.asarray(train.images), *normalization))
    stem = variables["params"]["stem_conv"]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    outputs = np.einsum("nrcihw,hwif->nrcf", windows, stem["kernel"])
    outputs = outputs[chosen] + stem.get("bias", 0)
    mean, var = outputs.mean((1, 2, 3)).mean(0), outputs.var((1, 2, 3)).mean(0)
    np.testing.assert_allclose(found["stem_bn"]["mean"], mean, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["stem_bn"]["var"], var, rtol=1e-3, atol=1e-4)


def statistics_of_two_devices(setting, freeze="", axis_name=None, **changes):
    """The statistics that 64 digits give on each, and those that they began with."""
    config, _, _, _, normalization = setting
    config = config.copy_and_resolve_references()
    config.optimizer.freeze = freeze
    train = data.load(config.dataset).train
    split = data.Split(*(jnp.asarray(array[:64]) for array in train))
    net = models.resnet(1, 8, 10, width=2, **changes)
    variables = random_variables(net, (8, 8, 1))
    given = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    call = make_statistics_call(
        net, Plan(64, 32, 2, steps_per_call=2), config, normalization, axis_name
    )
    on_both = jax.vmap(call, (None, None, None, 0, None), axis_name=axis_name)
    places = jnp.arange(32).reshape(2, 16)
    found = quick_jit(on_both)(variables["params"], given, split, places, np.uint32(0))
    return found, given


@pytest.mark.slow
def test_statistics_of_averaged_weights_are_means_over_devices(setting):
    apart, _ = statistics_of_two_devices(setting)
    together, _ = statistics_of_two_devices(setting, axis_name="devices")
    assert not np.allclose(*apart["stem_bn"]["mean"], rtol=1e-3)
    close(together, jax.tree.map(lambda x: jnp.stack([x.mean(0)] * 2), apart))


def test_statistics_of_averaged_weights_are_of_all_blocks(setting):
    whole, _ = statistics_of_two_devices(setting)
    close(statistics_of_two_devices(setting, stochastic_depth=0.9)[0], whole)


def test_statistics_of_averaged_weights_are_kept_in_frozen_layers(setting):
    found, given = statistics_of_two_devices(setting, freeze="^stem")
    for name, value in given["stem_bn"].items():
        np.testing.assert_allclose(found["stem_bn"][name][0], value, rtol=1e-4)
    means = (each["stage1_block1"]["bn1"]["mean"] for each in (found, given))
    assert not np.allclose(*means, rtol=1e-2)


def same(tree, other) -> bool:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_all_devices_leave_out_the_same_blocks(setting):
    """Their parts of the batch are told by the examples' places alone."""
    config, net, variables, batch, normalization = setting
    net = net.clone(stochastic_depth=0.9)
    first, other_device = (
        steps((config, net, variables, part, normalization), 4)[0][-1]
        for part in (batch, batch._replace(positions=batch.positions + 32))
    )
    assert same(first, other_device)
    plain, _ = steps(setting, 4)
    assert not same(first.params, plain[-1].params)


@pytest.mark.slow
def test_mixing_ends_with_the_plain_tail(setting):
    mixup = {"augment.mixup": 1.0}
    plain, _ = steps(setting, 2)
    tail, _ = steps(setting, 2, unmixed_from_step=1.0, **mixup)
    never, _ = steps(setting, 2, unmixed_from_step=0.0, **mixup)
    assert not same(tail[1].params, plain[1].params)
    close(never[2].params, plain[2].params)
    # From the same state, the step in the tail is a plain one.
    config, net, _, batch, normalization = setting
    step = quick_jit(make_train_step(net, optax.sgd(0.1), config, normalization))
    after, _ = step(tail[1], batch, jax.random.key(1))
    close(after.params, tail[2].params)


@pytest.mark.slow
def test_mixed_loss_is_the_mean_of_both_classes_losses(setting, monkeypatch):
    _, net, variables, batch, normalization = setting
    monkeypatch.setattr(augment, "symmetric_beta", lambda *_: jnp.float32(0.7))
    _, metrics = one_step(setting, **{"augment.mixup": 1.0})
    images = normalize(batch.images, *normalization)
    images = 0.7 * images + 0.3 * images[::-1]
    train = quick_jit(partial(net.apply, train=True, mutable=["batch_stats"]))
    logits, _ = train(variables, images)
    chances = np.asarray(jax.nn.log_softmax(logits))
    rows, labels = np.arange(32), np.asarray(batch.labels)
    loss = -(0.7 * chances[rows, labels] + 0.3 * chances[rows, labels[::-1]]).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["accuracy"] == (chances.argmax(1) == labels).mean()


def test_images_are_flipped_alternately():
    """Each example's flips, told by a step that counts them, over four epochs."""
    examples, batch_size = 12, 4

    def count(state, batch, rng, *, axis_name):
        seen = state.params["seen"].at[batch.labels].add(batch.mirrored)
        zero = jnp.float32(0)
        metrics = {"loss": zero, "accuracy": zero, "gradient_norm": zero}
        return state.replace(step=state.step + 1, params={"seen": seen}), metrics

    plan = Plan(examples, batch_size, 12, steps_per_call=12)
    batches = resident_batches(plan, alternating_flip=True)
    call = quick_jit(make_train_call(lambda _: count, batches, None))
    numbers = jnp.arange(examples, dtype=jnp.int32)
    split = jnp.zeros((examples, 1, 1, 1), jnp.uint8), numbers
    zeros = {"seen": jnp.zeros(examples, jnp.int32)}
    state = TrainState(jnp.int32(0), zeros, {}, ())
    flips = [np.zeros(examples, int)]
    for end in (3, 6, 9, 12):
        positions = jnp.arange(batch_size, dtype=jnp.int32)
        until = np.uint32(0), jnp.int32(end), jnp.zeros(12)
        state, _ = call(state, NO_SUMS, *split, positions, *until)
        flips.append(np.asarray(state.params["seen"]))
    first, second, third, fourth = np.diff(flips, axis=0)
    assert 0 < first.sum() < examples
    assert (first + second == 1).all()
    assert (first == third).all()
    assert (second == fourth).all()
