"""Kills training runs at random moments and compares what they leave, bit for bit.

    python -m experiments.fault_injection --runs=30
    python -m experiments.fault_injection --runs=30 --signal=SIGTERM

Claim: a run that is interrupted anywhere and restarted by the same command ends with
the same parameters, optimizer state and BatchNorm statistics, the same metrics.jsonl
and the same summary.json (except for times) as one that was never interrupted.

Method: a first run of a small network on scikit-learn's digits is left alone. Each of
the others gets one to three signals, each in a separate start, aimed at its start-up, a
training call, an evaluation, a save, or the moment when a checkpoint gets its name;
then the same command runs to the end. With SIGTERM the process must also exit by itself
within 30 seconds, with status 143, or 0 if the run was over by then; in its first
seconds, while it imports, the signal kills it like any Python process.

A run takes about half a minute on two CPU cores. Result: OUT/SIGNAL.json.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from resnet_jax import UserError, command_line, data, main, provenance, workdir
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.metrics import best_step, read_rows
from resnet_jax.trainer import Trainer

# For each phase of a run: how many of its beginnings a signal may follow, and its
# longest delay in seconds.
_PHASES = {
    "start-up": (1, 6.0),
    "training": (8, 0.2),
    "evaluation": (3, 0.1),
    "saving": (3, 0.4),
    "committing": (3, 0.05),
}
_ARGUMENTS = [
    f"--config={Path(__file__).parents[1] / 'configs' / 'digits.py'}",
    "--config.model.version=1",
    "--config.model.depth=8",
    "--config.model.width=8",
    "--config.batch_size=128",
    "--config.epochs=6",
    "--config.steps_per_call=3",
    "--config.dataset.train_split=train[:1200]",
    "--config.dataset.validation_split=train[1200:]",
    "--config.checkpoint.every=1",
]
_MEASURED = (
    "seconds",
    "compile_seconds",
    "train_seconds",
    "evaluation_seconds",
    "images_per_second",
    "images_per_second_per_device",
    "flops_per_second",
    "mfu",
    "peak_memory_bytes",
)


def _train(phases: int, arguments: list[str]) -> None:
    """Trains, and writes a line to the file descriptor `phases` when a phase begins."""

    def announce(owner: type, method: str, phase: str) -> None:
        original = getattr(owner, method)

        def announced(*args):
            os.write(phases, f"{phase}\n".encode())
            return original(*args)

        setattr(owner, method, announced)

    announce(Trainer, "train", "training")
    announce(Trainer, "evaluate", "evaluation")
    announce(Checkpoints, "save", "saving")
    announce(Checkpoints, "_done", "committing")
    sys.exit(command_line.call(main.main, [main.__name__, *arguments]))


def start(
    directory: Path,
    number: signal.Signals | None = None,
    aim: tuple[str, int, float] | None = None,
    arguments: tuple[str, ...] = (),
) -> dict:
    """Runs the command once, and sends it a signal if one is given.

    Args:
      directory: of the run; NAME.log beside it gets what the command prints.
      number: the signal.
      aim: a phase, which of its beginnings to wait for, and how many seconds more.
      arguments: more arguments of the command.

    Returns:
      The exit status; if a signal was sent before the end, also the phase aimed at,
      whether the run was finished before, the seconds it took to exit, the newest
      checkpoint's step, and the number of checkpoints that were being written.
    """
    reading, writing = os.pipe()
    child = "import sys; from experiments.fault_injection import _train; "
    command = [sys.executable, "-c", f"{child}_train({writing}, sys.argv[1:])"]
    with directory.with_name(f"{directory.name}.log").open("a") as log:
        process = subprocess.Popen(
            [*command, *_ARGUMENTS, *arguments, f"--workdir={directory}"],
            cwd=Path(__file__).parents[1],
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
        )
    os.close(writing)
    with os.fdopen(reading) as phases:
        if number is None:
            return {"status": process.wait()}
        phase, count, delay = aim
        begun = int(phase == "start-up")
        while begun < count and (line := phases.readline()):
            begun += line.strip() == phase
        time.sleep(delay)
        if process.poll() is not None:
            return {"status": process.returncode}
        finished = (directory / "summary.json").exists()
        sent = time.perf_counter()
        process.send_signal(number)
        process.wait()
    names = [path.name for path in (directory / "checkpoints").glob("*")]
    return {
        "status": process.returncode,
        "phase": phase,
        "finished": finished,
        "seconds_to_end": round(time.perf_counter() - sent, 2),
        "saved_step": max((int(n) for n in names if n.isdigit()), default=None),
        "saves_cut_off": sum("orbax-checkpoint-tmp" in name for name in names),
    }


def contents(directory: Path) -> tuple[str, dict, list[np.ndarray]]:
    """A run's metrics.jsonl, its summary without times, and all arrays of the newest
    and of the best checkpoint.
    """
    config = workdir.read_config(directory)
    like = Trainer(config, data.load(config.dataset)).blank_state().split()
    checkpoints = Checkpoints(directory / "checkpoints", keep=None)
    newest, _ = checkpoints.newest()
    arrays = []
    for step in (newest, best_step(read_rows(directory))):
        checkpoints.require_intact(step)
        arrays += jax.tree.leaves(checkpoints.restore(step, like))
    checkpoints.close()
    summary = workdir.read_summary(directory)
    kept = {name: summary[name] for name in summary if name not in _MEASURED}
    return (directory / "metrics.jsonl").read_text(), kept, arrays


def differences(first: Path, second: Path) -> list[str]:
    """Names the contents of two runs that are not bit-identical."""
    (metrics, summary, arrays), (other, other_summary, other_arrays) = map(
        contents, (first, second)
    )
    different = [] if metrics == other else ["metrics.jsonl"]
    different += [] if summary == other_summary else ["summary.json"]
    if not all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(arrays, other_arrays, strict=True)
    ):
        different.append("arrays")
    return different


def interrupted(directory: Path, number: signal.Signals, seed: int) -> list[dict]:
    """Runs the command with one to three signals, then to its end."""
    rng = random.Random(seed)
    starts = []
    for _ in range(rng.randint(1, 3)):
        phase = rng.choice(list(_PHASES))
        count, seconds = _PHASES[phase]
        aim = (phase, rng.randint(1, count), rng.uniform(0, seconds))
        starts.append(start(directory, number, aim))
    return [*starts, start(directory)]


def faults(starts: list[dict], number: signal.Signals) -> list[str]:
    """Lists what is wrong with how the processes of one run ended."""
    wrong = []
    for ended in starts:
        expected = [0]
        if "phase" in ended and number == signal.SIGTERM:
            expected = [128 + number, *([0] if ended["finished"] else [])]
            if ended["phase"] == "start-up":
                # Python itself dies of a signal that comes before its handler is set.
                expected.append(-number)
        elif "phase" in ended:
            expected = [-number]
        if ended["status"] not in expected:
            wrong.append(f"exit status {ended['status']}")
        if ended.get("seconds_to_end", 0) > 30:
            wrong.append(f"{ended['seconds_to_end']} s to end")
    return wrong


def run(argv: list[str]) -> None:
    """Interrupts runs, compares them, and stores the verdicts."""

    def define(values: flags.FlagValues) -> None:
        into = {"flag_values": values}
        flags.DEFINE_integer("runs", 30, "How many runs to interrupt.", **into)
        flags.DEFINE_enum(
            "signal",
            "SIGKILL",
            ["SIGKILL", "SIGTERM"],
            "Signal that interrupts them.",
            **into,
        )
        results = Path(__file__).parent / "results" / "fault_injection"
        flags.DEFINE_string("out", str(results), "Directory for the result.", **into)

    values = command_line.parse(argv, __doc__, define)
    if values.runs < 1:
        raise UserError(f"--runs={values.runs}: give at least 1")
    out = Path(values.out)
    workdir.make(out)
    number = signal.Signals[values.signal]
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        untouched = Path(temporary) / "untouched"
        if start(untouched)["status"]:
            raise UserError(untouched.with_suffix(".log").read_text())
        for seed in range(values.runs):
            directory = Path(temporary) / f"run{seed}"
            starts = interrupted(directory, number, seed)
            wrong = faults(starts, number)
            wrong += [] if starts[-1]["status"] else differences(untouched, directory)
            runs.append({"seed": seed, "starts": starts, "wrong": wrong})
            hit = [ended["phase"] for ended in starts if "phase" in ended]
            verdict = ", ".join(wrong) or "equal"
            print(f"run {seed}  {values.signal} in {', '.join(hit)}: {verdict}")
            if wrong:
                print(directory.with_name(f"{directory.name}.log").read_text())
    sent = [ended for run in runs for ended in run["starts"] if "phase" in ended]
    result = {
        "signal": values.signal,
        "equal": sum(not run["wrong"] for run in runs),
        "runs": len(runs),
        "signals": {
            phase: sum(ended["phase"] == phase for ended in sent) for phase in _PHASES
        },
        "saves_cut_off": sum(ended["saves_cut_off"] for ended in sent),
        "longest_seconds_to_end": max((e["seconds_to_end"] for e in sent), default=0),
        "device": jax.devices()[0].device_kind,
        **provenance.versions_and_commit(),
        "each": runs,
    }
    print(
        f"{result['equal']} of {len(runs)} equal; signals by phase "
        f"{result['signals']}; {result['saves_cut_off']} saves cut off"
    )
    workdir.write_json(out / f"{values.signal}.json", result)
    if result["equal"] < len(runs):
        raise UserError("not all runs are equal: see the logs above")


if __name__ == "__main__":
    command_line.run(run)
