import bisect
import itertools
import math

import numpy as np
import pytest

from configs import common
from resnet_jax import UserError
from resnet_jax.plan import Plan


def small_plans():
    """All plans of a few examples, and some of sizes that occur."""
    for examples, total, steps_per_call in itertools.product(
        (1, 2, 5, 12, 13), (1, 2, 7, 30), (1, 2, 3, 10, 50)
    ):
        for batch_size in range(1, examples + 1):
            yield Plan(examples, batch_size, total, steps_per_call)
    rng = np.random.default_rng(0)
    for _ in range(100):
        examples = int(rng.integers(100, 60_000))
        batch_size = int(rng.integers(examples // 200 + 1, examples + 1))
        total, steps_per_call = map(int, rng.integers(1, (2000, 150)))
        yield Plan(examples, batch_size, total, steps_per_call)
    yield Plan(1437, 64, 450, 10)


PLANS = list(small_plans())


def ends(plan):
    """Where calls must end, from the definition: multiples, epochs' ends, the end."""
    multiples = range(plan.steps_per_call, plan.total_steps, plan.steps_per_call)
    # The last update that takes one of an epoch's examples.
    last_of_epochs = set()
    for epoch in range(1, plan.total_steps * plan.batch_size // plan.examples + 1):
        last_example = epoch * plan.examples - 1
        last_of_epochs.add(last_example // plan.batch_size + 1)
    return sorted({*multiples, *last_of_epochs, plan.total_steps})


def walk(plan, step=0):
    found = []
    while step < plan.total_steps:
        step = plan.call_end(step)
        found.append(step)
        assert len(found) <= plan.total_steps, "a call that makes no update"
    return found


def test_calls_end_at_multiples_at_epochs_ends_and_at_the_end():
    for plan in PLANS:
        assert walk(plan) == [
            step for step in ends(plan) if step <= plan.total_steps
        ], plan


def test_calls_cover_every_update_once():
    for plan in PLANS:
        stops = walk(plan)
        updates = [
            step
            for start, stop in itertools.pairwise([0, *stops])
            for step in range(start, stop)
        ]
        assert updates == list(range(plan.total_steps)), plan


def test_no_call_is_longer_than_steps_per_call():
    for plan in PLANS:
        lengths = np.diff([0, *walk(plan)])
        assert lengths.max() <= plan.steps_per_call, plan


@pytest.mark.slow
def test_resumed_run_has_the_same_ends_from_any_step():
    for plan in PLANS:
        straight = walk(plan)
        for step in range(0, plan.total_steps, max(1, plan.total_steps // 50)):
            following = straight[bisect.bisect_right(straight, step)]
            assert plan.call_end(step) == following, (plan, step)
        for number in {0, len(straight) // 3, len(straight) - 1}:
            stop = straight[number]
            assert walk(plan, stop) == straight[number + 1 :], (plan, stop)


def test_epoch_is_that_of_the_update_s_first_example():
    for plan in PLANS:
        for step in range(1, plan.total_steps + 1, max(1, plan.total_steps // 50)):
            first_example = (step - 1) * plan.batch_size
            epoch = plan.epoch(step)
            assert (epoch - 1) * plan.examples <= first_example, (plan, step)
            assert first_example < epoch * plan.examples, (plan, step)


def test_epoch_and_epoch_end_agree():
    for plan in PLANS:
        epochs = plan.epoch(plan.total_steps)
        ends_of_epochs = [plan.epoch_end(epoch) for epoch in range(1, epochs + 1)]
        assert ends_of_epochs == sorted(set(ends_of_epochs)), plan
        assert ends_of_epochs[-1] == plan.total_steps, plan
        assert plan.epoch_end(epochs + 5) == plan.total_steps, plan
        for epoch, end in enumerate(ends_of_epochs, start=1):
            assert plan.epoch(end) == epoch, (plan, epoch)
            if end < plan.total_steps:
                assert plan.epoch(end + 1) == epoch + 1, (plan, epoch)


def config_of(**changes):
    config = common.default()
    config.update(**changes)
    return config


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [
        (1, 10, 5, 2),
        (1, 10, 4, 3),
        (2, 10, 4, 5),
        (3, 10, 10, 3),
        (7, 10, 3, 24),
        (164, 50_000, 128, 64_063),
        (200, 50_000, 32, 312_500),
        (20, 1437, 64, 450),
    ],
)
def test_steps_are_epochs_times_examples_by_batch_rounded_up(
    epochs, examples, batch_size, steps
):
    plan = Plan.of(config_of(epochs=epochs, batch_size=batch_size), examples)
    assert plan.total_steps == steps == math.ceil(epochs * examples / batch_size)
    assert plan.steps_per_epoch == examples / batch_size
    assert epochs <= plan.total_epochs < epochs + batch_size / examples


def test_steps_replaces_epochs():
    plan = Plan.of(config_of(epochs=7, steps=11, batch_size=4), 40)
    assert plan.total_steps == 11
    assert plan.total_epochs == pytest.approx(1.1)


def test_steps_per_call_is_the_config_s_or_ten_on_cpu():
    assert Plan.of(config_of(steps_per_call=7), 1000).steps_per_call == 7
    assert Plan.of(config_of(steps_per_call=0), 1000).steps_per_call == 10


def test_other_backends_have_a_hundred_steps_a_call(monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert Plan.of(config_of(steps_per_call=0), 1000).steps_per_call == 100


def test_batch_larger_than_the_split_is_an_error():
    assert Plan.of(config_of(batch_size=1437), 1437).steps_per_epoch == 1
    sentence = r"config\.batch_size=1438 .* 1,437 examples"
    with pytest.raises(UserError, match=sentence):
        Plan.of(config_of(batch_size=1438), 1437)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 2**24, "batch_size": 128},
        {"steps": 10**9, "batch_size": 64},
        {"epochs": 10**6, "batch_size": 128},
    ],
)
def test_run_too_long_to_count_in_int32_is_an_error(changes):
    field = "epochs" if "epochs" in changes else "steps"
    with pytest.raises(UserError, match=rf"config\.{field}=1.* 2\^31 .*: lower it"):
        Plan.of(config_of(**changes), 50_000)


def test_longest_run_is_allowed():
    plan = Plan.of(config_of(steps=2**24 - 1, batch_size=128), 50_000)
    assert plan.total_steps == 2**24 - 1


def test_calls_end_where_the_images_grow():
    config = config_of(epochs=10, batch_size=10, steps_per_call=7)
    config.augment.update(sizes=(16, 24), size_ends=(0.25, 0.6))
    plan = Plan.of(config, 100)
    ends = walk(plan)
    assert {25, 60} <= set(ends)
    starts = [0, *ends[:-1]]
    sizes = [plan.image_size(step) for step in starts]
    assert sizes == [16 if s < 25 else 24 if s < 60 else 0 for s in starts]
    for step in range(plan.total_steps):
        assert plan.call_end(step) == ends[bisect.bisect_right(ends, step)]


def test_images_grow_at_the_step_nearest_to_a_fraction_of_the_run():
    config = config_of(steps=100, batch_size=10)
    config.augment.update(sizes=(16, 24), size_ends=(0.29, 0.576))
    assert 0.29 * 100 < 29
    assert Plan.of(config, 100).size_ends == (29, 58)
