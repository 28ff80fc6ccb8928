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
    return {
        name: np.load(
            directory / f"{name}.npy", mmap_mode="r" if name == "images" else None
        )
        for name in np.load(directory / f"{_NAMES}.npy").tolist()
    }
