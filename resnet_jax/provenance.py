"""What computes a result: package versions, and the commit of this code."""

import hashlib
import inspect
import platform
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions_and_commit() -> dict:
    """The versions of the packages and the commit of this code."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_commit": _git_commit()}


def source_of(function: Callable) -> str | None:
    """The name of the file that a function is in, and the start of its SHA-256.

    None where it is in no file, as in a notebook.
    """
    while hasattr(function, "func"):  # of functools.partial
        function = function.func
    try:
        path = Path(inspect.getsourcefile(function))
        return f"{path.name} {_digest(path.read_bytes())}"
    except (TypeError, OSError):
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _git_commit() -> str | None:
    """The commit of the code, with '-dirty-DIGEST' if Python files differ from it.

    DIGEST is the start of the SHA-256 of the diff and of this package's new files.
    """
    package = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=package,
            capture_output=True,
            text=True,
            errors="replace",
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.resolve().parent:
            return None  # the code is installed inside another repository
        changes = git("diff", "HEAD", "--", ":/*.py").encode()
        new = git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py")
        for name in filter(None, new.split("\0")):
            changes += (package / name).read_bytes()
        dirty = f"-dirty-{_digest(changes)}" if changes else ""
        return git("rev-parse", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return None
