"""A run's numbers as they come: metrics.jsonl, TensorBoard, and what a person sees."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from resnet_jax import UserError, bucket
from resnet_jax import workdir as files
from resnet_jax.plan import Plan

_WRITE_SECONDS = 5  # between two writes of metrics.jsonl without a checkpoint
_TELL_SECONDS = 60  # without a line, in logs, which have no progress bar


def _tensorboard() -> ModuleType:
    """`tensorboardX`, without PyTorch, whose import would take seconds if installed."""
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
        import tensorboardX
    finally:
        for name in hidden:
            del sys.modules[name]
    return tensorboardX


class Recorder:
    """Keeps the rows of metrics.jsonl and shows the run's progress.

    A row has the step (updates done), the epoch, and scalars; no times, so that a run
    that was resumed leaves the same file as one that was not.
    """

    def __init__(self, workdir: Path | None, rows: list[dict], step: int, plan: Plan):
        """Starts, or resumes after `step`: later rows are dropped.

        Args:
          workdir: the run's directory; None: writes, prints and shows nothing.
          rows: what `read_rows` found there.
          step: updates done.
          plan: the run's.
        """
        self._plan, self._workdir = plan, workdir
        self._rows = [row for row in rows if row["step"] <= step]
        self._events = None
        self.write()
        if workdir:
            with self._errors_as_write_error():
                (workdir / "tensorboard").mkdir(exist_ok=True)
            self._board = _tensorboard()
            # Without SummaryWriter's thread, so that write errors are raised.
            writer = self._board.event_file_writer.EventsWriter
            self._events = writer(str(workdir / "tensorboard" / "events"))
            events = self._board.proto.event_pb2
            start = events.SessionLog(status=events.SessionLog.START)
            # It hides the events of later steps.
            self._write_event(events.Event(step=step + 1, session_log=start))
        self._first_step = step
        self._start = self._told = time.perf_counter()
        self._bar = tqdm(
            total=plan.total_steps * plan.batch_size,
            initial=step * plan.batch_size,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (workdir and sys.stderr.isatty()),
        )

    def train_row(self, step: int, means: dict[str, float], rate: float) -> None:
        """Records a call's mean training metrics and its last learning rate.

        Moves the progress bar or, if there is none, prints a line if there has been
        none for a minute.
        """
        scalars = {f"train_{name}": mean for name, mean in means.items()}
        self._record(step, scalars | {"learning_rate": rate})
        epoch = f"epoch {step / self._plan.steps_per_epoch:.1f}"
        told = f"loss {means['loss']:.3f}, accuracy {means['accuracy']:.1%}"
        self._bar.set_postfix_str(f"{epoch}, {told}", refresh=False)
        self._bar.update(step * self._plan.batch_size - self._bar.n)
        if self._bar.disable and time.perf_counter() - self._told > _TELL_SECONDS:
            self.print_line(f"{epoch}, {self._place(step)}, {told}{self._left(step)}")
        self._write_when_due()

    def epoch_row(self, step: int, epoch: int, metrics: dict) -> None:
        """Records an evaluation (metrics may be empty), and prints the epoch's line."""
        endings = ("_loss", "_accuracy")
        scalars = {
            name: value
            for name, value in metrics.items()
            if name.endswith(endings) and np.ndim(value) == 0
        }
        if scalars:
            self._rows = [row for row in self._rows if not _evaluates(row, step)]
            self._record(step, scalars)
        self._write_when_due()
        parts = [f"epoch {epoch}", self._place(step)]
        for told, name, form in (
            ("train loss", "train_loss", ".4f"),
            ("accuracy", "train_accuracy", ".2%"),
        ):
            if (mean := self._epoch_mean(name, epoch)) is not None:
                parts.append(f"{told} {mean:{form}}")
        for name in ("validation", "test"):
            if f"{name}_accuracy" in metrics:
                parts.append(f"{name} accuracy {metrics[f'{name}_accuracy']:.2%}")
        self.print_line(", ".join(parts) + self._left(step))

    def _place(self, step: int) -> str:
        return f"step {step:,} of {self._plan.total_steps:,}"

    def _left(self, step: int) -> str:
        """The time left at the pace so far; '' before the first step."""
        if not (done := step - self._first_step):
            return ""
        elapsed = time.perf_counter() - self._start
        left = elapsed / done * (self._plan.total_steps - step)
        return f", {tqdm.format_interval(left)} left"

    def print_line(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._workdir is None:
            return
        with tqdm.external_write_mode():
            print(line, flush=True)
        self._told = time.perf_counter()

    def evaluated(self, step: int) -> bool:
        """Whether there is an evaluation of this step already."""
        return any(_evaluates(row, step) for row in self._rows)

    @property
    def best_step(self) -> int | None:
        """The first step with the best validation accuracy; None: no such split."""
        return best_step(self._rows)

    def write(self) -> None:
        """Writes metrics.jsonl in full, and the events that TensorBoard still lacks."""
        if self._workdir:
            path = self._workdir / "metrics.jsonl"
            files.write(path, "".join(json.dumps(row) + "\n" for row in self._rows))
            if self._events:
                with self._errors_as_write_error():
                    self._events.flush()
            bucket.send(self._workdir, when_due=True)
        self._written = time.perf_counter()

    def _write_when_due(self) -> None:
        """On a GPU, an epoch may take less time than writing to the file system."""
        if time.perf_counter() - self._written > _WRITE_SECONDS:
            self.write()

    def _record(self, step: int, scalars: dict) -> None:
        row = {"step": step, "epoch": step / self._plan.steps_per_epoch, **scalars}
        row = {name: _json_number(value) for name, value in row.items()}
        self._rows.append(row)
        if self._workdir is None:
            return
        for name in scalars:
            if row[name] is not None:
                summary = self._board.summary.scalar(name, row[name])
                event = self._board.proto.event_pb2.Event(step=step, summary=summary)
                event.wall_time = time.time()
                self._write_event(event)

    def _write_event(self, event) -> None:
        with self._errors_as_write_error():
            self._events.write_event(event)

    @contextlib.contextmanager
    def _errors_as_write_error(self) -> Iterator[None]:
        """Turns errors in writing TensorBoard's events into WriteError."""
        try:
            yield
        except OSError as error:
            raise files.WriteError(
                f"{self._workdir / 'tensorboard'} cannot be written "
                f"({error.strerror}): {files.RESUME}"
            ) from None

    def _epoch_mean(self, name: str, epoch: int) -> float | None:
        """The mean over the epoch's steps, from the rows of its calls.

        If metrics.jsonl was deleted, over the rows there are; None without any.
        """
        before = self._plan.epoch_end(epoch - 1)
        rows = [row for row in self._rows if name in row and row["step"] > before]
        if rows and rows[0]["step"] > self._first_step:
            before = max(before, self._first_step)
        total, start = 0.0, before
        for row in rows:
            total += row[name] * (row["step"] - start)
            start = row["step"]
        return total / (start - before) if start > before else None

    def close(self) -> None:
        self._bar.close()
        self.write()
        if self._workdir:
            self._events.close()


def read_rows(workdir: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that was cut off is left out.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        lines = path.read_text().splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        if not all(isinstance(row, dict) and _has_step(row) for row in rows):
            raise ValueError("a line without a step")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): restore or delete it") from None
    return rows


def _has_step(row: dict) -> bool:
    return isinstance(row.get("step"), int)


def best_step(rows: list[dict]) -> int | None:
    """The first step with the best validation accuracy; None: it was not measured."""
    rows = [row for row in rows if "validation_accuracy" in row]
    best = max(rows, key=lambda row: row["validation_accuracy"], default=None)
    return best and best["step"]


def _evaluates(row: dict, step: int) -> bool:
    names = ("validation_accuracy", "test_accuracy")
    return row["step"] == step and any(name in row for name in names)


def _json_number(value):
    """Seven digits, as many as float32 has; JSON knows no NaN or infinity."""
    if isinstance(value, int):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
