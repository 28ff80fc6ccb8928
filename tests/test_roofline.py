from types import SimpleNamespace

import jax
import pytest

from configs import common
from resnet_jax import command_line, compilation, cost, parallel, roofline, summary
from resnet_jax.config import build_network
from resnet_jax.trainer import Trainer

SHAPE = (32, 32, 3)


def step_of(monkeypatch, image_shape=SHAPE, **changes) -> tuple[dict, dict]:
    """What is said of a step of v1-8 with batches of 8, and what XLA counts."""
    config = common.get_config("smoke", version=1, depth=8)
    config.batch_size = 8
    config.update_from_flattened_dict(changes)
    compiled = []
    compile_call = parallel.Parallel.compile

    def kept(*args, **settings):
        compiled.append(compile_call(*args, **settings))
        return compiled[-1]

    monkeypatch.setattr(parallel.Parallel, "compile", kept)
    macs = cost.totals(cost.layers(build_network(config, 10), image_shape))["macs"]
    step = roofline.compile_step_cost(config, 10, image_shape, macs)
    return step, compiled[0].result().cost_analysis()


@pytest.mark.slow
def test_flops_are_what_xla_counts(monkeypatch):
    """To a few per cent: no gradient of the images, and sums besides products."""
    monkeypatch.setattr(compilation, "onednn_available", lambda: False)
    step, counted = step_of(monkeypatch)
    assert step["flops_per_step"] == pytest.approx(8 * counted["flops"], rel=0.1)
    assert step["bytes_per_step"] == int(8 * counted["bytes accessed"])
    assert "seconds_by_flops" not in step  # of a CPU


@pytest.mark.slow
def test_loops_hide_bytes(monkeypatch):
    step, _ = step_of(monkeypatch, **{"model.depth": 20, "model.scan": True})
    assert step["bytes_per_step"] is None
    assert "bytes hidden" in roofline.sentence(step, "cpu")


@pytest.mark.slow
def test_onednn_hides_bytes(monkeypatch):
    monkeypatch.setattr(compilation, "onednn_available", lambda: True)
    assert step_of(monkeypatch)[0]["bytes_per_step"] is None
    small, _ = step_of(monkeypatch, image_shape=(8, 8, 1))  # does not call it
    assert small["bytes_per_step"] > 0


@pytest.mark.parametrize(
    ("kind", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("Tesla V100-SXM2-16GB", 0.9e12),
        ("Tesla T4", 0.32e12),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA H200", 4.8e12),
        ("TPU v5 lite", 0.819e12),
        ("TPU v5p", 2.765e12),
        ("TPU v6 lite", 1.64e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peaks_by_kind(kind, bandwidth):
    found = roofline.peak(kind)
    assert (found and found.bandwidth) == bandwidth


def test_float32_is_half_as_fast_where_it_has_units_of_its_own():
    """TF32 on NVIDIA's GPUs since Ampere."""
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200"):
        peak = roofline.peak(kind)
        assert peak.float32 == peak.bfloat16 / 2
    for kind in ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "Tesla V100", "Tesla T4"):
        peak = roofline.peak(kind)
        assert peak.float32 == peak.bfloat16


def counted_by_xla(monkeypatch, **changes) -> dict:
    """The cost of a step on eight of a device whose peaks are round numbers."""
    monkeypatch.setattr(roofline, "peak", lambda _: roofline.Peak(1e12, 1e11, 1e9))
    config = common.get_config("smoke", version=1, depth=8)
    config.update_from_flattened_dict({"batch_size": 16, **changes})
    cost = SimpleNamespace(cost_analysis=lambda: {"bytes accessed": 2e6})
    trainer = object.__new__(Trainer)
    trainer.parallel = SimpleNamespace(device_count=8, uses_onednn=False)
    trainer.programs = {0: SimpleNamespace(result=lambda: cost)}
    trainer.net = build_network(config, 10)
    return roofline.step_cost(trainer, config, macs=10**9)


@pytest.mark.parametrize(("dtype", "rate"), [("bfloat16", 1e12), ("float32", 1e11)])
def test_devices_share_the_flops_and_each_moves_its_bytes(monkeypatch, dtype, rate):
    step = counted_by_xla(monkeypatch, **{"model.dtype": dtype})
    assert step["flops_per_step"] == 6 * 16 * 10**9
    assert step["bytes_per_step"] == 8 * 2 * 10**6
    assert step["seconds_by_flops"] == pytest.approx(6 * 16 * 10**9 / 8 / rate)
    assert step["seconds_by_bytes"] == pytest.approx(2e6 / 1e9)


def test_parts_of_a_batch_one_after_another_hide_bytes(monkeypatch):
    step = counted_by_xla(monkeypatch, **{"optimizer.accumulate": 2})
    assert step["bytes_per_step"] is step["seconds_by_bytes"] is None
    assert step["seconds_by_flops"] > 0


def test_share_of_the_peak():
    step = {"flops_per_step": 10**12, "bytes_per_step": 2 * 10**9}
    assert roofline.achieved(step, 0.5) == {"flops_per_second": 2e12}
    step |= {"seconds_by_flops": 0.01, "seconds_by_bytes": 0.002}
    assert roofline.achieved(step, 0.5)["mfu"] == 0.02
    told = roofline.sentence(step, "TPU v4")
    assert told == "1,000.0 GFLOP, 2.00 GB: 10 ms and 2 ms alone on TPU v4"


def test_summary_divides_the_cpu_before_jax_looks_for_devices(monkeypatch):
    class ReachedError(Exception):
        pass

    def split_cpu(*given, **more):
        raise ReachedError(given, more)

    def layers(*_):
        raise AssertionError("JAX is used before")

    monkeypatch.setattr(parallel, "split_cpu", split_cpu)
    monkeypatch.setattr(cost, "layers", layers)
    argv = ["summary", "--config=configs/v1_20.py", "--image_size=8", "--roofline"]
    with pytest.raises(ReachedError, match=r"\(128,\), {'image_size': 8}"):
        summary.main(argv)


@pytest.mark.slow
def test_summary_tells_it(capsys):
    argv = ["summary", "--config=configs/digits.py", "--config.model.depth=11"]
    argv += ["--config.batch_size=8", "--image_size=8", "--channels=1", "--roofline"]
    assert command_line.call(summary.main, argv) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("a step of 8 images ")
    assert f"the peak rates of {jax.devices()[0].device_kind} are not known" in last
