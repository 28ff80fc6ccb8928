"""Image-classification data as arrays: `load(config.dataset)`.

`digits` (scikit-learn's, no download), `fake` (random, for speed tests), and every
small image-classification set that TFDS has prepared in array_record format, of which
cifar10, cifar100, fashion_mnist and svhn_cropped are downloaded and prepared here.
TensorFlow is never imported.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from resnet_jax import UserError
from resnet_jax.data import digits, fake, splits, tfds
from resnet_jax.data.source import Source

_BUNDLED = {"digits": digits.source, "fake": fake.source}


class Split(NamedTuple):
    """Labelled images."""

    images: np.ndarray  # uint8 [examples, height, width, channels]
    labels: np.ndarray  # int32 [examples]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
      name: For titles and reports; says so where the data are not real.
      class_names: One name a label.
      train: What is trained on.
      validation: What is for choosing; None where `validation_split` is ''.
      eval: What is reported at the end.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    eval: Split

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
      UserError: The set is unknown, or cannot be read or prepared; `data_dir` is given
        and not there; a split is not in TFDS's syntax; the mirror is no address; or the
        image size is negative.
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
    if config.name not in _BUNDLED:
        tfds.locate(config.name, config.data_dir)


def load(config) -> Dataset:
    """Reads a data set into memory, downloading and preparing it where need be.

    Args:
      config: `name`; `data_dir` ('': $TFDS_DATA_DIR or ~/tensorflow_datasets); `mirror`
        ('': the official host, else the base URL to download from); `image_size` (0:
        as stored, else pixels a side to resize to, bilinear); and `train_split`,
        `validation_split` (may be '') and `eval_split` in TFDS's syntax.

    Raises:
      UserError: As for `check`; and where the set cannot be had, is damaged, has no
        such split, or has images of several sizes; or training and validation overlap.
    """
    check(config)
    if config.name in _BUNDLED:
        source = _BUNDLED[config.name]()
    else:
        source = tfds.source(config.name, config.data_dir, config.mirror)
    selections = {
        field: splits.select(spec, field, source.sizes)
        for field, spec in _specs(config).items()
    }
    train, *validation, _ = selections.values()
    if validation:
        splits.check_disjoint(train, *validation, source.sizes)
    read = _read(source, list(selections.values()), config.image_size)
    return Dataset(
        name=source.name,
        class_names=source.class_names,
        train=read[0],
        validation=read[1] if validation else None,
        eval=read[-1],
    )


def _specs(config) -> dict[str, str]:
    """The splits to read, by field, in the order of `Dataset`."""
    specs = {"config.dataset.train_split": config.train_split}
    if config.validation_split:
        specs["config.dataset.validation_split"] = config.validation_split
    return specs | {"config.dataset.eval_split": config.eval_split}


def _read(
    source: Source, selections: list[list[tuple[str, range]]], size: int
) -> list[Split]:
    """Reads several selections into one array, and cuts it into as many splits."""
    counts = [sum(len(indices) for _, indices in parts) for parts in selections]
    examples = (
        example
        for parts in selections
        for part in parts
        for example in source.examples(*part)
    )
    labels = np.empty(sum(counts), np.int32)
    images = None
    progress = tqdm(
        examples,
        desc=f"Reading {source.name}",
        total=len(labels),
        delay=1,
        disable=None,
        leave=False,
    )
    for row, (image, label) in enumerate(progress):
        image = _resize(image, size) if size else image
        image = image[..., None] if image.ndim == 2 else image
        if images is None:
            images = np.empty((len(labels), *image.shape), np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"The images of {source.name} differ in size ({images.shape[1:]}, "
                f"{image.shape}): give config.dataset.image_size, for example 64, "
                "to resize them all to that square."
            )
        images[row], labels[row] = image, label
    if labels.min() < 0:
        raise UserError(
            f"{source.name} has examples without a label in these splits: choose other "
            "splits."
        )
    cuts = np.cumsum(counts)[:-1]
    return list(map(Split, np.split(images, cuts), np.split(labels, cuts)))


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    squeezed = image[..., 0] if image.shape[-1] == 1 and image.ndim == 3 else image
    resized = Image.fromarray(squeezed).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)
