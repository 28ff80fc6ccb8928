"""Run directories: default location, locking, and atomic writing of files."""

import contextlib
import difflib
import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ml_collections import ConfigDict

from configs import common
from resnet_jax import UserError
from resnet_jax.config import flat

# What may differ when a run is resumed: it changes no update that was made.
_MAY_CHANGE = (
    "seeds",
    "epochs",
    "steps",
    "steps_per_call",
    "eval_every",
    "parallel",
    "profile",
    "model.scan",
    "model.remat",
    "dataset.data_dir",
    "dataset.path",
    "dataset.stream",
    "dataset.mirror",
    "checkpoint.every",
    "checkpoint.every_minutes",
    "checkpoint.keep",
)


class WriteError(UserError):
    """A file of a run could not be written; what was saved before stays."""

    exit_status = 1


def default(config_flag: str, config: ConfigDict) -> Path:
    """`runs/CONFIG[-RECIPE][-DATASET]/seed<seed>`, from the value of `--config`."""
    file, _, recipe = config_flag.partition(":")
    parts = [Path(file).stem]
    if recipe:
        parts.append(recipe)
    if config.dataset.name not in ("cifar10", *parts):
        parts.append(config.dataset.name)
    name = re.sub(r"[/:]", "-", "-".join(parts))  # of data sets such as 'svhn/full'
    return Path("runs", name, f"seed{config.seed}")


def check(workdir: Path, config: ConfigDict) -> list[str]:
    """Checks that a run with this config may use a directory, and changes nothing.

    Returns:
      Sentences about the fields that differ from the run's so far, as they may.

    Raises:
      UserError: it is a file or cannot be written, or holds another config's run.
    """
    parent = workdir
    try:
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be used ({error.strerror}): give another "
            "directory"
        ) from None
    if not parent.is_dir():
        raise UserError(f"--workdir={workdir}: {parent} is a file: give a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--workdir={workdir}: {parent} is not writable: give another directory"
        )
    checkpoints = workdir / "checkpoints"
    if checkpoints.exists() and not checkpoints.is_dir():
        raise UserError(f"{checkpoints} is a file: move it, or give another --workdir")
    saved = _saved(workdir)
    if not saved and (workdir / "summary.json").exists():
        raise UserError(
            f"--workdir={workdir} holds the results of a run whose checkpoints are "
            "gone: give another --workdir"
        )
    if not saved:  # nothing to lose
        if not is_run(workdir) and not _left_by_a_start(workdir):
            runs = ", ".join(map(str, runs_in(workdir)[:3]))
            also = f", or, to resume a run, its own ({runs})" if runs else ""
            raise UserError(
                f"--workdir={workdir} is neither empty nor a run: give a new or empty "
                f"directory{also}"
            )
        return []
    changed = _changed(flat(read_config(workdir)), flat(config))
    if refused := [told for field, told in changed.items() if field not in _MAY_CHANGE]:
        raise UserError(
            f"--workdir={workdir} holds a run with another config "
            f"({'; '.join(refused)}): give another --workdir, or the same config to "
            "resume that run"
        )
    return list(changed.values())


def _saved(workdir: Path) -> list[Path]:
    """A run's checkpoints, without those whose saving was cut off."""
    paths = (workdir / "checkpoints").glob("*")
    return [path for path in paths if path.name.isdigit()]


def _left_by_a_start(workdir: Path) -> bool:
    """Whether a directory holds no more than what a run killed at its start leaves."""
    if not workdir.exists():
        return True
    names = {path.name for path in workdir.iterdir()} - {".lock", ".config.json.part"}
    checkpoints = (workdir / "checkpoints").glob("*")
    return names <= {"checkpoints"} and not any(
        "orbax-checkpoint-tmp" not in path.name for path in checkpoints
    )


@contextlib.contextmanager
def claim(workdir: Path) -> Iterator[None]:
    """Makes a directory and locks other processes out; leaves no empty one behind.

    The lock is the system's, and ends with the process that holds it.

    Raises:
      UserError: it cannot be made, or another process trains there.
    """
    missing = [path for path in (workdir, *workdir.parents) if not path.exists()]
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be created ({error.strerror}): give another "
            "directory"
        ) from None
    with file:
        with contextlib.suppress(OSError):  # a full disk is reported later
            os.ftruncate(file.fileno(), 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            os.write(file.fileno(), holder.encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # it may no longer be writable
                path.unlink()
            for empty in (workdir / "checkpoints", *missing):
                with contextlib.suppress(OSError):
                    empty.rmdir()


def _locked(path: Path) -> TextIO:
    """Opens a file that this process alone has locked."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return file  # the file system has no locks: do without
            file.seek(0)
            holder = file.read() or "a process"
            file.close()
            raise UserError(
                f"--workdir={path.parent} is in use by {holder}: wait for it, or give "
                "another --workdir"
            ) from None
        # The process that held it may have removed it since it was opened.
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


def is_run(workdir: Path) -> bool:
    return (workdir / "config.json").is_file()


def runs_in(directory: Path) -> list[Path]:
    """The runs in a directory, such as seed0."""
    return sorted(path for path in directory.glob("*") if is_run(path))


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a directory; each of its checkpoints has it, too.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    if not is_run(workdir):
        newest_first = sorted(_saved(workdir), key=lambda path: -int(path.name))
        for saved in newest_first:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                record = json.loads((saved / "record" / "metadata").read_text())
                return common.completed(record["config"])
        near = ""
        if workdir.parent.is_dir():
            names = [path.name for path in workdir.parent.iterdir() if is_run(path)]
            close = difflib.get_close_matches(workdir.name, names, n=1)
            if found := runs_in(workdir) or [workdir.parent / name for name in close]:
                near = f", such as {found[0]}"
        raise UserError(
            f"--workdir={workdir} holds no run: give the directory of one{near}"
        )
    return common.completed(_read_json(workdir / "config.json"))


def read_summary(workdir: Path) -> dict | None:
    """The summary of the run in a directory; None where it has not ended.

    Raises:
      UserError: it is damaged.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    summary = _read_json(path)
    needed = ("steps", "epochs", "test_accuracy", "test_loss", "test_examples")
    if missing := [name for name in needed if name not in summary]:
        raise UserError(f"{path} is damaged (no {missing[0]}): restore or delete it")
    return summary


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): restore or delete it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (not a JSON object): restore or delete it")
    return content


def differences(before: dict, now: dict) -> list[str]:
    """Sentences about the fields in which two nested records differ."""
    return list(_changed(flat(ConfigDict(before)), flat(ConfigDict(now))).values())


def _changed(before: dict, now: dict) -> dict[str, str]:
    return {
        field: f"{field} {before.get(field)!r} -> {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }


RESUME = "fix that, then run the same command to resume from the newest checkpoint"


def write(path: Path, content: str | bytes, fix: str = RESUME) -> None:
    """Writes a file atomically: a reader sees the old content or the new, never a part.

    Raises:
      WriteError: it cannot be written; the old content stays. It ends with `fix`.
    """
    temporary = path.with_name(f".{path.name}.part")
    content = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise WriteError(
            f"{path} cannot be written ({error.strerror or error}): {fix}"
        ) from None


def make(out: Path) -> None:
    """Makes the directory that `--out` names. Raises UserError if it cannot."""
    if re.match(r"[a-z0-9]+:/", str(out)):
        raise UserError(f"--out={out}: give a directory on this machine")
    if str(out).startswith("~"):
        raise UserError(
            f"--out={out}: write $HOME for ~, which the shell did not expand"
        )
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: give a directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out={out} cannot be created ({error.strerror}): give another directory"
        ) from None


def as_json(config: ConfigDict) -> dict:
    """A config as JSON holds it: nested dictionaries, tuples as lists."""
    return json.loads(config.to_json())


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file atomically."""
    write(path, json.dumps(content, indent=2) + "\n")
