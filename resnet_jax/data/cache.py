"""Arrays that took long to make, kept in ~/.cache/resnet_jax/data for the next time."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np


def cached(
    key: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` returns, or what it returned for this key before.

    Args:
      key: Says all that the arrays depend on; '' keeps nothing.
      make: Makes the arrays, by name; 'images' comes back as a map of its file.
    """
    if not key:
        return make()
    directory = Path.home() / ".cache" / "resnet_jax" / "data"
    directory /= hashlib.sha256(key.encode()).hexdigest()[:16]
    try:
        return _load(directory)
    except (OSError, ValueError):  # not there, or damaged
        arrays = make()
    part = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=directory.parent))
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array)
        shutil.rmtree(directory, ignore_errors=True)
        part.rename(directory)
        return _load(directory)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"warning   what was read is not kept in {directory.parent}: {reason}")
        if part:
            shutil.rmtree(part, ignore_errors=True)
        return arrays


def _load(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.iterdir())
    if not files:
        raise ValueError(f"{directory} is empty")
    return {
        file.stem: np.load(file, mmap_mode="r" if file.stem == "images" else None)
        for file in files
    }
