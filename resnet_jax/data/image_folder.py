"""A folder of pictures: DIR/train/CLASS/*, and val/ or test/ like it, or DIR/CLASS/*.

Where there is no val/ and no test/, a fifth of each class's pictures is the test set,
chosen by `split_seed` and the files' names. A split lists its pictures shuffled, with
the classes evenly mixed: any slice, such as `train[:90%]`, has a fair share
of each.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_jax import UserError, as_text, expanded
from resnet_jax.data import listing, picture
from resnet_jax.data.source import Source

TEST_FRACTION = 0.2
_SPLITS = {"val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPELLINGS = (*_SPLITS, "train", "training", "testing")
_PROBE = 16  # pictures that show how long the others take
_SEEN = 16  # pictures whose content tells one folder from another
_CHUNK = 1024  # pictures that the threads read ahead


class _File(NamedTuple):
    path: str
    label: int


def check(path: str) -> Path:
    """Checks that a folder is there, and reads nothing in it.

    Raises:
      UserError: it is not.
    """
    if not path:
        raise UserError(
            "config.dataset.path='': give the folder of your pictures, which has a "
            "folder for each class, or train/ and test/ with those in them"
        )
    root = expanded(path, "config.dataset.path")
    if not root.is_dir():
        problem = "is a file" if root.is_file() else "does not exist"
        raise UserError(
            f"config.dataset.path={path} {problem}: give a folder of pictures"
        )
    return root


def source(path: str, size: int, split_seed: int) -> Source:
    """Lists the pictures of a folder, which `Source.examples` then reads in threads.

    Args:
      path: the folder.
      size: pixels a side; see `picture.decode`.
      split_seed: seed of the order, and of the test set where the folder has none.

    Raises:
      UserError: fewer than two classes have pictures, a class is only in the test set,
        splits have names other than those above, or a folder cannot be read.
    """
    root, notes = check(path), []
    folders = {name: root / name for name in _SPLITS if listing.folders(root / name)}
    if not listing.folders(root / "train"):
        _reject_misspelt_splits(path, root)
        folders = {"train": root}
    else:
        folders = {"train": root / "train"} | folders
        if extra := [name for name in listing.folders(root) if name not in folders]:
            notes.append(f"ignored   {_abbreviate(extra)} next to train")
    by_split, ignored = {}, []
    for name, folder in folders.items():
        split = _SPLITS.get(name, name)
        if split in by_split:
            raise UserError(
                f"config.dataset.path={path} has several folders for validation "
                "(val, valid, validation): keep one"
            )
        by_split[split] = listing.classes(folder, ignored)
    if ignored:
        notes.append(f"ignored   no pictures: {_abbreviate(ignored, root)}")
    empty = [name for name, files in by_split["train"].items() if not files]
    if empty:
        notes.append(f"left out  classes without a picture: {_abbreviate(empty)}")
    names = tuple(name for name, files in by_split["train"].items() if files)
    _require_classes(path, folders["train"], names)
    for split, classes in by_split.items():
        unknown = [
            name for name, files in classes.items() if files and name not in names
        ]
        if unknown and split != "train":
            raise UserError(
                f"config.dataset.path={path}: {_abbreviate(unknown)} of {split} has no "
                "pictures to train on: give it some in train, or remove it"
            )
        if absent := [name for name in names if not classes.get(name)]:
            notes.append(f"warning   {split} has no picture of {_abbreviate(absent)}")
    ordered = {
        split: [_shuffled(classes.get(name, []), root, split_seed) for name in names]
        for split, classes in by_split.items()
    }
    if len(ordered) == 1:
        ordered = _hold_out_test(ordered["train"])
        if not any(ordered["test"]):
            raise UserError(
                f"config.dataset.path={path} has one picture of each class, and none "
                "to test on: give more pictures, or train/ and test/ folders"
            )
        notes.append(
            f"split     {TEST_FRACTION:.0%} of each class for testing, by seed "
            f"{split_seed}, since there is no test folder"
        )
        if single := [n for n, t in zip(names, ordered["test"], strict=True) if not t]:
            notes.append(
                f"warning   only one picture, so none to test on: {_abbreviate(single)}"
            )
    elif "test" not in ordered:
        ordered["test"] = ordered.pop("val")
        notes.append(
            "test      is the validation folder, since there is no test folder"
        )
    notes.append(_balance(names, [len(files) for files in ordered["train"]]))
    splits = {split: _interleave_classes(classes) for split, classes in ordered.items()}
    return Source(
        name=f"image_folder ({as_text(root.resolve().name)})",
        class_names=tuple(map(as_text, names)),
        sizes={split: len(files) for split, files in splits.items()},
        examples=lambda split, indices: _read(splits[split], indices, root, size),
        key=_key(splits, root),
        notes=tuple(notes),
    )


def _reject_misspelt_splits(path: str, root: Path) -> None:
    """Checks that no split, such as `Train`, is mistaken for a class."""
    splits = [
        name
        for name in listing.folders(root)
        if name.lower() in _SPELLINGS and listing.folders(root / name)
    ]
    if splits:
        raise UserError(
            f"config.dataset.path={path} has folders of pictures in "
            f"{_abbreviate(splits)}, but none in train: name the splits train, val "
            "and test, and classes differently"
        )


def _require_classes(path: str, folder: Path, names: tuple[str, ...]) -> None:
    if names and all(name.lower() in _SPELLINGS for name in names):
        raise UserError(
            f"config.dataset.path={path} has pictures in {_abbreviate(list(names))}, "
            "but no class folders there: put each class's pictures in a folder named "
            "after it"
        )
    if len(names) > 1:
        return
    if names:
        raise UserError(
            f"config.dataset.path={path} has pictures of only one class, {names[0]}: "
            "give at least two classes"
        )
    loose = listing.has_loose_pictures(folder)
    content = "pictures, but not in folders" if loose else "no pictures"
    raise UserError(
        f"config.dataset.path={path} has {content}: put each class's pictures "
        f"({', '.join(sorted(picture.SUFFIXES))}) in a folder named after it"
    )


def _shuffled(paths: list[str], root: Path, seed: int) -> list[str]:
    """Orders files by their own names alone, so no other file changes the order."""

    def draw(path: str) -> bytes:
        name = os.path.relpath(path, root).replace(os.sep, "/")
        return hashlib.sha256(f"{seed}/{name}".encode(errors="replace")).digest()

    return sorted(paths, key=draw)


def _hold_out_test(classes: list[list[str]]) -> dict[str, list[list[str]]]:
    counts = [
        max(1, round(len(files) * TEST_FRACTION)) if len(files) > 1 else 0
        for files in classes
    ]
    return {
        "train": [f[count:] for f, count in zip(classes, counts, strict=True)],
        "test": [f[:count] for f, count in zip(classes, counts, strict=True)],
    }


def _interleave_classes(classes: list[list[str]]) -> list[_File]:
    placed = [
        ((rank + 0.5) / len(files), label, path)
        for label, files in enumerate(classes)
        for rank, path in enumerate(files)
    ]
    return [_File(path, label) for _, label, path in sorted(placed)]


def _read(
    files: list[_File], indices: Sequence[int], root: Path, size: int
) -> Iterator[tuple[np.ndarray | picture.UnreadableError, int]]:
    def read(index: int):
        path, label = files[index]
        try:
            return picture.decode(path, size), label
        except picture.UnreadableError as error:
            name = os.path.relpath(path, root)
            return picture.UnreadableError(f"{name}: {error}"), label

    first, rest = indices[:_PROBE], indices[_PROBE:]
    start = time.perf_counter()
    read_first = [read(index) for index in first]
    seconds = (time.perf_counter() - start) / max(1, len(first))
    yield from read_first
    if not rest or seconds < picture.QUICK:
        yield from map(read, rest)
        return
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as threads:
        for start in range(0, len(rest), _CHUNK):
            yield from threads.map(read, rest[start : start + _CHUNK])


def _key(splits: dict[str, list[_File]], root: Path) -> str:
    digest = hashlib.sha256()
    everything = [path for files in splits.values() for path, _ in files]
    # Two folders may agree in all names, sizes and times, as of unpacked bitmaps.
    for path in everything[:: max(1, len(everything) // _SEEN)]:
        with contextlib.suppress(OSError):
            digest.update(Path(path).read_bytes())
    for split, files in splits.items():
        for path, label in files:
            try:
                stat = Path(path).stat()
                state = f"{stat.st_size} {stat.st_mtime_ns} {stat.st_mode}"
            except OSError:
                state = "gone"  # a dangling link: reported when it is read
            name = os.path.relpath(path, root)
            digest.update(f"{split} {label} {state} {name}\n".encode(errors="replace"))
    return digest.hexdigest()


def _balance(names: tuple[str, ...], counts: list[int]) -> str:
    least, most = min(counts), max(counts)
    largest, smallest = names[counts.index(most)], names[counts.index(least)]
    if least == most:
        return f"classes   {len(names)}, of {most:,} pictures each in train"
    return (
        f"classes   {len(names)}, of {least:,} ({smallest}) to {most:,} ({largest}) "
        f"pictures in train; always guessing {largest} would be right for "
        f"{most / sum(counts):.0%}"
    )


def _abbreviate(names: list[str], root: Path | None = None) -> str:
    """A few of the names, and how many more there are."""
    shown = [os.path.relpath(name, root) if root else name for name in names[:3]]
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(shown) + more
