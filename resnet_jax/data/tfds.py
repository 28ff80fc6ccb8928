"""TFDS sets, read from their prepared array_record files without TensorFlow.

TFDS is imported inside the functions that need it, because `digits` and `fake` do not.
"""

import functools
import hashlib
import io
import json
import os
import re
from pathlib import Path

import numpy as np

from resnet_jax import UserError, did_you_mean
from resnet_jax.data import picture, prepare
from resnet_jax.data.cache import cached
from resnet_jax.data.source import KNOWN, Source

CHUNK = 1000  # examples read at once: one by one takes twice as long
_NAME = re.compile(r"(\w+)(?:/([\w.+-]+))?(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def source(name: str, data_dir: str, mirror: str) -> Source:
    """Opens a TFDS image-classification set, and prepares it first if need be.

    Args:
      name: TFDS's name for it: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.
      data_dir: as in `data_directory`.
      mirror: as in `prepare.prepare`.

    Raises:
      UserError: there is no such set, it is damaged or not for image classification,
        or it cannot be read or prepared without TensorFlow.
    """
    directory = locate(name, data_dir)
    if not directory:
        directory = prepare.prepare(name, data_directory(data_dir), mirror)
    key = _key(directory)
    about = cached(f"{key} about", lambda: _about(name, directory))

    channels = int(about["channels"])

    @functools.cache
    def opened(split):
        import tensorflow_datasets as tfds

        # TFDS would give the indices of a palette, and as many channels as a file has.
        as_stored = {"image": tfds.decode.SkipDecoding()}
        return _builder(directory).as_data_source(split, decoders=as_stored)

    def examples(split, indices):
        data = opened(split)
        for start in range(0, len(indices), CHUNK):
            try:
                chunk = data.__getitems__(indices[start : start + CHUNK])
            except RuntimeError as error:  # array_record found a wrong checksum.
                raise _damaged(directory, str(error)) from None
            for number, example in enumerate(chunk, start=start):
                name = f"{split}[{indices[number]}]"
                yield _decoded(example["image"], channels, name), example["label"]

    return Source(
        name=name,
        class_names=tuple(about["class_names"].tolist()),
        sizes=dict(zip(about["splits"].tolist(), about["sizes"].tolist(), strict=True)),
        examples=examples,
        key=key,
    )


def _decoded(
    content: bytes, channels: int, name: str
) -> np.ndarray | picture.UnreadableError:
    """Pixels as `predict` reads them too: grey where the set is, else RGB."""
    try:
        return picture.decode(io.BytesIO(content), channels=1 if channels == 1 else 3)
    except picture.UnreadableError as error:
        return picture.UnreadableError(f"{name}: {error}")


def _key(directory: Path) -> str:
    digest = hashlib.sha256(str(directory.resolve()).encode())
    for path in sorted(directory.iterdir()):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _builder(directory: Path):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory, file_format="array_record")
    except Exception as error:  # Whatever TFDS's readers of JSON and protobuf raise.
        raise _damaged(directory, f"TFDS cannot read it: {error}") from None


def _about(name: str, directory: Path) -> dict[str, np.ndarray]:
    """The 'class_names', 'splits' and 'sizes' of a set that can be read.

    Raises:
      UserError: as for `source`.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader

    info = _builder(directory).info
    features, splits = dict(info.features.items()), info.splits
    image, label = features.get("image"), features.get("label")
    if not (
        isinstance(image, tfds.features.Image)
        and image.np_dtype == np.uint8
        and isinstance(label, tfds.features.ClassLabel)
    ):
        raise UserError(
            f"config.dataset.name={name} has no 8-bit 'image' with one class as "
            f"'label' (but {', '.join(sorted(features))}): choose an "
            "image-classification set"
        )
    for split in splits.values():
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
            stored = ArrayRecordReader(str(path)).num_records()
            if stored != length:
                raise _damaged(
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
      UserError: it is given and not there.
    """
    directory, origin = data_dir, "config.dataset.data_dir"
    if not directory:
        directory, origin = os.environ.get("TFDS_DATA_DIR", ""), "TFDS_DATA_DIR"
    if not directory:
        return Path("~/tensorflow_datasets").expanduser()
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{origin}={directory} is not a directory on this machine: create it "
            "(mkdir -p), or leave it out to use ~/tensorflow_datasets"
        )
    return path


def locate(name: str, data_dir: str) -> Path | None:
    """Where a set lies prepared; None if it does not but `prepare` can prepare it.

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
                f"config.dataset.name={name} comes in several kinds: choose one of "
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
        f"config.dataset.name={name} is not known, nor prepared in {root}: "
        f"{did_you_mean(name, [*KNOWN, *known])}without TensorFlow there are "
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
            raise _damaged(directory, f"there is no {file}")
    try:
        info = json.loads((directory / "dataset_info.json").read_text())
        if not isinstance(info, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise _damaged(directory, f"dataset_info.json: {error}") from None
    # TFDS did not write the format down when there was only this one.
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


def _damaged(directory: Path, reason: str) -> UserError:
    return UserError(
        f"{directory} is damaged or half-written ({reason}): delete it and run again"
    )
