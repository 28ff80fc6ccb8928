"""The cost of training, by the number of devices, by depth and by batch.

    python -m experiments.scaling [--scale=full]

Claim. The cost of a step, in time and in memory, is linear in the depth and in the
batch: a network ten times as deep costs ten times as much, and nothing else grows. The
batch is divided among the devices, and so is the memory that it takes.

Method. Each cell is measured in a process of its own, alone: it compiles the training
call that `resnet_jax.main` makes, does a few updates to warm up, and takes the median
of rounds. At every depth, identical blocks run in a loop (`model.scan`).
(a) and (d): v1-20 on 1, 2, 4 and 8 devices with the same total batch; on a CPU they are
simulated and share its cores; elsewhere, no more than there are.
(b) and (e): by depth; the lines are fits of a + b x depth that minimise relative
errors, so that shallow networks count as much as deep ones.
(c) and (f): by batch.
Memory is what the compiler reserves on each device (`memory_analysis`: arguments,
results and temporaries, the data set included); the table also has the process's peak,
which on a CPU is everything that it holds.

Found (smoke, each cell once; two cores of a shared machine). Memory and time are linear
in the depth: 0.46 and 0.57 MiB per layer for versions 1 and 2, within 1% and 7% of a
line from 20 to 1202 and 1001 layers, and 0.46 and 0.42 ms per layer, within 8%, where
10% counts as linear. They are linear in the batch, too, time within 7% and memory
within 0.1%, but with a constant part: from batch 32 to 256, v1-20 becomes 1.6 times as
fast and v1-56 1.5 times; 512 gains nothing more. v1-20 with batch 128, jit and one
device is in both (a) and (c), and reached 5,763 and 6,011 images per second; one device
with pmap, which computes the same, 5,326: that much is noise. Eight simulated devices
hold 7 MiB each where one holds 22. They share two cores, so they cannot be faster than
one: eight reach 0.4 of its images per second with jit, and 0.6 with pmap. Compilation
takes 3 to 7 s at any depth.

Cost. Smoke: digits, batch 32, 28 cells; six minutes on two CPU cores that nothing else
uses. Full: random images in CIFAR-10's shape, batch 128; GPUs or TPUs with 40 GB each.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import replace

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs import common
from experiments import study
from experiments.study import STYLES, Study
from resnet_jax import command_line, data, parallel, results
from resnet_jax.trainer import Trainer

DEPTHS = {1: (20, 32, 44, 56, 110, 1202), 2: (20, 29, 56, 110, 164, 1001)}
BATCHES = (32, 64, 128, 256, 512)
SCALES = {
    "smoke": {"dataset": "digits", "batch_size": 32, "seconds": 3},
    "full": {"dataset": "fake", "batch_size": 128, "seconds": 10},
}
LINEAR = 0.1  # the largest relative distance from a line that counts as linear


def measure_here(version, depth, batch_size, devices, mode, dataset, seconds) -> dict:
    """Compiles and times training in this process; `devices` 0 means all."""
    config = common.get_config("paper", version, depth, scan=True)
    config.update(batch_size=batch_size, steps=10**6, parallel=mode)
    config.dataset.name = dataset
    parallel.split_cpu(batch_size, image_size=data.known_size(config.dataset))
    loaded = replace(data.load(config.dataset), eval=None)  # compiles training alone
    trainer = Trainer(config, loaded, devices=jax.devices()[: devices or None])
    state = trainer.place(trainer.new_state())
    trainer.compile()
    rounds, steps, done = [], 2, 0
    while sum(rounds[2:]) * steps < seconds or len(rounds) < 5:
        start = time.perf_counter()
        state, _ = trainer.train(state, done, done + steps)
        rounds.append((time.perf_counter() - start) / steps)
        done += steps
        if len(rounds) == 2:  # warm: from now on a round takes a fifth of the time
            steps = max(2, round(seconds / 5 / rounds[1]))
    (program,) = trainer.programs.values()
    memory = program.result().memory_analysis()
    reserved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    reserved += memory.temp_size_in_bytes - memory.alias_size_in_bytes
    return {
        "step_seconds": study.numbers(statistics.median(rounds[2:])),
        "compile_seconds": round(trainer.compile_seconds, 2),
        "device_bytes": reserved,
        "peak_bytes": results.peak_memory(),
        "device_count": trainer.parallel.device_count,
        "made_by": {"device": jax.devices()[0].device_kind},
    }


def measure(**settings) -> dict:
    """Measures in a new process, whose CPU has as many devices as are asked for."""
    code = "import sys; from experiments import scaling; scaling.tell(sys.argv[1])"
    # Otherwise what an earlier run compiled would take no time.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if settings["devices"]:
        environment["JAX_NUM_CPU_DEVICES"] = str(settings["devices"])
    command = [sys.executable, "-c", code, json.dumps(settings)]
    return json.loads(study.run_process(command, env=environment).splitlines()[-1])


def tell(settings: str) -> None:
    """Prints a measurement, for `measure`."""
    print(json.dumps(measure_here(**json.loads(settings))))


def device_counts() -> list[int]:
    """The numbers of devices to measure: those of 1, 2, 4, 8 that exist; on a CPU, all.

    Another process counts them, since this one must not hold them.
    """
    code = "import jax; print(jax.default_backend(), len(jax.devices()))"
    backend, count = study.run_process([sys.executable, "-c", code]).split()[-2:]
    return [n for n in (1, 2, 4, 8) if backend == "cpu" or n <= int(count)]


def line(x, y) -> tuple[float, float, np.ndarray]:
    """Fits y = a + b x in relative terms; returns a, b and the relative residuals."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    slope, start = np.polyfit(x, y, 1, w=1 / y)
    return float(start), float(slope), (y - start - slope * x) / y


def verdict(name: str, by: str, at, values, unit: str) -> str:
    """A sentence on whether values are linear in what they are `by`."""
    start, slope, residuals = line(at, values)
    worst = int(np.abs(residuals).argmax())
    linear = "linear" if abs(residuals[worst]) <= LINEAR else "not linear"
    return (
        f"{name}: {start:.4g} + {slope:.4g} x {by} {unit}, residuals "
        f"{residuals.min():+.1%} to {residuals.max():+.1%} (largest at {by} "
        f"{at[worst]}): {linear} within {LINEAR:.0%}"
    )


def table(cells: dict[str, list[tuple[dict, dict]]]) -> str:
    """The cells of each axis, a line each, and verdicts by depth and by batch."""
    lines = [
        f"{'by':<8} {'network':<8} {'batch':>5} {'devices':>10} {'images/s':>9} "
        f"{'s/step':>9} {'compile s':>9} {'MiB/device':>10} {'peak MiB':>9}"
    ]
    for axis, measured in cells.items():
        for settings, result in measured:
            network = f"v{settings['version']}-{settings['depth']}"
            devices = f"{result['device_count']} {settings['mode']}"
            lines.append(
                f"{axis:<8} {network:<8} {settings['batch_size']:>5} {devices:>10} "
                f"{settings['batch_size'] / result['step_seconds']:>9.1f} "
                f"{result['step_seconds']:>9.4f} {result['compile_seconds']:>9.1f} "
                f"{result['device_bytes'] / 2**20:>10.1f} "
                f"{result['peak_bytes'] / 2**20:>9.0f}"
            )
    for axis, group, label in (
        ("depth", "version", "v{}"),
        ("batch_size", "depth", "v1-{}"),
    ):
        for value, pairs in _by(cells[axis], group).items():
            at = [settings[axis] for settings, _ in pairs]
            steps = [result["step_seconds"] * 1000 for _, result in pairs]
            memory = [result["device_bytes"] / 2**20 for _, result in pairs]
            name, by = label.format(value), axis.removesuffix("_size")
            lines.append(verdict(f"time of {name}", by, at, steps, "ms"))
            lines.append(verdict(f"memory of {name}", by, at, memory, "MiB"))
    return "\n".join(lines)


def _by(measured: list[tuple[dict, dict]], field: str) -> dict:
    """Groups the cells by the value of a setting."""
    groups = {}
    for settings, result in measured:
        groups.setdefault(settings[field], []).append((settings, result))
    return groups


def draw(cells: dict[str, list[tuple[dict, dict]]]) -> Figure:
    """Speed above and memory below, by devices, depth and batch."""
    figure, axes = study.figure(7.2, 4.2, nrows=2, ncols=3)

    def plot(panel: Axes, x: str, group: str, label: str, value, fits=False) -> None:
        for (name, pairs), style in zip(
            _by(cells[x], group).items(), STYLES, strict=False
        ):
            at = [(s | r)["device_count" if x == "devices" else x] for s, r in pairs]
            values = [value(settings, result) for settings, result in pairs]
            style = style | {"label": label.format(name)}
            panel.plot(at, values, **style | ({"linestyle": "none"} if fits else {}))
            if fits:
                start, slope, _ = line(at, values)
                fine = np.geomspace(at[0], at[-1], 200)
                panel.plot(fine, start + slope * fine, color=style["color"])
            panel.set(xscale="log", xticks=at, xlabel=x)
        panel.minorticks_off()
        panel.xaxis.set_major_formatter("{x:g}")
        panel.tick_params(axis="x", rotation=90 if fits else 0)
        panel.legend(fontsize=7)

    def speed(settings: dict, result: dict) -> float:
        return settings["batch_size"] / result["step_seconds"]

    def memory(_, result: dict) -> float:
        return result["device_bytes"] / 2**20

    batch, labels = "batch_size", ("images per second", "MiB/device")
    for row, (value, label) in enumerate(zip((speed, memory), labels, strict=True)):
        plot(axes[row, 0], "devices", "mode", "v1-20, {}", value)
        plot(axes[row, 2], batch, "depth", "v1-{}", value)
        axes[row, 0].set(ylabel=label, ylim=(0, None))
        axes[row, 2].set(ylabel=label, xlabel="batch", yscale=("linear", "log")[row])
    axes[0, 2].set(ylim=(0, None))
    plot(axes[0, 1], "depth", "version", "v{}", lambda _, r: r["step_seconds"], True)
    plot(axes[1, 1], "depth", "version", "v{}", memory, True)
    axes[0, 1].set(yscale="log", ylabel="seconds per step")
    axes[1, 1].set(yscale="log", ylabel="MiB/device")
    for panel, letter in zip(axes.flat, "abcdef", strict=True):
        panel.set_title(f"({letter})", loc="left")
    return figure


def main(argv: list[str]) -> None:
    """Measures what is missing; prints the table and draws the figure."""
    experiment = Study.of(argv, __doc__)
    scale = SCALES[experiment.scale]
    usual = {"version": 1, "depth": 20, "devices": 0, "mode": "jit"} | scale
    if experiment.redraw:  # on any machine, what was measured on another
        counts = sorted({cell["devices"] for cell in experiment.settings()} - {0})
    else:
        counts = device_counts()
    grid = {
        "devices": [
            usual | {"batch_size": 128, "devices": devices, "mode": mode}
            for mode in ("jit", "pmap")
            for devices in counts
        ],
        "depth": [
            usual | {"version": version, "depth": depth}
            for version, depths in DEPTHS.items()
            for depth in depths
        ],
        "batch_size": [
            usual | {"depth": depth, "batch_size": batch_size}
            for depth in (20, 56)
            for batch_size in BATCHES
        ],
    }
    cells = {
        axis: [(settings, experiment.cell(measure, **settings)) for settings in chosen]
        for axis, chosen in grid.items()
    }
    print(table(cells))
    print(experiment.made_by())
    experiment.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
