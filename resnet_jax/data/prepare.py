"""Prepares a few TFDS sets without TensorFlow, from their official archives.

TFDS's own builders read the archives through TensorFlow. A subclass of each, which
reads them with NumPy, writes the same array_record files in the same order, so that
sets prepared here work in every other program that uses TFDS, and vice versa (only
`extra` of svhn_cropped, 1.3 GB, is left out).
"""

import contextlib
import fcntl
import gzip
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from resnet_jax import UserError
from resnet_jax.data import archive

NAMES = ("cifar10", "cifar100", "fashion_mnist", "svhn_cropped")

# The fields of a split's examples, by TFDS's names, each an array or a list.
Fields = dict[str, np.ndarray | list[str]]


def prepare(name: str, data_dir: Path, mirror: str) -> Path:
    """Prepares one of `NAMES`; downloads what is neither in `data_dir` nor downloads/.

    The result appears in its place only once it is complete.

    Args:
      name: the set.
      data_dir: TFDS's data directory; created if it is not there.
      mirror: the base URL to download from, '' for the official host.

    Returns:
      The directory of the prepared set, `data_dir/name/version`.

    Raises:
      UserError: an archive is wrong or cannot be obtained, or writing fails.
    """
    import tensorflow_datasets as tfds

    parent = tfds.builder_cls(name)
    target = data_dir / name / str(parent.VERSION)
    try:
        files = archive.official(name)
        for file in files:
            archive.find(file, data_dir)  # A wrong one is reported first.
        (data_dir / "downloads").mkdir(parents=True, exist_ok=True)
        with _alone(data_dir / "downloads" / f"{name}.lock"):
            if not target.exists():  # Else another process has just made it.
                paths = {
                    file.name: archive.obtain(file, name, data_dir, mirror)
                    for file in files
                }
                print(f"prepare   {name} in {target}, once", file=sys.stderr)
                _build(parent, name, data_dir, paths)
    except OSError as error:
        raise UserError(
            f"{name} cannot be prepared in {data_dir} ({error}): make room, or give "
            "--config.dataset.data_dir=DIR, a directory that you can write to"
        ) from None
    return target


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process in at a time: several runs are often started at once."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(parent: type, name: str, data_dir: Path, paths: dict[str, Path]) -> None:
    """Runs TFDS's builder `parent` with its reading of the archives replaced."""
    import tensorflow_datasets as tfds
    from PIL import Image

    read = {"fashion_mnist": _read_fashion_mnist, "svhn_cropped": _read_svhn}.get(
        name, _read_cifar
    )

    class Builder(parent, skip_registration=True):
        def _split_generators(self, dl_manager):
            splits = read(self, paths)
            return {split: self._generate_examples(splits[split]) for split in splits}

        def _generate_examples(self, fields):
            # TFDS shuffles by key: with TFDS's own keys, the order is TFDS's own.
            rows = tqdm(
                zip(*fields.values(), strict=True),
                desc=f"Preparing {name}",
                total=len(fields["label"]),
                disable=None,
                leave=False,
            )
            for key, row in enumerate(rows):
                example = dict(zip(fields, row, strict=True))
                # TFDS encodes PIL's images itself, but arrays through TensorFlow.
                yield key, example | {"image": Image.fromarray(example["image"])}

        # TFDS would print sizes that it does not know, and that it is done.
        _log_download_bytes = _log_download_done = lambda self: None

    Builder.name = name
    tfds.disable_progress_bar()
    Builder(data_dir=data_dir, file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _ids(split: str, count: int, digits: int) -> list[str]:
    return [f"{split}_{index:0{digits}d}" for index in range(count)]


def _read_cifar(builder, paths: dict[str, Path]) -> dict[str, Fields]:
    """CIFAR's binary version: a row is 1 or 2 labels and a 3x32x32 image."""
    facts = builder._cifar_info
    (path,) = paths.values()
    with tarfile.open(path) as tar:  # In one pass: gzip cannot seek.
        files = {
            member.name.removeprefix(facts.prefix): tar.extractfile(member).read()
            for member in tar
            if member.isfile()
        }
    for key, file in zip(facts.label_keys, facts.label_files, strict=True):
        builder.info.features[key].names = files[file].decode().split()
    splits = {}
    for split, names in (("train", facts.train_files), ("test", facts.test_files)):
        data = np.frombuffer(b"".join(files[name] for name in names), np.uint8)
        count = len(facts.label_keys)
        rows = data.reshape(-1, count + 3 * 32 * 32)
        images = rows[:, count:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        splits[split] = {
            **dict(zip(facts.label_keys, rows[:, :count].T, strict=True)),
            "id": _ids(split, len(rows), 5),
            "image": images,
        }
    return splits


def _read_fashion_mnist(builder, paths: dict[str, Path]) -> dict[str, Fields]:
    """MNIST's IDX files: 28x28 images after 16 bytes, labels after 8 bytes."""

    def read(file, header):
        with gzip.open(paths[file]) as stream:
            return np.frombuffer(stream.read(), np.uint8, offset=header)

    return {
        split: {
            "image": read(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28),
            "label": read(f"{prefix}-labels-idx1-ubyte.gz", 8),
        }
        for split, prefix in (("train", "train"), ("test", "t10k"))
    }


def _read_svhn(builder, paths: dict[str, Path]) -> dict[str, Fields]:
    """SVHN's MATLAB files: X is `[32, 32, 3, examples]`, y has 10 for the digit 0."""
    from scipy.io import loadmat

    splits = {}
    for split in ("train", "test"):
        data = loadmat(paths[f"{split}_32x32.mat"])
        labels = data["y"].ravel() % 10
        splits[split] = {
            "image": np.moveaxis(data["X"], -1, 0),
            "label": labels,
            "id": _ids(split, len(labels), 6),
        }
    return splits
