"""Images per second: ours, a plain Flax loop, PyTorch and Keras on the same networks.

    pip install -r requirements-bench.txt
    python -m experiments.benchmark --networks=v1-20,v2-56 --batch_sizes=128
    python -m experiments.benchmark --networks=v2-1001 --contenders=ours,plain

Each contender (`experiments/peers`) runs in a process of its own. All get the same
images and weights, and timing starts only once their logits agree with ours and one
update of ours agrees with the plain loop's. They are then timed in turn while the
others are idle, in alternating order; after a warm-up round, the medians of the rounds
count. Each has as many threads as there are cores.

'step' is training on batches that are ready in memory, 'epoch' is training with the
contender's own input pipeline (flips, and crops from images padded by 4), 'evaluate'
computes the accuracy on as many images of the test split. Ours keeps the data on the
device and augments them there, so 'step' includes all that and equals 'epoch'; 'input'
is the share of an epoch spent on what comes before the network. An epoch is `--images`
images, fewer than CIFAR-10 has, so work done once per epoch weighs more than in a real
one. 'first' is the time from the process's start to the end of the first update,
without a compilation cache, and 'compile' the first update's time minus a later one's;
for ours it includes compiling the evaluation. Memory is the process's peak, or on a GPU
that of its GPU memory, except for Keras, whose is always that of host memory; worker
processes of PyTorch's loader do not count. By default v1-20 and v2-56 are measured at
batch 128, with epochs of 1,280 images, in five rounds: an hour or two on two cores.
`--networks=v1-20,v1-56,v2-56,v2-164 --batch_sizes=32,128,512` takes a night.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags

from configs import common
from experiments import study
from experiments.peers import CONTENDERS, PROBES, report
from resnet_jax import UserError, command_line, data, workdir
from resnet_jax.config import validate

_MEASURED = ("in_memory", "epoch", "evaluate")
# Largest difference from our logits, relative to the largest; bfloat16 keeps 8 bits.
_TOLERANCE = {"float32": 1e-3, "bf16": 0.1}
_UPDATE_TOLERANCE = 1e-6


class FailedError(Exception):
    """A contender's process ended."""


class Process:
    """A contender's process; see `experiments.peers.serve`."""

    def __init__(self, name: str, directory: Path):
        cores = str(len(os.sched_getaffinity(0)))
        settings = {"OMP_NUM_THREADS": cores, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        self._log = directory / f"{name}.log"
        command = [sys.executable, "-m", "experiments.peers.serve"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, name, str(directory), str(time.time())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=kept | settings,
            )

    def answer(self) -> dict:
        """Waits for its next answer. Raises FailedError if the process has ended."""
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        last = (self._log.read_text().strip() or "no output").splitlines()[-1]
        raise FailedError(f"its process ended ({last})")

    def ask(self, method: str) -> dict:
        """Calls a method; returns its 'value' and the 'seconds' that it took."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why
            print(method, file=self._process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Kills it, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


def network_config(network: str, batch_size: int, images: int, dataset: str):
    """Our config of a network such as 'v2-56', on a part of a data set."""
    version, _, depth = network.removeprefix("v").partition("-")
    if not (version.isdigit() and depth.isdigit()):
        raise UserError(f"--networks={network}: give networks such as v1-20,v2-56")
    deep = int(depth) >= 1000
    config = common.get_config("paper", int(version), int(depth), scan=deep, remat=deep)
    # More steps than the rounds take, but few enough to count their images in int32.
    config.update(batch_size=batch_size, steps=min(10**6, 2**31 // batch_size - 1))
    config.dataset.update(name=dataset, stream="never")
    for split, most in (("train", images), ("eval", min(images, 10_000))):
        whole = max(1, most // batch_size) * batch_size
        name = "train" if split == "train" else "test"
        config.dataset[f"{split}_split"] = f"{name}[:{whole}]"
    return config


def compare(config, names: list[str], rounds: int) -> dict:
    """Measures contenders on one network and batch size."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        workdir.write_json(directory / "config.json", workdir.as_json(config))
        command = [sys.executable, "-m", "experiments.peers.prepare", str(directory)]
        prepared = json.loads(study.run_process(command).splitlines()[-1])
        if not prepared["update_error"] < _UPDATE_TOLERANCE:
            raise SystemExit(f"an update differs from the plain loop's: {prepared}")
        with contextlib.ExitStack() as stack:
            running = {}
            # All logits are compared with those of ours, which comes first.
            for name in ["ours", *(name for name in names if name != "ours")]:
                process = Process(name, directory)
                stack.callback(process.end)
                try:
                    running[name] = process, _begun(process, name, running)
                except FailedError as error:
                    process.end()
                    if name == "ours":
                        raise UserError(f"ours cannot be measured: {error}") from None
                    print(f"skipped {name}: {error}", flush=True)
            names = [name for name in names if name in running]
            timed = _timed(running, names, rounds)
    return {"contenders": timed, **prepared}


def _begun(process: Process, name: str, running: dict) -> dict:
    """Warms a contender up; returns the measurements of its start-up.

    Raises FailedError if its logits differ from ours.
    """
    start = process.answer()
    logits = np.array(process.ask("logits")["value"])
    if name != "ours":
        ours = np.array(running["ours"][0].ask("logits")["value"])
    else:
        ours = logits
    error = float(np.abs(logits - ours).max() / np.abs(ours).max())
    limit = _TOLERANCE["bf16" if "bf16" in name else "float32"]
    if not error < limit:
        raise FailedError(f"its logits differ from ours by {error:.2g}")
    for method in _MEASURED:
        process.ask(method)
    return {
        "first_seconds": start["since_start"],
        "first_step_seconds": start["seconds"],
        "logits_error": error,
    }


def _timed(running: dict, names: list[str], rounds: int) -> dict[str, dict]:
    seconds = {name: {method: [] for method in _MEASURED} for name in names}
    for name in names:
        if name.startswith("ours"):
            seconds[name]["input"] = []
            running[name][0].ask("input")
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            for method, times in seconds[name].items():
                times.append(running[name][0].ask(method)["seconds"])
    return {
        name: {
            "seconds": seconds[name],
            **running[name][1],
            "peak_bytes": running[name][0].ask("peak_memory")["value"],
        }
        for name in names
    }


def present(names: list[str]) -> list[str]:
    """The contenders whose packages are installed; prints the others."""
    installed = []
    for name in names:
        if name not in CONTENDERS:
            known = ", ".join(CONTENDERS)
            raise UserError(f"--contenders={name} is not known: choose from {known}")
        packages = CONTENDERS[name].packages
        missing = [p for p in packages if not importlib.util.find_spec(p)]
        if missing:
            print(f"skipped {name}: {missing[0]} is not installed", flush=True)
        else:
            installed.append(name)
    if not installed:
        raise UserError(f"--contenders={','.join(names)}: none of them can run here")
    return installed


def main(argv: list[str]) -> None:
    """Measures what is asked for; prints, writes and draws each result."""

    def define(values: flags.FlagValues) -> None:
        for name, default, text in (
            ("networks", "v1-20,v2-56", "Networks, such as v1-20."),
            ("batch_sizes", "128", "Images per step."),
            ("contenders", ",".join(CONTENDERS), "Implementations to measure."),
        ):
            flags.DEFINE_list(name, default, text, flag_values=values)
        for name, default, text in (
            ("rounds", 5, "Timed rounds."),
            ("images", 1280, "Images per epoch, rounded down to whole batches."),
        ):
            flags.DEFINE_integer(name, default, text, 1, flag_values=values)
        for name, default, text in (
            ("dataset", "fake", "fake (random images) or a data set such as cifar10."),
            ("out", str(Path(__file__).parent / "results/benchmark"), "Directory."),
        ):
            flags.DEFINE_string(name, default, text, flag_values=values)

    values = command_line.parse(argv, __doc__, define)
    sizes = values.batch_sizes
    if wrong := [size for size in sizes if not size.isdigit() or int(size) < PROBES]:
        raise UserError(
            f"--batch_sizes={wrong[0]}: give whole numbers from {PROBES} up, such as "
            "32,128"
        )
    configs = {
        (network, int(size)): network_config(
            network, int(size), values.images, values.dataset
        )
        for network in values.networks
        for size in sizes
    }
    for config in configs.values():
        validate(config)
        data.check(config.dataset)
    names, out = present(values.contenders), Path(values.out)
    workdir.make(out)
    for (network, size), config in configs.items():
        result = {
            "network": network,
            "batch_size": size,
            **compare(config, names, values.rounds),
            **report.conditions(),
        }
        print(report.table(result), flush=True)
        workdir.write_json(out / f"{network}_{size}.json", result)
        study.save(report.draw(result), out / f"{network}_{size}")


if __name__ == "__main__":
    command_line.run(main)
