"""A data set and its splits, read in one pass over what a config chooses."""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from resnet_jax import UserError
from resnet_jax.data.picture import UnreadableError, fit
from resnet_jax.data.source import Source
from resnet_jax.data.stream import StreamedImages

# Up to this share of unreadable files is left out; a larger one is no accident.
UNREADABLE_LIMIT = 0.1
_TOLD = 10

# For each split of a config, its parts: indices of a split of the source.
Selections = list[list[tuple[str, range]]]


class Split(NamedTuple):
    """Labelled images."""

    # uint8 [examples, height, width, channels]
    images: np.ndarray | StreamedImages
    labels: np.ndarray  # int32 [examples]

    @property
    def streams(self) -> bool:
        """Whether the images are read from the disk batch by batch."""
        return isinstance(self.images, StreamedImages)

    def __repr__(self) -> str:
        count, *shape = self.images.shape
        return f"Split({count:,} images of {'x'.join(map(str, shape))})"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, in memory or ready to be streamed.

    Attributes:
      name: for titles and reports; says so where the data are not real.
      class_names: one name per label.
      train: what is trained on.
      validation: for model selection; None if `validation_split` is ''.
      eval: what is reported at the end; None where only training is measured.
      notes: lines that the user should see, such as files that were left out.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split | None
    eval: Split | None
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.images.shape[1:]


def read(
    source: Source, selections: Selections, size: int, *, streams: bool
) -> dict[str, np.ndarray]:
    """Reads every example once.

    Returns:
      Arrays for `cut`: 'labels', 'kept' (how many of each selection could be read),
      'skipped' (sentences about the others), and 'images' or, if they are to be
      streamed, their 'splits' and 'indices', and 'sum' and 'squares' over the images of
      the first selection, which is trained on.

    Raises:
      UserError: images differ in size, have no label, or too many are damaged.
    """
    images, total, squares, rows, skipped = None, 0, 0, [], []
    examples = sum(len(indices) for parts in selections for _, indices in parts)
    progress = tqdm(
        _examples(source, selections),
        desc=f"Reading {source.name}",
        total=examples,
        delay=1,
        disable=None,
        leave=False,
    )
    for number, split, index, image, label in progress:
        if isinstance(image, UnreadableError):
            skipped.append(str(image))
            # However few the files, one may be damaged.
            if len(skipped) > max(1, UNREADABLE_LIMIT * examples):
                raise UserError(
                    f"{source.name}: over {UNREADABLE_LIMIT:.0%} of {examples:,} "
                    f"pictures cannot be read (such as {skipped[0]}): fix or delete "
                    "them"
                )
            continue
        if image.dtype != np.uint8:
            raise UserError(
                f"the images of {source.name} are {image.dtype}: give uint8, 0 to 255"
            )
        image = fit(image, size)
        if not rows:
            shape = image.shape
            images = None if streams else _empty((examples, *shape))
        if image.shape != shape:
            raise UserError(
                f"the images of {source.name} differ in size ({shape}, "
                f"{image.shape}): give config.dataset.image_size, for example "
                "64, to resize them all to that square"
            )
        if label < 0:
            raise UserError(
                f"{source.name} has examples without a label in split '{split}': "
                "choose other splits"
            )
        if label >= len(source.class_names):
            raise UserError(
                f"{source.name} has the label {label} in split '{split}', but "
                f"{len(source.class_names)} classes: number them from 0"
            )
        if not streams:
            images[len(rows)] = image
        elif number == 0:
            total = total + image.astype(np.int64)
            squares = squares + np.square(image, dtype=np.int64)
        rows.append((number, split, index, label))
    numbers = np.array([number for number, *_ in rows], int)
    kept = np.bincount(numbers, minlength=len(selections))
    if not kept.all():
        names = " and ".join(f"'{split}'" for split, _ in selections[kept.argmin()])
        raise UserError(
            f"{source.name}: no picture of split {names} can be read (first: "
            f"{skipped[0]}): fix them"
        )
    _, splits, indices, labels = zip(*rows, strict=True)
    arrays = {
        "labels": np.array(labels, np.int32),
        "kept": kept,
        "skipped": np.array(skipped, np.str_),
    }
    if not streams:
        return arrays | {"images": images[: len(rows)]}
    return arrays | {
        "splits": np.array(splits, np.str_),
        "indices": np.array(indices, np.int64),
        "sum": total,
        "squares": squares,
    }


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty(shape, np.uint8)
    except MemoryError:
        raise UserError(
            f"config.dataset.stream=never: {math.prod(shape) / 2**30:,.0f} GiB of "
            "pixels do not fit in this machine's memory: leave it at auto, or give a "
            "smaller image_size"
        ) from None


def _examples(
    source: Source, selections: Selections
) -> Iterator[tuple[int, str, int, np.ndarray | UnreadableError, int]]:
    """Yields (number of the selection, split, index, image, label)."""
    for number, parts in enumerate(selections):
        for split, indices in parts:
            examples = source.examples(split, indices)
            for index, (image, label) in zip(indices, examples, strict=True):
                yield number, split, index, image, label


def cut(arrays: dict[str, np.ndarray], source: Source, size: int) -> list[Split]:
    """Cuts the arrays of `read` into splits."""
    cuts = np.cumsum(arrays["kept"])[:-1]

    def parts(name: str) -> list[np.ndarray]:
        return np.split(arrays[name], cuts)

    if "images" in arrays:
        images = parts("images")
    else:
        sums = arrays["sum"], arrays["squares"]
        streamed = enumerate(zip(parts("splits"), parts("indices"), strict=True))
        images = [
            StreamedImages(source, size, sums[0].shape, *rows, None if n else sums)
            for n, rows in streamed
        ]
    return list(map(Split, images, parts("labels")))


def notes_on_skipped(skipped: list[str]) -> list[str]:
    """Says which files were left out, up to ten of them."""
    notes = [f"skipped   {sentence}" for sentence in skipped[:_TOLD]]
    if len(skipped) > _TOLD:
        notes.append(f"skipped   {len(skipped) - _TOLD:,} more that cannot be read")
    return notes
