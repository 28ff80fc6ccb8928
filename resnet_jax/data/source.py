"""What every source of data looks like to `load`."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """Labelled images that have a known number, of which none is read yet.

    Attributes:
      name: What to call the data in titles and reports.
      class_names: One name a label.
      sizes: The number of examples in each split.
      examples: `examples(split, indices)` reads (image, label) pairs in that order;
        an image is uint8 `[height, width]` or `[height, width, channels]`.
    """

    name: str
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    examples: Callable[[str, range], Iterable[tuple[np.ndarray, int]]]
