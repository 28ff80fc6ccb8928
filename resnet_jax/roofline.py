"""The cost of a training step, and how long a device would take at its peaks.

FLOPs are those of the network: 2 per multiply-accumulate, once forward and twice
backward, without what `model.remat` recomputes. Bytes are what the compiled program
moves to and from memory, by XLA's own count.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import data
from resnet_jax.trainer import Trainer


class Peak(NamedTuple):
    """A device's published peaks: dense FLOP/s by `model.dtype`, and bytes/s."""

    bfloat16: float
    float32: float
    bandwidth: float


# By `jax.Device.device_kind`. NVIDIA's data sheets, for GPUs since Ampere with TF32, in
# which XLA computes float32 convolutions; V100 and T4 have no bfloat16. TPU:
# docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm, where XLA computes
# float32 convolutions in bfloat16.
_PEAKS = {
    r"NVIDIA H100 PCIe": Peak(756e12, 378e12, 2.0e12),
    r"NVIDIA H100(?!.*NVL)": Peak(989.4e12, 494.7e12, 3.35e12),
    r"NVIDIA H200(?!.*NVL)": Peak(989.4e12, 494.7e12, 4.8e12),
    r"NVIDIA A100.*80GB": Peak(312e12, 156e12, 2.039e12),
    r"NVIDIA A100": Peak(312e12, 156e12, 1.555e12),
    r".*V100": Peak(15.7e12, 15.7e12, 0.9e12),
    r".*\bT4$": Peak(8.1e12, 8.1e12, 0.32e12),
    r"TPU v4": Peak(275e12, 275e12, 1.228e12),
    r"TPU v5 lite|TPU v5e": Peak(197e12, 197e12, 0.819e12),
    r"TPU v5": Peak(459e12, 459e12, 2.765e12),
    r"TPU v6": Peak(918e12, 918e12, 1.64e12),
}


def peak(device_kind: str) -> Peak | None:
    """The peaks of a device; None if they are unknown, such as a CPU's."""
    known = (peak for kind, peak in _PEAKS.items() if re.match(kind, device_kind))
    return next(known, None)


def step_cost(trainer: Trainer, config: ConfigDict, macs: int) -> dict[str, Any]:
    """The cost of a step of a compiled trainer, over all devices.

    Args:
      trainer: one whose programs are compiled.
      config: its config.
      macs: multiply-accumulates of one image, forward.

    Returns:
      'flops_per_step'; 'bytes_per_step', or None where loops or oneDNN hide them; and
      for known devices 'seconds_by_flops' and 'seconds_by_bytes', the time that these
      alone would take.
    """
    count = trainer.parallel.device_count
    flops = 6 * macs * config.batch_size
    cost = trainer.programs[0].result().cost_analysis() or {}
    # XLA counts the body of a loop once: right for the loop over steps, not for others.
    loops = trainer.net.scan or config.optimizer.accumulate > 1
    # It does not count the work of oneDNN.
    hidden = loops or trainer.parallel.uses_onednn
    moved = None if hidden else cost.get("bytes accessed")
    result = {"flops_per_step": flops, "bytes_per_step": moved and int(moved * count)}
    if known := peak(jax.devices()[0].device_kind):
        result["seconds_by_flops"] = flops / count / getattr(known, config.model.dtype)
        result["seconds_by_bytes"] = moved and moved / known.bandwidth
    return result


def achieved(step: dict[str, Any], seconds: float) -> dict[str, float]:
    """'flops_per_second' of steps that took `seconds` each, and, for known devices,
    'mfu', the fraction of their peak.
    """
    rates = {"flops_per_second": float(f"{step['flops_per_step'] / seconds:.4g}")}
    if "seconds_by_flops" in step:
        rates["mfu"] = round(step["seconds_by_flops"] / seconds, 5)
    return rates


def sentence(step: dict[str, Any], device_kind: str) -> str:
    """The result of `step_cost`, in a line."""
    moved = step["bytes_per_step"]
    amounts = f"{step['flops_per_step'] / 1e9:,.1f} GFLOP, " + (
        f"{moved / 1e9:,.2f} GB" if moved else "bytes hidden from XLA"
    )
    if "seconds_by_flops" not in step:
        return f"{amounts} (the peak rates of {device_kind} are not known)"
    alone = f"{1000 * step['seconds_by_flops']:.3g} ms"
    if moved:
        alone += f" and {1000 * step['seconds_by_bytes']:.3g} ms"
    return f"{amounts}: {alone} alone on {device_kind}"


def compile_step_cost(
    config: ConfigDict, num_classes: int, image_shape: tuple[int, int, int], macs: int
) -> dict[str, Any]:
    """The `step_cost` of a config, on this machine's devices and zero images.

    Raises:
      UserError: as for `Trainer`.
    """
    config = ConfigDict({**config.to_dict(), "steps": 1})  # however many a run makes
    labels = np.zeros(config.batch_size, np.int32)
    split = data.Split(np.zeros((len(labels), *image_shape), np.uint8), labels)
    names = tuple(map(str, range(num_classes)))
    trainer = Trainer(config, data.Dataset("zeros", names, split, None, None))
    trainer.compile()
    return step_cost(trainer, config, macs)
