"""Images that do not fit in memory: Grain reads them when a batch needs them."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from resnet_jax import UserError
from resnet_jax.data.picture import QUICK, UnreadableError, fit
from resnet_jax.data.source import Source

THREADS = 16  # that read ahead, if reading is slow
_AHEAD = 2  # batches that are read ahead
# Images that a thread reads at once: handing one over takes Grain as long as decoding
# an image of 32 pixels.
_CHUNK = 16


class StreamedImages:
    """A split's images, none of which is in memory.

    Attributes:
      shape: (examples, height, width, channels).
      sums: the sum of all its images and that of their squares, exact, each int64
        [height, width, channels]; None for splits that need no statistics.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        shape: tuple[int, int, int],
        splits: np.ndarray,
        indices: np.ndarray,
        sums: tuple[np.ndarray, np.ndarray] | None,
    ):
        """Row r is example `indices[r]` of the source's split `splits[r]`."""
        self.shape = (len(indices), *shape)
        self.sums = sums
        self._source, self._size = source, size
        self._splits, self._indices = splits, indices

    def __getstate__(self) -> dict:
        """For another process, which calls `reopen` next."""
        return self.__dict__ | {"_source": self._source._replace(examples=None)}

    def reopen(self, source: Source) -> None:
        """From now on reads from this source, which must be the same.

        Raises:
          UserError: it has other classes, or other numbers of images.
        """
        before, now = ((s.class_names, s.sizes) for s in (self._source, source))
        if before != now:
            raise UserError(
                f"config.dataset: {source.name} is not the same here as in process 0 "
                f"({now[1]} images instead of {before[1]}, {len(now[0])} classes "
                f"instead of {len(before[0])}): give all hosts the same files"
            )
        self._source = source

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        """Reads one image, uint8 [height, width, channels], or several, as NumPy does.

        Raises:
          UserError: one cannot be read any more.
        """
        if isinstance(rows, slice | np.ndarray):
            numbers = np.arange(len(self))[rows]
            with ThreadPoolExecutor(THREADS) as pool:
                return np.stack(list(pool.map(self.__getitem__, numbers.tolist())))
        split, index = str(self._splits[rows]), int(self._indices[rows])
        ((image, _),) = self._source.examples(split, [index])
        if isinstance(image, UnreadableError):
            raise UserError(
                f"{image}, although it could be read at the start: restore the file, "
                "then run the same command to continue"
            )
        return fit(image, self._size)


def _threads(images: StreamedImages, rows: list[int]) -> int:
    """How many threads to read with, by the median time that some rows take."""
    times = [time.perf_counter()]
    for row in rows:
        images[row]
        times.append(time.perf_counter())
    seconds = statistics.median(after - before for before, after in pairwise(times))
    return THREADS if seconds > QUICK else 1


def batches(
    images: StreamedImages,
    labels: np.ndarray,
    row_of: Callable[[int], int],
    numbers: range,
    positions: np.ndarray,
    batch_size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads one batch after another, ahead of time.

    Args:
      images: to read.
      labels: int32, of each.
      row_of: the row at a place; places are numbered consecutively across batches.
      numbers: of the batches.
      positions: int32, the places in a batch that this process reads.
      batch_size: places in a batch, over all processes.

    Yields:
      The images and labels of `positions`, in that order.
    """
    import grain

    chunk = max(n for n in range(1, _CHUNK + 1) if len(positions) % n == 0)
    first = numbers.start * batch_size
    threads = _threads(images, [row_of(first + int(p)) for p in positions[:8]])

    class Chunks:
        def __len__(self) -> int:
            return len(numbers) * len(positions) // chunk

        def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
            batch, first = divmod(int(number) * chunk, len(positions))
            start = numbers[batch] * batch_size
            rows = [row_of(start + int(p)) for p in positions[first : first + chunk]]
            return np.stack([images[row] for row in rows]), labels[rows]

    count = len(positions) // chunk
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * count)
    dataset = grain.MapDataset.source(Chunks()).to_iter_dataset(ahead).batch(count)
    for chunks in dataset:
        yield tuple(array.reshape(-1, *array.shape[2:]) for array in chunks)
