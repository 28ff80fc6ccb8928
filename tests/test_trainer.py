"""What a call to the devices may do besides its updates: nothing that costs time."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import common, digits
from resnet_jax import UserError, blocks, compilation, data, results
from resnet_jax.averaged import other_statistics
from resnet_jax.config import build_network, validate
from resnet_jax.parallel import Parallel
from resnet_jax.plan import Plan
from resnet_jax.trainer import Trainer
from tests.test_train import digits_config


@pytest.fixture(
    scope="module",
    params=["jit", pytest.param("pmap", marks=pytest.mark.slow)],
)
def trained(request) -> tuple[Trainer, Callable]:
    """A trainer of v1-8 on digits, and a function that makes a number of steps."""
    config = common.get_config("smoke", version=1, depth=8)
    config.parallel = request.param
    trainer = Trainer(config, data.load(config.dataset))
    state, step = trainer.place(trainer.new_state()), 0
    trainer.compile()

    def train(steps: int) -> dict:
        nonlocal state, step
        state, means = trainer.train(state, step, step + steps)
        step += steps
        return means

    return trainer, train


@pytest.fixture
def crossings(monkeypatch) -> list[int]:
    """The bytes that go to the devices and come from them by `Parallel`, in order.

    Those are allowed wherever others are not.
    """
    sizes = []

    def recorded(method):
        def call(self, tree):
            with jax.transfer_guard("allow"):
                result = method(self, tree)
            sizes.append(sum(x.nbytes for x in jax.tree.leaves(result)))
            return result

        return call

    for name in ("replicate", "shard", "fetch"):
        monkeypatch.setattr(Parallel, name, recorded(getattr(Parallel, name)))
    return sizes


def test_a_call_copies_its_end_and_rates_in_and_three_numbers_out(trained, crossings):
    trainer, train = trained
    train(3)  # the first call may build constants
    crossings.clear()
    with jax.transfer_guard("disallow_explicit"):
        means = train(3)
    pmapped = trainer.parallel.mode == "pmap"  # where each device has a copy
    copies = trainer.parallel.device_count if pmapped else 1
    rates = trainer.plan.steps_per_call
    assert crossings == [4 * (1 + rates) * copies, 3 * 4]
    assert np.isfinite(list(means.values())).all()


def test_the_guard_would_see_a_copy():
    add = jax.jit(lambda x, y: x + y)
    x = jax.device_put(np.float32(1))
    add(x, x)
    with (
        jax.transfer_guard("disallow_explicit"),
        pytest.raises(jax.errors.JaxRuntimeError, match="isallowed"),
    ):
        add(x, np.float32(1))


def test_seeds_rates_and_lengths_share_one_program(monkeypatch):
    """So that runs after the first find it in the compilation cache."""
    programs = []

    def record(lowered, options):
        programs.append(lowered.as_text())
        return lambda *args: None

    monkeypatch.setattr(compilation, "_compile", record)
    for change in (
        {"seed": 1},
        {"epochs": 7, "schedule": {"name": "onecycle"}},
        {"optimizer": {"learning_rate": 0.3}, "schedule": {"warmup_epochs": 0}},
    ):
        config = common.get_config("smoke", version=1, depth=8)
        config.update(change)
        trainer = Trainer(config, data.load(config.dataset))
        trainer.compile()
    assert len(programs) == 6
    first, second, third = (sorted(programs[n : n + 2]) for n in (0, 2, 4))
    assert first == second == third


def losses(batch_size: int, **changes) -> list[float]:
    """Of four updates that change next to nothing, so that they tell of which images.

    The data set has 16 images, or a single one for batches of that.
    """
    config = digits_config(steps=4, steps_per_call=1, batch_size=batch_size)
    examples = 1 if batch_size == 1 else 16
    config.dataset.update(train_split=f"train[:{examples}]", image_size=16)
    config.model.width = 2
    config.augment.crop = 0.0
    config.optimizer.learning_rate = 1e-12
    config.update_from_flattened_dict(changes)
    validate(config)
    trainer = Trainer(config, data.load(config.dataset))
    state = trainer.place(trainer.new_state())
    trainer.compile()
    found = []
    for step in range(4):
        state, means = trainer.train(state, step, step + 1)
        found.append(means["loss"])
    return found


def kinds(losses: list[float]) -> list[int]:
    """Numbers for the losses, the same where they are nearly equal."""
    seen = []
    for loss in losses:
        if all(loss != pytest.approx(other, rel=1e-5) for other in seen):
            seen.append(loss)
    return [seen.index(pytest.approx(loss, rel=1e-5)) for loss in losses]


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["never", "always"])
def test_each_step_has_images_of_its_size(stream, quick_training):
    if stream == "always":
        pytest.importorskip("grain")
    found = []
    for sizes, ends in (((8, 12), (0.25, 0.5)), ((8,), (0.75,))):
        growing = {"augment.sizes": sizes, "augment.size_ends": ends}
        found += losses(16, **growing, **{"dataset.stream": stream})
    assert kinds(found) == [0, 1, 2, 2, 0, 0, 0, 2]


@pytest.mark.slow
def test_each_update_has_its_learning_rate(quick_training):
    """The first two of four have one that is not 0, wherever calls end."""
    config = digits_config(steps=4, steps_per_call=3, batch_size=16)
    config.dataset.train_split = "train[:16]"
    config.optimizer.update(momentum=0.0, weight_decay=0.0)
    config.schedule.update(name="step", boundaries=(0.5,), factors=(0.0,))
    trainer = Trainer(config, data.load(config.dataset))
    trainer.compile()

    def kernels(*ends: int) -> list[bytes]:
        state, step, found = trainer.place(trainer.new_state()), 0, []
        for end in ends:
            state, _ = trainer.train(state, step, end)
            found.append(trainer.fetch(state).params["stem_conv"]["kernel"].tobytes())
            step = end
        return found

    first, *rest = kernels(1, 2, 3, 4)
    assert first not in rest
    assert len({*rest, *kernels(3, 4)}) == 1


@pytest.mark.slow
def test_the_last_epochs_are_plain(quick_training):
    """One and a half, of two steps each."""
    mixing = {"augment.mixup": 1.0, "augment.plain_epochs": 1.5}
    mixed, plain = losses(8, **mixing), losses(8)
    assert kinds([*plain, *mixed]) == [0, 1, 2, 3, 4, 1, 2, 3]


@pytest.mark.slow
def test_flips_alternate_when_the_config_says(quick_training):
    """Of one image, which each epoch takes once."""
    found = losses(1, **{"augment.flip": True, "augment.alternating_flip": True})
    assert kinds(found) == [0, 1, 0, 1]
    drawn = losses(1, **{"augment.flip": True})
    assert set(kinds([*found, *drawn])) == {0, 1}
    assert kinds(drawn) != [0, 1, 0, 1]


def test_later_calls_compile_nothing(trained):
    _, train = trained
    train(2)
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(2)
        train(3)
        assert compiled == []
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert compiled, "the listener hears of no compilation"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("recipe", "given", "told"),
    [
        ("paper", {}, ""),
        ("paper", {"model.depth": 110}, "110 layers without a warm-up"),
        ("keras", {"model.depth": 110}, ""),  # Adam's steps are small at first
        ("strong", {"model.depth": 110}, ""),
        ("fast", {"model.depth": 110}, ""),
        ("smoke", {}, ""),
        ("paper", {"model.depth": 152, "model.stem": "imagenet"}, ""),
        ("paper", {"dataset.name": "svhn_cropped:3.1.0"}, "set augment.flip to False"),
        (
            "fast",
            {"dataset.name": "mnist"},
            "set augment.flip and augment.alternating_flip and test_time_flip to False",
        ),
    ],
)
def test_what_no_recipe_would_have_is_told(recipe, given, told):
    config = common.get_config(recipe, version=1, depth=20)
    config.update_from_flattened_dict(given)
    found = results.suspicious_settings(config)
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_recipes_for_digits_mirror_nothing():
    for recipe in ("smoke", "paper", "keras", "strong", "fast"):
        config = digits.get_config(recipe)
        validate(config)
        assert not results.suspicious_settings(config)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epochs": 200}, []),
        ({"epochs": 16}, []),
        ({"epochs": 15}, ["plain_epochs=15 leaves no epoch for mixup"]),
        ({"epochs": 5}, ["ends before its warm-up", "plain_epochs=15"]),
        ({"steps": 100}, ["ends before its warm-up", "plain_epochs=15"]),
    ],
)
def test_what_a_short_run_never_comes_to_is_told(given, told):
    config = common.get_config("strong", version=1, depth=8)
    config.update(given)
    found = results.unreached_settings(config, Plan.of(config, examples=45_000))
    assert len(found) == len(told)
    assert all(part in line for part, line in zip(told, found, strict=True))


@pytest.mark.slow
def test_averaged_weights_are_not_for_statistics_of_an_unknown_momentum():
    config = digits_config()
    config.optimizer.ema = 0.9

    class Block(blocks.PostActivationBlock):
        momentum: float = 0.9

        @nn.compact
        def __call__(self, x, train):
            x = super().__call__(x, train)
            norm = nn.BatchNorm(not train, momentum=self.momentum, name="mine")
            return norm(x)

    dataset = data.load(config.dataset)
    for refused, changed in (
        ("stage1_block1/bn1", {"norm_class": nn.BatchNorm}),
        ("stage1_block1/mine", {"block_class": partial(Block, momentum=0.99)}),
        ("", {"block_class": Block}),
    ):
        net = build_network(config, 10).clone(**changed)
        assert other_statistics(net, dataset.image_shape) == refused

    def build(config, num_classes):
        return build_network(config, num_classes).clone(norm_class=nn.BatchNorm)

    trainer = Trainer(config, dataset, build)
    with pytest.raises(UserError, match=r"ema=0.9 does .*bn1 keeps.*: set it to 0"):
        trainer.compile()
