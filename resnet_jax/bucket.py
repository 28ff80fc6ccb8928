"""Run directories in a bucket (`--workdir=gs://BUCKET/DIR`), through fsspec.

A bucket has no append, rename or lock. So a command works in a copy on this machine's
disk, as in any directory, and each file that it changed is sent back whole: in training
every half minute and with each checkpoint, otherwise when the command ends. A
checkpoint is complete once its manifest is there, which is therefore sent last; old
ones are deleted from the bucket. Nothing keeps two processes out of one directory.
"""

import contextlib
import dataclasses
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from resnet_jax import UserError, as_text, expanded, workdir

# It logs tracebacks of errors that our sentences report.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# What a command reads of a run, or of each of several seeds; all else is only written.
_READ = r"(seed\d+/)?((config|inputs|summary)\.json|metrics\.jsonl|checkpoints/\d+/.+)"
_SECONDS = 30  # between two uploads in training, which waits for them
_NOT_SENT = re.compile(r"(.*/)?\.lock|.*\.part|.*orbax-checkpoint-tmp.*")


@dataclasses.dataclass
class _Copy:
    """A directory of a bucket, and its copy on the disk.

    Attributes:
      url: as the user gave it.
      files: the file system that it is in.
      root: the directory's name there.
      directory: the copy.
      sent: size and time of each file of the copy that is in the bucket, by name.
      sent_at: when something was last sent, by the monotonic clock.
    """

    url: str
    files: Any
    root: str
    directory: Path
    sent: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    sent_at: float = -math.inf

    def fetch(self) -> None:
        self.files.invalidate_cache()  # another process may have written since
        found = self.files.find(self.root)
        names = [path.removeprefix(self.root).lstrip("/") for path in found]
        names = [name for name in names if re.fullmatch(_READ, name)]
        if found and not names:
            raise UserError(
                f"--workdir={self.url} is neither empty nor a run: give a new or empty "
                "directory"
            )
        names = _without_cut_off(names)
        for name in names:
            (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        if names:
            self.files.get(*self._pairs(names)[::-1])
        self.sent = self._present()

    def send(self) -> None:
        present = self._present()
        changed = [name for name in present if self.sent.get(name) != present[name]]
        last = [name for name in changed if name.endswith("/manifest.json")]
        for names in ([name for name in changed if name not in last], last):
            if names:
                self.files.put(*self._pairs(names))
        for name in self.sent.keys() - present.keys():
            with contextlib.suppress(FileNotFoundError):
                self.files.rm_file(f"{self.root}/{name}")
        self.sent, self.sent_at = present, time.monotonic()

    def _pairs(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Paths of files in the copy, and in the bucket."""
        here = [str(self.directory / name) for name in names]
        return here, [f"{self.root}/{name}" for name in names]

    def _present(self) -> dict[str, tuple[int, int]]:
        found = {}
        # Unlike Path.rglob, os.walk tolerates Orbax deleting checkpoints meanwhile.
        for folder, _, files in os.walk(self.directory):
            for path in map(Path(folder).joinpath, files):
                name = path.relative_to(self.directory).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if not _NOT_SENT.fullmatch(name):
                        status = path.stat()
                        found[name] = status.st_size, status.st_mtime_ns
        return found


def _without_cut_off(names: list[str]) -> list[str]:
    """Leaves out a run's checkpoints if none was sent whole: the run then starts again.

    If one was, `Checkpoints` skips the others as it does damaged ones.
    """
    runs = {name: name.rpartition("checkpoints/")[0] for name in names}
    saved = {name for name in names if "checkpoints/" in name}
    whole = {runs[name] for name in saved if name.endswith("/manifest.json")}
    for run in sorted({runs[name] for name in saved} - whole):
        print(
            f"damaged   {run}checkpoints: none was uploaded in full; starting over",
            file=sys.stderr,
        )
    return [name for name in names if name not in saved or runs[name] in whole]


_copies: list[_Copy] = []


def local(place: str | Path) -> Path:
    """The local directory to work in for `--workdir`: itself, or a copy.

    Raises:
      UserError: it is in a bucket that cannot be read, or holds other files and no run.
    """
    if not re.match(r"[a-z0-9]+:/", str(place)):
        return expanded(place, "--workdir")
    url = str(place).rstrip("/")
    for copy in _copies:
        if copy.url == url:
            return copy.directory
    if not re.fullmatch(r"[a-z0-9]+://[^/].*", url):
        raise UserError(f"--workdir={place} is not an address: write gs://BUCKET/DIR")
    try:
        files, root = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"--workdir={url} needs a package that is not installed "
            f"({_cause(error)}): for gs://, pip install gcsfs"
        ) from None
    except Exception as error:
        raise _unreadable(url, error) from None
    temporary = Path(tempfile.mkdtemp(prefix="resnet_jax-"))
    copy = _Copy(url, files, root, temporary / Path(root).name)
    copy.directory.mkdir()
    try:
        copy.fetch()
    except Exception as error:
        shutil.rmtree(temporary)
        if isinstance(error, UserError):
            raise
        raise _unreadable(url, error) from None
    _copies.append(copy)
    return copy.directory


def send(directory: Path, when_due: bool = False) -> None:
    """Sends what has changed in a copy; does nothing if the directory is in none.

    With `when_due`, only if nothing was sent for half a minute.

    Raises:
      WriteError: it cannot be sent.
    """
    for copy in _copies:
        due = time.monotonic() - copy.sent_at > _SECONDS
        if directory.is_relative_to(copy.directory) and (due or not when_due):
            try:
                copy.send()
            except Exception as error:
                raise workdir.WriteError(
                    f"{copy.url} cannot be written ({_cause(error)}; the files it "
                    f"lacks are in {copy.directory}): give this machine's account the "
                    "role Storage Object Admin, then run the same command to resume "
                    "from the newest checkpoint there"
                ) from None


def display_path(text: str | Path) -> str:
    """A path, or text with paths, in which copies go by their addresses in buckets."""
    text = as_text(str(text))
    for copy in _copies:
        text = text.replace(str(copy.directory), copy.url)
    return text


@contextlib.contextmanager
def sent_at_end() -> Iterator[None]:
    """Sends what a command leaves in its copies, however it ends, and deletes them.

    Raises:
      WriteError: a copy cannot be sent; it is kept.
    """
    try:
        yield
    except UserError as error:
        error.args = (display_path(str(error)),)
        raise
    finally:
        while _copies:
            try:
                send(_copies[-1].directory)
                shutil.rmtree(_copies[-1].directory.parent)
            finally:
                _copies.pop()


def _unreadable(url: str, error: Exception) -> UserError:
    return UserError(
        f"--workdir={url} cannot be read ({_cause(error)}): check that the bucket "
        "exists and that this machine has access to it, for example by gcloud auth "
        "application-default login"
    )


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
