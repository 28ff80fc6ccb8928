import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from resnet_jax import compilation, models, train
from resnet_jax.parallel import Parallel
from tests.quick import random_variables


def test_options_that_jaxlib_does_not_know_are_left_out_with_a_note(
    monkeypatch, capsys
):
    options = {"xla_no_such": "1", "xla_backend_optimization_level": 0}
    monkeypatch.setattr(compilation, "OPTIONS", {"cpu": options})
    used = []
    compile_lowered = jax.stages.Lowered.compile

    def record(lowered, compiler_options):
        used.append(compiler_options)
        return compile_lowered(lowered, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", record)
    one = Parallel.over(jax.devices()[:1], "jit", 1)
    number = one.replicate(np.float32(1))
    assert one.compile(lambda x: x + 1, number)(number) == 2
    assert used[-1] == {"xla_backend_optimization_level": 0}
    assert "note      slower, as XLA rejects xla_no_such (" in capsys.readouterr().out


def test_other_errors_of_xla_are_not_taken_for_unknown_options(monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    one = Parallel.over(jax.devices()[:1], "jit", 1, image_shape=(8, 8, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        one.compile(lambda x: x + 1, one.replicate(np.float32(1))).result()


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [8, 16])  # without and with oneDNN, where it is
def test_bfloat16_trains_and_evaluates(tmp_path, pixels):
    """On a CPU jaxlib 0.12 has loops that do not take it, or return NaN."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = digits.get_config()
        config.model.update(version=1, depth=8, width=16, dtype=dtype)
        config.dataset.update(image_size=pixels, train_split="train[:256]")
        config.update(steps=4)
        summary = train.train_and_evaluate(config, tmp_path / dtype)
        losses.append([summary["test_loss"], summary["test_accuracy"]])
    assert 0 < np.abs(np.subtract(*losses)).max() < 0.05


@pytest.mark.parametrize("depth", [8, 20])
def test_bfloat16_networks_have_finite_logits_under_jit(depth):
    net = models.resnet(1, depth, 10, dtype=jnp.bfloat16)
    variables = random_variables(net, (32, 32, 3))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    half, full = (
        jax.jit(each.apply)(variables, images)
        for each in (net, net.clone(dtype=jnp.float32))
    )
    np.testing.assert_allclose(half, full, atol=0.05 * np.abs(full).max())


@pytest.fixture
def options_seen(monkeypatch):
    """The options of each program that is compiled from here on."""
    seen = []

    def compile_once(lowered, options, *_):
        seen.append(options)
        return lowered.compile()

    monkeypatch.setattr(compilation, "_compile", compile_once)
    monkeypatch.setattr(compilation, "_compile_once", compile_once)
    return seen


def test_a_forward_pass_is_compiled_without_elementwise_loops(options_seen):
    one = Parallel.over(jax.devices()[:1], "jit", 1)
    number = one.replicate(np.float32(1))
    for inference in (False, True):
        one.compile(lambda x: x + 1, number, inference=inference).result()
    training, forward = options_seen
    different = {name for name in training if training[name] != forward[name]}
    assert different == {"xla_cpu_experimental_ynn_fusion_type"}
    assert "ELTWISE" in str(training)
    assert "ELTWISE" not in str(forward)


@pytest.mark.parametrize(("devices", "spans"), [(1, False), (2, False), (2, True)])
def test_several_devices_go_without_options_that_are_wrong_there(
    monkeypatch, options_seen, devices, spans
):
    monkeypatch.setattr(compilation, "OPTIONS_SPAN_DEVICES", spans)
    parallel = Parallel.over(jax.devices()[:devices], "jit", 2)
    number = parallel.replicate(np.float32(1))
    parallel.compile(lambda x: x + 1, number).result()
    assert bool(options_seen[0]) == (devices == 1 or spans)


@pytest.mark.parametrize(
    ("available", "size", "fast", "kept"),
    [
        (True, 32, False, False),
        (True, 12, False, False),
        (True, 32, True, True),
        (True, 8, False, True),
        (False, 32, False, True),
    ],
)
def test_programs_that_call_onednn_are_not_kept(
    monkeypatch, available, size, fast, kept
):
    """XLA cannot save them. Where it gains less than a soon start, they do not."""
    monkeypatch.setattr(compilation, "onednn_available", lambda: available)
    shape = (size, size, 1)
    one = Parallel.over(jax.devices()[:1], "jit", 1, image_shape=shape, fast_start=fast)
    number, traced = one.replicate(np.float32(1)), []

    def double(x):
        traced.append(compilation.tracing_for_onednn())
        return 2 * x

    double.__name__ = f"double_{uuid.uuid4().hex}"  # a program of no other run
    program = one.compile(double, number)
    assert program(number) == 2
    assert traced == [not kept]
    assert not compilation.tracing_for_onednn()
    cache = Path(jax.config.jax_compilation_cache_dir)
    assert bool(list(cache.glob(f"*{double.__name__}*"))) == kept
    if not kept:  # but by this process
        assert one.compile(double, number).result() is program.result()


class Graph:
    """Doubles its argument, which it donates, after a number of failures."""

    def __init__(self, lowered, failures):
        self._program, self._failures, self.runs = lowered.compile(), failures, 0

    def __call__(self, x):
        self.runs += 1
        if self.runs <= self._failures:
            raise jax.errors.JaxRuntimeError("UNKNOWN: status 5003")
        return self._program(x)


@pytest.fixture
def doubling():
    return jax.jit(lambda x: 2 * x, donate_argnums=0).lower(jnp.ones(3))


@pytest.mark.parametrize("failures", [0, 1])  # 1: its kernels were not loaded yet
def test_a_graph_is_run_before_it_counts_and_its_arguments_stay(
    doubling, failures, capsys
):
    graph, x = Graph(doubling, failures), jnp.ones(3)
    assert compilation._warmed_up(graph, doubling, (x,), (0,)) is graph
    assert graph.runs == failures + 1
    np.testing.assert_array_equal(graph(x), [2, 2, 2])
    assert not capsys.readouterr().out


def test_where_a_graph_fails_the_program_runs_without(doubling, capsys):
    graph, x = Graph(doubling, failures=2), jnp.ones(3)
    plain = compilation._warmed_up(graph, doubling, (x,), (0,))
    np.testing.assert_array_equal(plain(x), [2, 2, 2])
    assert "slower, without a CUDA graph" in capsys.readouterr().out
