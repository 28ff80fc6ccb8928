"""Lists folders of pictures, by file name; skips hidden files and system litter."""

import os
from pathlib import Path

from resnet_jax import UserError
from resnet_jax.data.picture import SUFFIXES

_LITTER = ("thumbs.db", "desktop.ini", "__macosx")  # of operating systems


def pictures(folder: Path) -> tuple[list[str], list[str]]:
    """The pictures in and below a folder, and what else is there.

    Links to folders are not followed, and so belong to the rest.
    """
    found, rest = [], []
    for place, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = _visible(folders)
        links = [name for name in folders if Path(place, name).is_symlink()]
        files = _visible(files)
        found += [str(Path(place, name)) for name in files if _is_picture(name)]
        others = [name for name in files if not _is_picture(name)]
        rest += [str(Path(place, name)) for name in others + links]
    return found, rest


def classes(folder: Path, ignored: list[str]) -> dict[str, list[str]]:
    """The pictures in and below each class's folder; adds the rest to `ignored`."""
    names, files = _entries(folder)
    by_class = {}
    for name in names:
        by_class[name], rest = pictures(folder / name)
        ignored += rest
    ignored += [str(folder / name) for name in files]
    return by_class


def folders(folder: Path) -> list[str]:
    """The names of the folders inside a folder; [] if it is not one."""
    return _entries(folder)[0] if folder.is_dir() else []


def has_loose_pictures(folder: Path) -> bool:
    """Whether there are pictures directly in a folder."""
    return any(map(_is_picture, _entries(folder)[1]))


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files inside a folder."""
    _, folders, files = next(os.walk(folder, onerror=_refuse))
    return _visible(folders), _visible(files)


def _visible(names: list[str]) -> list[str]:
    return sorted(n for n in names if n[0] != "." and n.lower() not in _LITTER)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename} cannot be read ({error.strerror}): fix that, or remove it"
    )
