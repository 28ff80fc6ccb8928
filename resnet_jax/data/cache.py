"""Arrays that took long to make, kept in ~/.cache/resnet_jax/data for the next time."""

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

# Of all that is kept; what was not used for longest goes first.
MOST_BYTES = 10 * 2**30
_NAMES = "names"  # of all arrays: shows if one is missing
_DAMAGED = (OSError, ValueError, EOFError)  # or missing


def cached(
    key: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Returns what `make` returns, or what it returned for this key before.

    Args:
      key: has all that the arrays depend on; '': nothing is kept.
      make: makes the arrays, by name; 'images' comes back memory-mapped.
    """
    if not key:
        return make()
    directory = Path.home() / ".cache" / "resnet_jax" / "data"
    directory /= hashlib.sha256(key.encode()).hexdigest()[:16]
    with contextlib.suppress(*_DAMAGED):
        return _load(directory)
    arrays, part = make(), None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=directory.parent))
        for name, array in (*arrays.items(), (_NAMES, np.array([*arrays], np.str_))):
            with (part / f"{name}.npy").open("wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
        with contextlib.suppress(OSError):  # another process deletes them
            _delete_unused(directory.parent)
        return _load(directory)
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        print(
            f"warning   what was read is not cached in {directory.parent}: {reason}",
            file=sys.stderr,
        )
        return arrays
    finally:
        if part:
            shutil.rmtree(part, ignore_errors=True)  # if it was not renamed


def _load(directory: Path) -> dict[str, np.ndarray]:
    with contextlib.suppress(PermissionError):  # another user's, perhaps
        os.utime(directory)  # so that it counts as used
    return {
        name: np.load(
            directory / f"{name}.npy", mmap_mode="r" if name == "images" else None
        )
        for name in np.load(directory / f"{_NAMES}.npy").tolist()
    }


def _delete_unused(parent: Path) -> None:
    """Deletes what was used least recently, but for the newest, over `MOST_BYTES`.

    Another process may be using it: its memory-mapped files stay until it ends.
    """
    total = 0
    newest, *others = sorted(parent.iterdir(), key=_last_used, reverse=True)
    for directory in (newest, *others):
        total += sum(file.stat().st_size for file in directory.glob("*.npy"))
        if total > MOST_BYTES and directory != newest:
            shutil.rmtree(directory, ignore_errors=True)


def _last_used(directory: Path) -> float:
    return directory.stat().st_mtime
