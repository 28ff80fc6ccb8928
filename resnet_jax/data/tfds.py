"""TFDS sets, read from their prepared array_record files without TensorFlow.

TFDS is imported inside the functions that need it, because `digits` and `fake` do not.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from resnet_jax import UserError, did_you_mean, expanded
from resnet_jax.data import prepare
from resnet_jax.data.cache import cached
from resnet_jax.data.examples import Examples, builder, damaged
from resnet_jax.data.source import KNOWN, Source

_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def source(name: str, data_dir: str, mirror: str, size: int) -> Source:
    """Opens a TFDS image-classification set, and prepares it first if need be.

    Args:
      name: TFDS's name for it: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.
      data_dir: as in `data_directory`.
      mirror: as in `prepare.prepare`.
      size: pixels a side of the images that are read; 0: as stored.

    Raises:
      UserError: there is no such set, it is damaged or not for image classification,
        or it cannot be read or prepared without TensorFlow.
    """
    directory = locate(name, data_dir)
    if not directory:
        directory = prepare.prepare(name, data_directory(data_dir), mirror)
    key = _key(directory)
    about = cached(f"{key} about", lambda: _about(name, directory))
    return Source(
        name=name,
        class_names=tuple(about["class_names"].tolist()),
        sizes=dict(zip(about["splits"].tolist(), about["sizes"].tolist(), strict=True)),
        examples=Examples(directory, int(about["channels"]), size),
        key=key,
    )


def _key(directory: Path) -> str:
    digest = hashlib.sha256(str(directory.resolve()).encode())
    for path in sorted(directory.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _about(name: str, directory: Path) -> dict[str, np.ndarray]:
    """The 'class_names', 'channels', 'splits' and 'sizes' of a set that can be read.

    'channels' is 0 if the set does not say.

    Raises:
      UserError: as for `source`.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder(directory).info
    features, splits = dict(info.features.items()), info.splits
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and image.np_dtype == np.uint8
        and isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(
            f"config.dataset.name={name} has no 8-bit 'image' with one class as "
            f"'label' (it has {', '.join(sorted(features))}): choose an "
            "image-classification set"
        )
    for split in splits.values():
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
            stored = ArrayRecordReader(str(path)).num_records()
            if stored != length:
                raise damaged(
                    directory, f"{path.name} holds {stored} examples, not {length}"
                )
    return {
        "channels": np.array(image.shape[-1] or 0),
        "class_names": np.array(label.names, np.str_),
        "splits": np.array([split.name for split in splits.values()], np.str_),
        "sizes": np.array([split.num_examples for split in splits.values()], np.int64),
    }


def data_directory(data_dir: str) -> Path:
    """The directory of prepared sets: as given, $TFDS_DATA_DIR or TFDS's default.

    Raises:
      UserError: it is given but missing.
    """
    directory, origin = data_dir, "config.dataset.data_dir"
    if not directory:
        directory, origin = os.environ.get("TFDS_DATA_DIR", ""), "TFDS_DATA_DIR"
    if not directory:
        return Path("~/tensorflow_datasets").expanduser()
    path = expanded(directory, origin)
    if not path.is_dir():
        raise UserError(
            f"{origin}={directory} is not a directory on this machine: create it "
            "(mkdir -p), or leave it out to use ~/tensorflow_datasets"
        )
    return path


def locate(name: str, data_dir: str) -> Path | None:
    """Where a prepared set is; None if it is not prepared but `prepare` can do so.

    Args:
      name: as in `source`.
      data_dir: as in `data_directory`.

    Raises:
      UserError: there is no such set, what is there cannot be read, or nothing is there
        and preparing it needs TensorFlow.
    """
    root = data_directory(data_dir)
    match = _NAME.fullmatch(name)
    if match:
        base, config, version = match.groups()
        folder = root / base / (config or "")
        versions = _versions(folder)
        if version:
            versions = [path for path in versions if path.name == version]
        if versions:
            _check_readable(versions[-1], base)
            return versions[-1]
        configs = [
            f"{base}/{path.name}" for path in folder.glob("*") if _versions(path)
        ]
        if configs:
            raise UserError(
                f"config.dataset.name={name} has several variants: choose one of "
                f"{', '.join(sorted(configs))}"
            )
    if name in prepare.NAMES:
        return None
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if match and base in known:
        raise UserError(
            f"config.dataset.name={name} is not prepared in {root}, and preparing it "
            f"needs TensorFlow: {_elsewhere(base)}"
        )
    *others, last = KNOWN
    raise UserError(
        f"config.dataset.name={name} is neither known nor prepared in {root}: "
        f"{did_you_mean(name, [*KNOWN, *known])}available without TensorFlow are "
        f"{', '.join(others)} and {last}"
    )


def _versions(folder: Path) -> list[Path]:
    """The directories of prepared versions, the newest last."""
    paths = [path for path in folder.glob("*") if _VERSION.fullmatch(path.name)]
    return sorted(paths, key=lambda path: [int(n) for n in path.name.split(".")])


def _check_readable(directory: Path, base: str) -> None:
    """Checks that the set is complete, and in a format that we can read."""
    for file in ("dataset_info.json", "features.json"):
        if not (directory / file).is_file():
            raise damaged(directory, f"there is no {file}")
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
        if not isinstance(info, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise damaged(directory, f"dataset_info.json: {error}") from None
    # TFDS did not record the format when there was only this one.
    formats = [info.get("fileFormat", "tfrecord")]
    formats += info.get("alternativeFileFormats", [])
    if "array_record" not in formats:
        raise UserError(
            f"{directory} is in {formats[0]} format, which cannot be read without "
            f"TensorFlow: {_elsewhere(base)}"
        )


def _elsewhere(base: str) -> str:
    return (
        f"run `tfds build {base} --file_format=array_record --data_dir=DIR` once where "
        "TensorFlow is installed, and give --config.dataset.data_dir=DIR"
    )
