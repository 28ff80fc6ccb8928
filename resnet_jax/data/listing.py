"""Lists folders of pictures, by the files' names; no hidden files, no litter."""

import os
from collections.abc import Iterator
from pathlib import Path

from resnet_jax import UserError
from resnet_jax.data.picture import SUFFIXES

_LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # of operating systems


def pictures(folder: Path) -> list[str]:
    """The pictures in and below a folder, in order."""
    return list(_below(str(folder), (_identity(folder.stat()),), []))


def classes(folder: Path, ignored: list[str]) -> dict[str, list[str]]:
    """The pictures in and below each class's folder; adds other files to `ignored`."""
    by_class = {}
    for entry in _entries(folder):
        if _is_folder(entry):
            parents = (_identity(folder.stat()), _identity(entry.stat()))
            by_class[entry.name] = list(_below(entry.path, parents, ignored))
        else:
            ignored.append(entry.path)
    return by_class


def folders(folder: Path) -> list[str]:
    """The names of the folders inside a folder; [] where it is not one."""
    if not folder.is_dir():
        return []
    return [entry.name for entry in _entries(folder) if _is_folder(entry)]


def has_loose_pictures(folder: Path) -> bool:
    """Whether pictures lie in a folder itself."""
    return any(_is_picture(entry.name) for entry in _entries(folder))


def _below(folder: str, parents: tuple, ignored: list[str]) -> Iterator[str]:
    for entry in _entries(folder):
        if _is_folder(entry):
            identity = _identity(entry.stat())
            if identity in parents:
                ignored.append(entry.path)  # a link to a folder that it lies in
            else:
                yield from _below(entry.path, (*parents, identity), ignored)
        elif _is_picture(entry.name):
            yield entry.path
        else:
            ignored.append(entry.path)


def _identity(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nobody may look
        return False


def _entries(folder: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            visible = [
                entry
                for entry in entries
                if entry.name[0] != "." and entry.name.lower() not in _LITTER
            ]
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): fix that, or remove it"
        ) from None
    return sorted(visible, key=lambda entry: entry.name)
