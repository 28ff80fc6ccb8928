import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common, digits
from resnet_jax import UserError, compilation, data, models, trainer
from resnet_jax.augment import augment, statistics
from resnet_jax.config import build_network
from resnet_jax.parallel import Parallel, require_devices
from resnet_jax.step import Batch, create_state, make_train_step
from resnet_jax.trainer import Trainer
from tests.quick import quick_jit


@functools.cache
def train(devices: int, mode: str = "jit", image_size: int = 0):
    """Two updates of v1-8 on digits at a low rate.

    Returns the state after each of them, their losses, and the trainer.
    """
    config = digits.get_config()
    config.update(parallel=mode, batch_size=64, steps=100)
    config.model.update(version=1, depth=8)
    config.dataset.image_size = image_size
    config.optimizer.learning_rate = 0.01
    config.schedule.update(name="constant", warmup_epochs=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.jax, "devices", lambda: devices_of(devices))
        run = Trainer(config, data.load(config.dataset))
    state = run.place(run.new_state())
    run.compile()
    states, losses = [], []
    for step in range(2):
        state, means = run.train(state, step, step + 1)
        states.append(run.fetch(state))
        losses.append(means["loss"])
    return states, losses, run


def devices_of(count: int) -> list:
    return jax.local_devices(backend="cpu")[:count]


def float64_run(devices: list, steps: int = 20) -> tuple[list, list]:
    """Updates of a small network in float64: losses, and the leaves of the state."""
    config = common.get_config("smoke", version=1, depth=8)
    train_split = data.load(config.dataset).train
    parallel = Parallel.over(devices, "jit", 32)
    quick = {"cpu": {"xla_backend_optimization_level": 0}}
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        patch.setattr("resnet_jax.compilation.OPTIONS", quick)
        # Over any devices, since no loop here is long.
        patch.setattr("resnet_jax.compilation.OPTIONS_SPAN_DEVICES", True)
        net = models.resnet(1, 8, 10, width=4, dtype=jnp.float64)
        tx = optax.sgd(0.1, momentum=0.9)
        train_step = make_train_step(
            net, tx, config, statistics("mean_std", train_split.images)
        )
        state = jax.tree.map(
            lambda x: np.float64(x) if np.issubdtype(x.dtype, np.floating) else x,
            create_state(net, tx, 0, (8, 8, 1)),
        )

        def update(state, batch, step):
            rng = jax.random.fold_in(jax.random.key(0), step)
            return train_step(state, batch, rng)

        def batch(step):
            rows = slice(32 * step, 32 * step + 32)
            arrays = (*(array[rows] for array in train_split), np.arange(32))
            return Batch(*map(parallel.shard, arrays))

        state, losses = parallel.replicate(state), []
        number = parallel.replicate(np.int32(0))
        compiled = parallel.compile(update, state, batch(0), number)
        for step in range(steps):
            number = parallel.replicate(np.int32(step))
            state, metrics = compiled(state, batch(step), number)
            losses.append(float(parallel.fetch(metrics["loss"])))
        leaves = jax.tree.leaves(parallel.fetch(state))
    assert leaves[1].dtype == np.float64
    return losses, leaves


@pytest.mark.slow
def test_number_of_devices_does_not_matter_in_float64():
    losses, leaves = float64_run(devices_of(1))
    assert losses[-1] < losses[0]
    for devices in (2, 4, 8):
        other_losses, other_leaves = float64_run(devices_of(devices))
        np.testing.assert_allclose(losses, other_losses, atol=1e-9)
        for a, b in zip(leaves, other_leaves, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)


@pytest.mark.slow
def test_number_of_devices_hardly_matters_in_float32():
    """At a low rate: training itself amplifies the rounding of float32."""
    _, losses, _ = train(devices=1)
    for devices in (2, 4, 8):
        _, other_losses, _ = train(devices)
        np.testing.assert_allclose(losses, other_losses, rtol=1e-3)


@pytest.mark.slow
def test_augmented_batch_does_not_depend_on_the_devices():
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    config = common.get_config("paper", version=1, depth=20).augment

    def augmented(devices):
        parallel = Parallel.over(devices_of(devices), "jit", 16)
        args = parallel.shard(images), parallel.shard(np.arange(16, dtype=np.int32))
        compiled = parallel.compile(
            lambda images, positions: augment(
                config, images, jax.random.key(0), positions
            ),
            *args,
        )
        return parallel.fetch(compiled(*args))

    expected = augmented(1)
    assert not np.array_equal(expected, images)
    for devices in (2, 4, 8):
        np.testing.assert_array_equal(augmented(devices), expected)


@pytest.mark.slow
def test_compiler_options_for_cpu_change_rounding_alone(monkeypatch):
    """In one step: already the next one amplifies float32's rounding."""
    (state, _), losses, _ = train(devices=1, image_size=16)  # as oneDNN is called for
    monkeypatch.setattr(compilation, "OPTIONS", {})
    (other, _), other_losses, _ = train.__wrapped__(devices=1, image_size=16)
    np.testing.assert_allclose(losses[0], other_losses[0], rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_pmap_of_one_device_is_jit_of_one():
    (_, state), losses, _ = train(devices=1)
    (_, other), other_losses, _ = train(devices=1, mode="pmap")
    np.testing.assert_allclose(losses, other_losses, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_pmap_updates_all_devices_by_the_mean_of_their_gradients_and_statistics():
    config = digits.get_config()
    config.model.update(version=1, depth=8, width=4)
    config.augment.update(crop=0.0)
    examples = data.load(config.dataset).train
    net, tx = build_network(config, 10), optax.sgd(0.1)
    normalization = statistics("mean_std", examples.images)
    train_step = make_train_step(net, tx, config, normalization)
    state, key = create_state(net, tx, 0, (8, 8, 1)), jax.random.key(0)
    arrays = (*(array[:32] for array in examples), np.arange(32, dtype=np.int32))
    alone = quick_jit(lambda state, batch: train_step(state, batch, key)[0])
    parts = [
        alone(
            state, Batch(*(jnp.asarray(array[first : first + 8]) for array in arrays))
        )
        for first in range(0, 32, 8)
    ]
    expected = jax.tree.map(
        lambda *leaves: np.mean(leaves, axis=0), *(part.trained for part in parts)
    )

    parallel = Parallel.over(devices_of(4), "pmap", 32)
    placed = parallel.replicate(state), Batch(*map(parallel.shard, arrays))
    axis = parallel.axis_name
    update = parallel.compile(
        lambda state, batch: train_step(state, batch, key, axis_name=axis)[0],
        *placed,
    )
    found = update(*placed).trained
    for leaf, mean in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        copies = [np.asarray(shard.data[0]) for shard in leaf.addressable_shards]
        assert len(copies) == 4
        for copy in copies:
            np.testing.assert_array_equal(copy, copies[0])
            np.testing.assert_allclose(copy, mean, rtol=1e-4, atol=1e-6)
    # Neither sums nor a single device's would do.
    kernel = ("params", "classifier", "kernel")
    first, mean = parts[0].trained, expected
    for name in kernel:
        first, mean = first[name], mean[name]
    assert not np.allclose(first, mean, rtol=1e-3)


@pytest.mark.slow
def test_pmap_normalises_apart():
    _, losses, _ = train(devices=1)
    (_, state), other_losses, run = train(devices=4, mode="pmap")
    assert not np.allclose(losses[0], other_losses[0], rtol=1e-6)
    placed = run.place(state)
    assert run.evaluate(placed, every_split=True)["test_examples"] == 360


@pytest.mark.slow
def test_compiled_call_serves_every_length():
    _, _, run = train(devices=2)
    state, one_by_one = run.place(run.new_state()), []
    for step in range(3):
        state, means = run.train(state, step, step + 1)
        one_by_one.append(means["loss"])
    together, means = run.train(run.place(run.new_state()), 0, 3)
    assert means["loss"] == pytest.approx(np.mean(one_by_one), rel=1e-6)
    for a, b in zip(
        jax.tree.leaves(run.fetch(state)),
        jax.tree.leaves(run.fetch(together)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_size=100.*8 devices.*96 and 104"):
        Parallel.over(devices_of(8), "jit", 100)
    with pytest.raises(UserError, match=r"nearest that do are 8"):
        Parallel.over(devices_of(8), "pmap", 3)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ("128", 2),
        ("127", 1),
        ("128, 2", 2),
        ("2, 2", 1),
        ("64, image_size=8", 1),
        ("64, image_size=32", 2),
    ],
)
def test_cpu_is_one_device_a_core_unless_images_are_small(given, most):
    script = (
        "import os\n"
        "del os.environ['JAX_NUM_CPU_DEVICES']\n"
        "os.sched_getaffinity = lambda _: {0, 1}\n"
        "import jax\n"
        "from resnet_jax import parallel\n"
        "from resnet_jax.compilation import OPTIONS_SPAN_DEVICES\n"
        f"parallel.split_cpu({given})\n"
        f"most = {most} if OPTIONS_SPAN_DEVICES else 1\n"
        "assert len(jax.devices()) == most, jax.devices()\n"
        "parallel.split_cpu(1)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("given", "used"), [("cuda", "cuda,cpu"), ("cpu,tpu", "cpu,tpu"), ("", None)]
)
def test_cpu_is_there_whatever_jax_platforms_says(given, used):
    script = (
        "import jax\n"
        "from resnet_jax import parallel\n"
        "parallel.split_cpu(8)\n"
        f"assert (jax.config.jax_platforms or None) == {used!r}\n"
    )
    environment = os.environ | {"JAX_PLATFORMS": given}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("main --config=configs/digits.py --workdir=OUT", "tpu"),
        ("main --config=configs/digits.py --workdir=OUT", "nonsense"),
        ("summary --config=configs/digits.py", "tpu"),
        ("convert --source=none.safetensors --out=OUT", "tpu"),
    ],
)
def test_platform_that_is_not_here_is_a_sentence_and_no_run_on_the_cpu(
    command, given, tmp_path
):
    module, *flags = command.replace("OUT", str(tmp_path / "run")).split()
    ended = subprocess.run(
        [sys.executable, "-m", f"resnet_jax.{module}", *flags],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": given},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert f"JAX_PLATFORMS={given}" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_cpu_in_place_of_a_gpu_is_refused(monkeypatch):
    """JAX passes over 'cuda' where there is no NVIDIA GPU, if 'cpu' follows."""
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS=cuda: there is no such device"):
        require_devices()
    for allowed in ("cuda,cpu", "cpu", ""):
        monkeypatch.setenv("JAX_PLATFORMS", allowed)
        require_devices()
