"""What computes a result: versions of the packages, and the commit of this code."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def versions_and_commit() -> dict:
    """What computes here: versions of the packages and of this code."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit of the code, with '-dirty' where Python files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        if (
            Path(git("rev-parse", "--show-toplevel"))
            != Path(__file__).resolve().parents[1]
        ):
            return None  # the code is installed within a repository of another
        changed = git("status", "--porcelain", "--untracked-files=no", ":/*.py")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
