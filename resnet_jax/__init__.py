"""ResNet versions 1 and 2 of any depth, for small images, in JAX and Flax."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """An error that the user can fix, explained in one sentence.

    The sentence names the field (or file), the value and the fix. Commands print it
    without a traceback and exit with `exit_status`.
    """

    exit_status = 2
    label = "error"  # what the printed line begins with


def one_line(error: Exception, length: int = 200) -> str:
    """An error's message on one line, for use within a sentence."""
    return " ".join(str(error).split())[:length]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that suggests the closest known name, to begin a fix; '': none is."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def expanded(place: str | Path, name: str) -> Path:
    """A path with `~` expanded. Raises UserError if `~USER` names no user.

    `name` is the flag or field that the path comes from.
    """
    try:
        return Path(place).expanduser()
    except RuntimeError:
        raise UserError(
            f"{name}={place}: there is no such user: give another path"
        ) from None


def as_text(name: str) -> str:
    """A file's name for pages and figures, which can only show UTF-8."""
    return os.fsencode(name).decode(errors="replace")
