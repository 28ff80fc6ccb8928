"""A data set and its splits, as `load` returns them."""

import dataclasses
from typing import NamedTuple

import numpy as np

from resnet_jax.data.stream import StreamedImages


class Split(NamedTuple):
    """Labelled images."""

    # uint8 [examples, height, width, channels]
    images: np.ndarray | StreamedImages
    labels: np.ndarray  # int32 [examples]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, in memory or ready to be streamed.

    Attributes:
      name: for titles and reports; says so where the data are not real.
      class_names: one name a label.
      train: what is trained on.
      validation: what is for choosing; None where `validation_split` is ''.
      eval: what is reported at the end; None where training alone is measured.
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
        """The number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.train.images.shape[1:]
