"""Image-classification data: `load(config.dataset)`.

`image_folder` (your own pictures), `digits` (scikit-learn's, no download), `fake`
(random, for speed tests), and every image-classification set that TFDS has prepared in
array_record format, of which cifar10, cifar100, fashion_mnist and svhn_cropped are
downloaded and prepared here. TensorFlow is never imported.
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from resnet_jax import UserError
from resnet_jax.data import digits, fake, image_folder, reading, splits, tfds
from resnet_jax.data.cache import cached
from resnet_jax.data.source import Source
from resnet_jax.data.stream import StreamedImages, fit

# Decoded images up to this many bytes live on the device; more of them are streamed.
RESIDENT_BYTES = 2 * 2**30
_BUNDLED = {"digits": digits.source, "fake": fake.source}
# Classes, image shape, and examples of all splits, of what can be had here.
KNOWN = {
    "cifar10": (10, (32, 32, 3), 60_000),
    "cifar100": (100, (32, 32, 3), 60_000),
    "fashion_mnist": (10, (28, 28, 1), 70_000),
    "svhn_cropped": (10, (32, 32, 3), 99_289),
    "digits": (10, (8, 8, 1), 1_797),
    "fake": (10, (32, 32, 3), 60_000),
}


def base_name(name: str) -> str:
    """A set's name without TFDS's config and version."""
    return re.split("[/:]", name)[0]


class Split(NamedTuple):
    """Labelled images."""

    # uint8 [examples, height, width, channels]
    images: np.ndarray | StreamedImages
    labels: np.ndarray  # int32 [examples]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, in memory or ready to be streamed.

    Attributes:
      name: For titles and reports; says so where the data are not real.
      class_names: One name a label.
      train: What is trained on.
      validation: What is for choosing; None where `validation_split` is ''.
      eval: What is reported at the end; None where training alone is measured.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    eval: Split | None

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.images.shape[1:]


def check(config) -> None:
    """Checks `config.dataset` without reading data.

    Args:
      config: The fields of `load`.

    Raises:
      UserError: The set is unknown, or cannot be read or prepared; `data_dir` or `path`
        is given and not there; a split is not in TFDS's syntax; the mirror is no
        address; the image size is negative; or random pixels are to be streamed.
    """
    for field, spec in _specs(config).items():
        splits.parse(spec, field)
    if config.image_size < 0:
        raise UserError(
            f"config.dataset.image_size={config.image_size} is not a size: "
            "give a number of pixels, or 0 to leave the images as they are."
        )
    if config.mirror and not config.mirror.startswith(("http://", "https://")):
        raise UserError(
            f"config.dataset.mirror={config.mirror} is not an address: begin it with https://."
        )
    if config.name == "image_folder":
        image_folder.check(config.path)
        return
    if config.path:
        raise UserError(
            f"config.dataset.path={config.path} is for pictures of your own: give "
            "config.dataset.name=image_folder, too"
        )
    if config.name not in _BUNDLED:
        tfds.locate(config.name, config.data_dir)


def load(config) -> Dataset:
    """Reads a data set, downloading and preparing it where need be.

    Args:
      config: `name`; `path` and `split_seed` of image_folder; `data_dir` ('':
        $TFDS_DATA_DIR or ~/tensorflow_datasets); `mirror` ('': the official host, else
        the base URL to download from); `image_size` (0: as stored, else pixels a side
        of a square, to which an image's middle is resized, bilinear); `stream`
        ('always', 'never', or 'auto': if it is larger than `RESIDENT_BYTES`); and
        `train_split`, `validation_split` (may be '') and `eval_split` in TFDS's syntax.

    Raises:
      UserError: As for `check`; and where the set cannot be had, is damaged, has no
        such split, or has images of several sizes; or training and validation overlap.
    """
    check(config)
    source = _source(config)
    selections = {
        field: splits.select(spec, field, source.sizes, source.aliases)
        for field, spec in _specs(config).items()
    }
    train, *validation, _ = selections.values()
    if validation:
        splits.check_disjoint(train, *validation, source.sizes)
    for note in source.notes:
        print(note)
    *others, (field, test) = selections.items()
    for other, seen in others:
        if shared := splits.shared(seen, test):
            print(
                f"warning   {field} shares {shared:,} examples with {other}: the test "
                "accuracy is not one on new images"
            )
    chosen, size = list(selections.values()), config.image_size
    streams = _streams(config, source, chosen)
    read = reading.to_know if streams else reading.into_memory
    arrays = cached(
        source.key and f"{source.key} {chosen} middle {size} {read.__name__}",
        lambda: read(source, chosen, size),
    )
    reading.tell_skipped(arrays["skipped"])
    if streams:
        read = reading.splits_to_stream(arrays, source, size)
    else:
        read = reading.splits_in_memory(arrays)
    read = [Split(*split) for split in read]
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        train=read[0],
        validation=read[1] if validation else None,
        eval=read[-1],
    )


def reopen(dataset: Dataset, config) -> None:
    """Lets a data set that came from another process read its streamed images here.

    Raises:
      UserError: they are not here, or not the same.
    """
    splits = (dataset.train, dataset.validation, dataset.eval)
    parts = [split.images for split in splits if split]
    streamed = [images for images in parts if isinstance(images, StreamedImages)]
    if streamed:
        source = _source(config)
        for images in streamed:
            images.reopen(source)


def _source(config) -> Source:
    if config.name == "image_folder":
        return image_folder.source(config.path, config.image_size, config.split_seed)
    if config.name in _BUNDLED:
        return _BUNDLED[config.name]()
    return tfds.source(config.name, config.data_dir, config.mirror)


def _specs(config) -> dict[str, str]:
    """The splits to read, by field, in the order of `Dataset`."""
    specs = {"config.dataset.train_split": config.train_split}
    if config.validation_split:
        specs["config.dataset.validation_split"] = config.validation_split
    return specs | {"config.dataset.eval_split": config.eval_split}


def _streams(config, source: Source, selections: reading.Selections) -> bool:
    """Whether the images are read batch by batch, and not kept in memory."""
    if config.stream != "auto":
        return config.stream == "always"
    examples = sum(len(rows) for parts in selections for _, rows in parts)
    split, rows = selections[0][0]
    for index in rows[:16]:  # the first may be damaged
        ((image, _),) = source.examples(split, range(index, index + 1))
        if isinstance(image, np.ndarray):
            return examples * fit(image, config.image_size).size > RESIDENT_BYTES
    return False
