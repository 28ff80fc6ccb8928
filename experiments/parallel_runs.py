"""Runs of `resnet_jax.main` spread over the devices, one at a time on each."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from resnet_jax import UserError, results, workdir
from resnet_jax.preemption import StoppedError


class Job(NamedTuple):
    """One run."""

    directory: Path
    config: ConfigDict
    arguments: list[str]  # of resnet_jax.main, which give that config

    @property
    def log(self) -> Path:
        """The file with the run's output."""
        return self.directory.with_suffix(".log")


def outcome(job: Job) -> dict | None:
    """The summary of a finished run, {} of one that diverged, None if not done."""
    if "training diverged" in _last_line(job.log) and _has_its_config(job):
        return {}
    result = workdir.read_summary(job.directory)
    return result if result and results.is_whole(result, job.config) else None


def _last_line(path: Path) -> str:
    text = path.read_text() if path.exists() else ""
    return (text.strip().splitlines() or [""])[-1]


def _has_its_config(job: Job) -> bool:
    """Whether the run has the job's config: before a checkpoint it may get another."""
    if not workdir.is_run(job.directory):
        return False
    stored, wanted = workdir.read_config(job.directory), job.config
    return workdir.as_json(stored) == workdir.as_json(wanted)


def devices() -> list[dict[str, str]]:
    """For each device that can train by itself, the environment that shows it alone."""
    # In another process, since querying a device claims it.
    code = (
        "import jax; d = jax.local_devices();"
        "print(d[0].platform, len({getattr(x, 'coords', x.id) for x in d}))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    platform, count = (answer.stdout.split() or ["cpu", "1"])[-2:]
    if platform == "cpu" or count == "1":
        return [{}]
    if platform == "tpu":
        alone = dict.fromkeys(
            ("TPU_CHIPS_PER_PROCESS_BOUNDS", "TPU_PROCESS_BOUNDS"), "1,1,1"
        )
        return [alone | {"TPU_VISIBLE_CHIPS": str(n)} for n in range(int(count))]
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown else map(str, range(int(count)))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names]


def start(job: Job, device: dict[str, str]) -> subprocess.Popen:
    """Starts a run on a device; it resumes where it was."""
    command = [sys.executable, "-u", "-m", "resnet_jax.main", *job.arguments]
    command.append(f"--workdir={job.directory}")
    if "TPU_VISIBLE_CHIPS" in device:  # or it would look for the others of its pod
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command += [f"--coordinator={address}", "--num_processes=1", "--process_id=0"]
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w") as log:
        return subprocess.Popen(
            command,
            env=os.environ | device | {"PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it only through this process
        )


def run_all(waiting: list[Job], free: list[dict[str, str]]) -> None:
    """Runs the jobs, one per device at a time.

    Raises:
      UserError: a run failed, other than by divergence; the others have saved.
      StoppedError: a signal came; they have all saved.
    """
    received: list[int] = []  # more than one change nothing: the runs are saving

    def note(number: int, _) -> None:
        received.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = {number: signal.signal(number, note) for number in numbers}
    running: dict[subprocess.Popen, tuple[Job, dict[str, str]]] = {}
    waiting, free, total = [*waiting], [*free], len(waiting)
    try:
        while (waiting or running) and not received:
            while waiting and free:
                job, device = waiting.pop(0), free.pop(0)
                running[start(job, device)] = job, device
            for process in [one for one in running if one.poll() is not None]:
                job, device = running.pop(process)
                free.append(device)
                result = outcome(job)
                if result is None:
                    raise UserError(
                        f"{job.directory} failed: {_last_line(job.log)} (see {job.log})"
                    )
                done = total - len(waiting) - len(running)
                end = f"{result['validation_accuracy']:.2%}" if result else "diverged"
                print(f"{done} of {total}: {job.directory}: {end}", flush=True)
            time.sleep(0.1)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        number = signal.Signals(received[0])
        raise StoppedError(number, "with its runs, which are saved")
