"""Images on the devices: a whole split, or batches that are streamed from the disk."""

import functools
import math
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from resnet_jax import data
from resnet_jax.data import stream
from resnet_jax.parallel import Parallel
from resnet_jax.plan import Plan
from resnet_jax.step import epoch_order

# Several batches go to the devices in one block, since a call costs as much as half a
# step on a CPU; large ones go alone, since two blocks wait in memory.
_BLOCK_BYTES = 128 * 2**20


class Feed:
    """Gives the batches of a split in blocks, while the next ones are being read.

    Each process reads the examples that its own devices take.

    Attributes:
      positions: int32 [batch], the places in a batch, spread over the devices.
    """

    def __init__(
        self,
        split: data.Split,
        row_of: Callable[[int], int],
        batch_size: int,
        batches_per_call: int,
        parallel: Parallel,
    ):
        """`row_of(place)` is the row at a place; batch s begins at s * batch_size."""
        self._split, self._row_of, self._batch_size = split, row_of, batch_size
        self.positions = parallel.shard(np.arange(batch_size, dtype=np.int32))
        self._shards = self.positions.addressable_shards
        self._own = np.concatenate([np.ravel(shard.data) for shard in self._shards])
        size = batch_size * math.prod(split.images.shape[1:])
        self._length = max(1, min(batches_per_call, _BLOCK_BYTES // size))
        self.close()

    def empty_block(self) -> tuple[jax.Array, jax.Array]:
        """Images and labels as `blocks` gives them, all zero."""
        return tuple(map(self._place, self._zeros()))

    def blocks(self, start: int, stop: int, end: int) -> Iterator[tuple]:
        """Yields (first, last, images, labels): the batches from `first` up to `last`.

        Images are [batch, batches, height, width, channels], sharded over the devices
        along the first axis, and labels [batch, batches]; after `last` there are zeros.
        Together the blocks go from `start` to `stop`. Reading continues beyond `stop`,
        up to `end`, for the call that starts there.
        """
        if (self._next, self._end) != (start, end):
            self.close()
            self._end = end
            self._batches = stream.batches(
                self._split.images,
                self._split.labels,
                self._row_of,
                range(start, end),
                self._own,
                self._batch_size,
            )
        for first in range(start, stop, self._length):
            last = min(first + self._length, stop)
            block = self._zeros()
            self._next = None  # a partly read block cannot be continued
            for number in range(first, last):
                for whole, part in zip(block, next(self._batches), strict=True):
                    whole[:, number - first] = part
            self._next = last
            yield first, last, *map(self._place, block)

    def _zeros(self) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(self._own), self._length)
        images = np.zeros(shape + self._split.images.shape[1:], np.uint8)
        return images, np.zeros(shape, np.int32)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._next, self._end, self._batches = None, None, iter(())

    def _place(self, local: np.ndarray) -> jax.Array:
        parts = [
            jax.device_put(
                part.reshape(shard.data.shape + part.shape[1:]), shard.device
            )
            for part, shard in zip(
                np.split(local, len(self._shards)), self._shards, strict=True
            )
        ]
        return jax.make_array_from_single_device_arrays(
            self.positions.shape + local.shape[1:], self.positions.sharding, parts
        )


class Resident:
    """A split held whole on every device: one block, given as `Feed` gives its own."""

    def __init__(self, split: data.Split, parallel: Parallel):
        self.split = parallel.replicate(split)

    def empty_block(self) -> data.Split:
        """Images and labels as `blocks` gives them: here those of the split."""
        return self.split

    def blocks(self, start: int, stop: int, end: int) -> Iterator[tuple]:
        """Yields (start, stop, images, labels)."""
        yield start, stop, *self.split


def train_feed(split: data.Split, plan: Plan, seed: int, parallel: Parallel) -> Feed:
    """The training batches, in the order of `step.resident_batches`."""
    cpu, lock = jax.local_devices(backend="cpu")[0], threading.Lock()

    @functools.lru_cache(maxsize=3)
    def order(epoch: int) -> np.ndarray:
        with jax.default_device(cpu):
            return np.asarray(epoch_order(seed, epoch, plan.examples))

    def row_of(place: int) -> int:
        epoch, place = divmod(place, plan.examples)
        with lock:  # one thread computes what all ask for
            return int(order(epoch)[place])

    return Feed(split, row_of, plan.batch_size, plan.steps_per_call, parallel)
