"""What every source of data looks like to `load`."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from resnet_jax.data.picture import UnreadableError


class Source(NamedTuple):
    """Labelled images that have a known number, of which none is read yet.

    Attributes:
      name: What to call the data in titles and reports.
      class_names: One name a label.
      sizes: The number of examples in each split.
      examples: `examples(split, indices)` reads (image, label) pairs in that order;
        an image is uint8 `[height, width]` or `[height, width, channels]`, or the
        error, beginning with the file, that says why there is none.
      key: Changes whenever a pixel may; '' where reading again is as quick as keeping.
      notes: What the user should know of, a line each.
      aliases: (Another name, split) pairs.
    """

    name: str
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    examples: Callable[
        [str, Sequence[int]], Iterable[tuple[np.ndarray | UnreadableError, int]]
    ]
    key: str = ""
    notes: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
