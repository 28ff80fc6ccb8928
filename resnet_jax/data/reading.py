"""One pass over the splits that a config chooses: their pixels, or only an index."""

from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from resnet_jax import UserError
from resnet_jax.data.dataset import Split
from resnet_jax.data.picture import UnreadableError
from resnet_jax.data.source import Source
from resnet_jax.data.stream import StreamedImages, fit

# A share of files that cannot be read is left out; a larger one is no accident.
UNREADABLE_LIMIT = 0.1
_TOLD = 10

# For each split of a config, its parts: indices of a split of the source.
Selections = list[list[tuple[str, range]]]


class Reader:
    """Reads the examples of several selections; says what it leaves out.

    Attributes:
      kept: the number of examples of each selection that could be read.
      skipped: the sentences about the others.
    """

    def __init__(self, source: Source, selections: Selections, size: int):
        self._source, self._selections, self._size = source, selections, size
        self.total = sum(len(rows) for parts in selections for _, rows in parts)
        self.kept = np.zeros(len(selections), np.int64)
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, str, int, np.ndarray, int]]:
        """Yields (number of the selection, split, index, image, label).

        Raises:
          UserError: images differ in size, have no label, or too many are damaged.
        """
        shape = None
        progress = tqdm(
            desc=f"Reading {self._source.name}",
            total=self.total,
            delay=1,
            disable=None,
            leave=False,
        )
        with progress:
            for number, split, index, image, label in self._all():
                progress.update()
                if isinstance(image, UnreadableError):
                    self._skip(image)
                    continue
                image = fit(image, self._size)
                shape = shape or image.shape
                if image.shape != shape:
                    raise UserError(
                        f"The images of {self._source.name} differ in size ({shape}, "
                        f"{image.shape}): give config.dataset.image_size, for example "
                        "64, to resize them all to that square"
                    )
                if label < 0:
                    raise UserError(
                        f"{self._source.name} has examples without a label in these "
                        "splits: choose other splits"
                    )
                self.kept[number] += 1
                yield number, split, index, image, label
        if not self.kept.all():
            raise UserError(
                f"{self._source.name}: no picture of a split can be read (first "
                f"{self.skipped[0]}): fix them"
            )

    def _all(self):
        for number, parts in enumerate(self._selections):
            for split, rows in parts:
                examples = self._source.examples(split, rows)
                for index, (image, label) in zip(rows, examples, strict=True):
                    yield number, split, index, image, label

    def _skip(self, error: UnreadableError) -> None:
        self.skipped.append(str(error))
        # Of a few files, one alone may be damaged.
        if len(self.skipped) > max(1, UNREADABLE_LIMIT * self.total):
            raise UserError(
                f"{self._source.name}: over {UNREADABLE_LIMIT:.0%} of {self.total:,} "
                f"pictures cannot be read (such as {self.skipped[0]}): fix or delete "
                "them"
            )


def read_pixels(source: Source, selections: Selections, size: int) -> dict:
    """Reads everything: arrays 'images', 'labels', 'kept' and 'skipped'."""
    reader, images = Reader(source, selections, size), None
    labels = np.empty(reader.total, np.int32)
    for row, (_, _, _, image, label) in enumerate(reader):
        if images is None:
            images = np.empty((reader.total, *image.shape), np.uint8)
        images[row], labels[row] = image, label
    count = reader.kept.sum()
    return {
        "images": images[:count],
        "labels": labels[:count],
        "kept": reader.kept,
        "skipped": np.array(reader.skipped, np.str_),
    }


def read_index(source: Source, selections: Selections, size: int) -> dict:
    """Reads everything and keeps no image, only the arrays for `splits_to_stream`.

    They are 'splits', 'indices' and 'labels' of the images that could be read, 'kept'
    and 'skipped', and 'sum' and 'squares' of the images of the first selection, which
    is trained on.
    """
    reader, total, squares = Reader(source, selections, size), 0, 0
    rows = []
    for number, split, index, image, label in reader:
        rows.append((split, index, label))
        if number == 0:
            total = total + image.astype(np.int64)
            squares = squares + np.square(image, dtype=np.int64)
    splits, indices, labels = zip(*rows, strict=True)
    return {
        "splits": np.array(splits, np.str_),
        "indices": np.array(indices, np.int64),
        "labels": np.array(labels, np.int32),
        "sum": total,
        "squares": squares,
        "kept": reader.kept,
        "skipped": np.array(reader.skipped, np.str_),
    }


def splits_in_memory(arrays: dict) -> list[Split]:
    """Cuts the arrays of `read_pixels` into splits."""
    cuts = np.cumsum(arrays["kept"])[:-1]
    parts = (np.split(arrays[name], cuts) for name in ("images", "labels"))
    return list(map(Split, *parts))


def splits_to_stream(arrays: dict, source: Source, size: int) -> list[Split]:
    """Makes splits of the arrays of `read_index`."""
    cuts = np.cumsum(arrays["kept"])[:-1]
    names, indices, labels = (
        np.split(arrays[name], cuts) for name in ("splits", "indices", "labels")
    )
    sums = arrays["sum"], arrays["squares"]
    parts = []
    for number in range(len(arrays["kept"])):
        images = StreamedImages(
            source,
            size,
            sums[0].shape,
            names[number],
            indices[number],
            sums if number == 0 else None,
        )
        parts.append(Split(images, labels[number]))
    return parts


def notes_on_skipped(skipped: list[str]) -> list[str]:
    """Says which files were left out, up to ten of them."""
    notes = [f"skipped   {sentence}" for sentence in skipped[:_TOLD]]
    if len(skipped) > _TOLD:
        notes.append(f"skipped   {len(skipped) - _TOLD:,} more that cannot be read")
    return notes
