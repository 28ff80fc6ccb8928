"""Checkpoints with Orbax: the newest ones and the best; damaged ones are skipped."""

import contextlib
import json
import logging
import shutil
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from resnet_jax import UserError, bucket, one_line, workdir

# Orbax logs tracebacks of what WriteError and the line on damage report.
logging.getLogger("absl").setLevel(logging.CRITICAL)

# Of several processes only the first saves, and it waits for no other.
_ALONE = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="first"
)

FORMAT = 1  # of a checkpoint's content; a newer format is not read


class Checkpoints:
    """The checkpoints of a run: for each step, named trees of arrays and a JSON record.

    The trees hold NumPy arrays under the unrolled names of the blocks, whatever devices
    and loops computed them: 'variables' has what the network needs, 'optimizer' what
    else is needed to continue training. Beside them, manifest.json has the size and
    CRC-32 of every file, so that damage is found before anything is read.

    Attributes:
      best_step: a step that is kept besides the newest ones; None: no such step.
      saved_step: the newest that is complete; None: none yet.
    """

    def __init__(self, directory: Path, keep: int | None):
        """Opens a directory, in which the newest `keep` are kept; None: read-only."""
        self._directory, self._keep = directory.absolute(), keep
        self.best_step: int | None = None
        self._failed, self._written = False, None
        reads, alone = keep is None, {"multiprocessing_options": _ALONE}
        self.saved_step: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if reads else self,
            read_only=reads,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._done),
            multiprocessing_options=_ALONE,
            create=False,
        )
        with self._errors_as_write_error():
            if not reads:
                self._directory.mkdir(exist_ok=True)
                self._remove_unfinished()
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=options,
                item_handlers={
                    "variables": ocp.StandardCheckpointHandler(**alone),
                    "optimizer": ocp.StandardCheckpointHandler(**alone),
                    "record": ocp.JsonCheckpointHandler(**alone),
                },
            )
        self.saved_step = self._manager.latest_step()

    def _remove_unfinished(self) -> None:
        """Removes what an interrupted save left behind.

        Orbax would do so too, but fails if threads of an earlier, failed save of this
        same process are still writing there.
        """
        for path in self._directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        """Tells Orbax which checkpoints to keep."""
        newest = len(checkpoints) - self._keep
        return [
            number >= newest or checkpoint.step == self.best_step
            for number, checkpoint in enumerate(checkpoints)
        ]

    def newest(self) -> tuple[int, dict] | None:
        """The step and the record of the newest undamaged checkpoint, if any.

        Damaged ones are reported, and moved aside as damaged-STEP unless read-only.

        Raises:
          UserError: all are damaged, or it is of a newer format.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            problem = _damage(self._directory / str(step))
            if problem is None:
                break
            damaged[step] = problem
        else:
            if not damaged:
                return None
            raise UserError(
                f"{self._directory}: every checkpoint is damaged "
                f"({next(iter(damaged.values()))}): restore one, or start again in "
                "another --workdir"
            )
        record = self.record(step)
        for number, problem in damaged.items():
            print(
                f"damaged   checkpoint of step {number:,} ({problem}): going back to "
                f"step {step:,}",
                file=sys.stderr,
            )
            if self._keep is not None:
                path = self._directory / str(number)
                ends = ("", *(f"-{copy}" for copy in range(2, 100)))
                aside = [f"damaged-{number}{end}" for end in ends]
                free = next(n for n in aside if not path.with_name(n).exists())
                path.rename(path.with_name(free))
        if damaged:
            self._manager.reload()
        self.saved_step = step
        return step, record

    def steps(self) -> list[int]:
        """Steps that have checkpoints, damaged or not."""
        return self._manager.all_steps()

    def require_intact(self, step: int) -> None:
        """Raises UserError if a checkpoint is missing, damaged, or too new."""
        if problem := _damage(self._directory / str(step)):
            raise UserError(
                f"{self._directory / str(step)} is damaged ({problem}): restore it, or "
                "use another checkpoint"
            )
        self.record(step)

    def record(self, step: int) -> dict:
        """The record of a checkpoint. Raises UserError if its format is newer."""
        record = read_record(self._directory / str(step))
        if record["format"] > FORMAT:
            raise UserError(
                f"{self._directory / str(step)} has format {record['format']}, but "
                f"this version reads only up to {FORMAT}: use the version that wrote "
                f"it, {record['provenance']['git_commit'] or 'a newer one'}"
            )
        return record

    def save(
        self, step: int, trees: dict[str, Any], record: dict
    ) -> tuple[int, int, float] | None:
        """Saves in the background; the arrays must stay unchanged meanwhile.

        Waits for the previous one, and returns what `wait` returns for it.

        Raises:
          WriteError: this one or the previous one could not be written.
        """
        items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
        items["record"] = ocp.args.JsonSave({"format": FORMAT, **record})
        ended = self.wait()
        with self._errors_as_write_error():
            self._saving = step, time.perf_counter()
            self._manager.save(step, args=ocp.args.Composite(**items))
        return ended

    def _done(self) -> None:
        """Called in the background, before a checkpoint gets its final name."""
        step, start = self._saving
        (path,) = self._directory.glob(f"{step}.orbax-checkpoint-tmp*")
        files = _files(path)
        workdir.write_json(path / "manifest.json", files)
        size = sum(size for size, _ in files.values())
        self._written = step, size, time.perf_counter() - start

    def _take_finished(self) -> tuple[int, int, float] | None:
        written = self._written
        if not written or not (self._directory / str(written[0])).exists():
            return None
        bucket.send(self._directory.parent)
        self._written, self.saved_step = None, written[0]
        return written

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Returns the trees named in `like`, in its structure.

        Raises:
          UserError: they cannot be read, or have other names or shapes.
        """
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise UserError(
                f"{self._directory / str(step)} cannot be read "
                f"({one_line(error)}): restore it, or move it away "
                "to resume from the one before"
            ) from None
        restored = {name: restored[name] for name in like}
        expected = jax.tree.leaves_with_path(like)
        for (path, array), found in zip(
            expected, jax.tree.leaves(restored), strict=True
        ):
            if found.shape != array.shape:
                raise UserError(
                    f"{self._directory / str(step)} does not match this config: "
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')} has "
                    f"shape {found.shape} instead of {array.shape}: restore "
                    "config.json, or delete it (a checkpoint has its own copy)"
                )
        return jax.tree.map(np.asarray, restored)

    def poll(self) -> tuple[int, int, float] | None:
        """Step, bytes and seconds of a save that ended since the last call.

        Raises:
          WriteError: it failed.
        """
        with self._errors_as_write_error():
            self._manager.check_for_errors()
        return self._take_finished()

    def wait(self) -> tuple[int, int, float] | None:
        """Waits until everything is saved, and returns what `poll` does."""
        with self._errors_as_write_error():
            self._manager.wait_until_finished()
        return self._take_finished()

    @contextlib.contextmanager
    def _errors_as_write_error(self) -> Iterator[None]:
        """Turns whatever Orbax, TensorStore or the system raises into WriteError."""
        try:
            yield
        except Exception as error:
            self._failed = True
            step = self.saved_step
            stays = "none has been saved yet"
            if step is not None:
                stays = f"that of step {step:,} is kept"
            raise workdir.WriteError(
                f"a checkpoint cannot be written to {self._directory} "
                f"({_cause(error)}; {stays}): fix that, then run the same command to "
                "resume"
            ) from None

    def close(self) -> None:
        """Waits until everything is saved, unless saving failed."""
        try:
            self._manager.close()
        except Exception:
            if not self._failed:
                raise


def _cause(error: Exception) -> str:
    for told in ("No space left on device", "File too large", "Read-only file system"):
        if told in str(error):
            return told
    return one_line(error)


def read_record(checkpoint: Path) -> dict:
    """The record of the checkpoint in a directory, as it was saved."""
    return json.loads((checkpoint / "record" / "metadata").read_text())


def _files(checkpoint: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file, by its name below the checkpoint."""
    return {
        str(path.relative_to(checkpoint)): [
            len(content := path.read_bytes()),
            zlib.crc32(content),
        ]
        for path in sorted(checkpoint.glob("*/**/*"))
        if path.is_file() and path.name != "commit_success.txt"
    }


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: nothing."""
    try:
        read_record(checkpoint)
        expected = json.loads((checkpoint / "manifest.json").read_text())
        listed = [(name, *about) for name, about in expected.items()]
        found = _files(checkpoint)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    for name, size, checksum in listed:
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]:,} bytes instead of {size:,}"
        if found[name][1] != checksum:
            return f"{name} has changed"
    return None
