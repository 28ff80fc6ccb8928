"""The interface that every source of data gives `load`, and the known sources."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from resnet_jax.data.picture import UnreadableError

# The sets that need no TensorFlow: classes, image shape, and examples in all splits;
# None: whatever the user's folder has.
KNOWN = {
    "cifar10": (10, (32, 32, 3), 60_000),
    "cifar100": (100, (32, 32, 3), 60_000),
    "fashion_mnist": (10, (28, 28, 1), 70_000),
    "svhn_cropped": (10, (32, 32, 3), 99_289),
    "image_folder": None,
    "digits": (10, (8, 8, 1), 1_797),
    "fake": (10, (32, 32, 3), 60_000),
}


class Source(NamedTuple):
    """A known number of labelled images, none of which is read yet.

    Attributes:
      name: the data's name in titles and reports.
      class_names: one name per label.
      sizes: the number of examples in each split.
      examples: `examples(split, indices)` reads (image, label) pairs in that order;
        an image is uint8 `[height, width]` or `[height, width, channels]`, or the
        error, beginning with the file, that says why there is none.
      key: changes whenever a pixel may; '' if reading again is as fast as caching.
      notes: lines that the user should see.
    """

    name: str
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    examples: Callable[
        [str, Sequence[int]], Iterable[tuple[np.ndarray | UnreadableError, int]]
    ]
    key: str = ""
    notes: tuple[str, ...] = ()
