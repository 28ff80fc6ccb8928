"""A run's numbers as they come: metrics.jsonl, TensorBoard, and what a person sees."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from resnet_jax import workdir as files
from resnet_jax.plan import Plan


class Recorder:
    """Keeps the rows of metrics.jsonl and shows how far the run is.

    A row has the step (updates done), the epoch, and scalars; no times, so that a run
    that was resumed leaves the same file as one that was not.
    """

    def __init__(self, workdir: Path, step: int, plan: Plan):
        """Starts, or goes on after `step`: rows behind it are dropped."""
        path = workdir / "metrics.jsonl"
        self._plan = plan
        self._rows = [row for row in read_rows(workdir) if row["step"] <= step]
        files.write(path, "".join(map(_line, self._rows)))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)
        self._first_step, self._start = step, time.perf_counter()
        self._bar = tqdm(
            total=plan.total_steps * plan.batch_size,
            initial=step * plan.batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def train_row(self, step: int, means: dict[str, float]) -> None:
        """Records the means of a call's training metrics; moves the progress bar."""
        names = {"learning_rate": "learning_rate"}
        self._record(
            step, {names.get(name, f"train_{name}"): means[name] for name in means}
        )
        self._bar.set_postfix_str(
            f"epoch {step / self._plan.steps_per_epoch:.1f}, "
            f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}",
            refresh=False,
        )
        self._bar.update(step * self._plan.batch_size - self._bar.n)

    def epoch_row(self, step: int, epoch: int, metrics: dict) -> None:
        """Records an evaluation (metrics may be empty), and prints the epoch's line."""
        endings = ("_loss", "_accuracy")
        scalars = {
            name: value
            for name, value in metrics.items()
            if name.endswith(endings) and np.ndim(value) == 0
        }
        if scalars:
            self._record(step, scalars)
        parts = [f"epoch {epoch}", f"step {step:,} of {self._plan.total_steps:,}"]
        parts += [f"train loss {self._epoch_mean('train_loss', epoch):.4f}"]
        parts += [f"accuracy {self._epoch_mean('train_accuracy', epoch):.2%}"]
        for name in ("validation", "test"):
            if f"{name}_accuracy" in metrics:
                parts.append(f"{name} accuracy {metrics[f'{name}_accuracy']:.2%}")
        elapsed = time.perf_counter() - self._start
        left = elapsed / (step - self._first_step) * (self._plan.total_steps - step)
        parts.append(f"{tqdm.format_interval(left)} left")
        with tqdm.external_write_mode():
            print(", ".join(parts), flush=True)

    def _record(self, step: int, scalars: dict) -> None:
        row = {"step": step, "epoch": step / self._plan.steps_per_epoch, **scalars}
        row = {name: _json_number(value) for name, value in row.items()}
        self._rows.append(row)
        self._file.write(_line(row))
        self._file.flush()
        for name in scalars:
            if row[name] is not None:
                self._tensorboard.add_scalar(name, row[name], step)

    def _epoch_mean(self, name: str, epoch: int) -> float:
        """The mean over the epoch's steps, from the rows of its calls."""
        total, before = 0.0, self._plan.epoch_end(epoch - 1)
        start = before
        for row in self._rows:
            if name in row and row["step"] > before:
                total += row[name] * (row["step"] - start)
                start = row["step"]
        return total / (start - self._plan.epoch_end(epoch - 1))

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        self._tensorboard.close()


def read_rows(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def _json_number(value):
    """Seven digits, as many as float32 has; JSON knows no NaN or infinity."""
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
