"""The examples of a prepared TFDS set, decoded in several processes if there are many.

Because of Python's lock, several threads decode small pictures no faster than one.
"""

import contextlib
import io
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from resnet_jax import UserError
from resnet_jax.data import picture

CHUNK = 1000  # examples read at once: one by one takes twice as long
_PROBE = 200  # examples that show how long the others take
# Seconds of decoding that justify starting processes, which takes most of a second.
WORTHWHILE = 2.0
_PROCESSES = 8  # at most: more would wait for the one that receives their output
_PIECE = 2**20  # bytes of pixels that a process hands over at once, at most
_LOST = (OSError, EOFError, pickle.UnpicklingError)  # a process died or never started

Example = tuple[np.ndarray | picture.UnreadableError, int]


class Examples:
    """`Source.examples` of a prepared set."""

    def __init__(self, directory: Path, channels: int, size: int):
        """Examples of a prepared set.

        Args:
          directory: where it is.
          channels: of its images; 0: it does not say.
          size: pixels a side, as `picture.decode` takes it.
        """
        self._directory, self._channels, self._size = directory, channels, size
        self._opened = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def __call__(self, split: str, indices: Sequence[int]) -> Iterator[Example]:
        """Reads (image, label) pairs in the order of `indices`.

        Raises:
          UserError: the files are damaged.
        """
        first, rest = indices[:_PROBE], indices[_PROBE:]
        for number, (image, label) in enumerate(self._read(split, first)):
            if number == 0:  # The files are open now.
                start = time.perf_counter()
            yield image, label
        if not rest:
            return
        done, seconds = 0, (time.perf_counter() - start) / number * len(rest)
        count = min(_PROCESSES, _cores())
        if seconds > WORTHWHILE and count > 1:
            # Each process gets several pieces.
            most = min(_PIECE // getattr(image, "nbytes", 1), len(rest) // 4 // count)
            starts = range(0, len(rest), max(1, most))
            pieces = [rest[start : start + starts.step] for start in starts]
            for example in self._read_in_processes(split, pieces, count):
                yield example
                done += 1
        yield from self._read(split, rest[done:])

    def _read(self, split: str, indices: Sequence[int]) -> Iterator[Example]:
        if split not in self._opened:
            import tensorflow_datasets as tfds

            # TFDS would return palette indices, and as many channels as a file has.
            as_stored = {"image": tfds.decode.SkipDecoding()}
            self._opened[split] = builder(self._directory).as_data_source(
                split, decoders=as_stored
            )
        data = self._opened[split]
        for start in range(0, len(indices), CHUNK):
            try:
                chunk = data.__getitems__(indices[start : start + CHUNK])
            except RuntimeError as error:  # array_record found a wrong checksum.
                raise damaged(self._directory, str(error)) from None
            for number, example in enumerate(chunk, start=start):
                name = f"{split}[{indices[number]}]"
                image = decoded(example["image"], self._size, self._channels, name)
                yield image, example["label"]

    def _read_in_processes(
        self, split: str, pieces: list[Sequence[int]], count: int
    ) -> Iterator[Example]:
        """Reads pieces as `_read` does; ends early if one of `count` processes does."""
        # What fails in a process then fails here too, where it can be reported.
        with contextlib.ExitStack() as stack, contextlib.suppress(*_LOST):
            processes = [
                stack.enter_context(_process(self, split, pieces[number::count]))
                for number in range(count)
            ]
            for number in range(len(pieces)):
                yield from pickle.load(processes[number % count].stdout)

    def serve(self, split: str, pieces: list[Sequence[int]]) -> None:
        """Writes pieces of examples to the standard output."""
        for piece in pieces:
            pickle.dump(list(self._read(split, piece)), sys.stdout.buffer)
        sys.stdout.flush()


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def _process(
    examples: Examples, split: str, pieces: list[Sequence[int]]
) -> Iterator[subprocess.Popen]:
    """A process that serves these pieces."""
    program = (
        "import pickle, sys; examples, *task = pickle.load(sys.stdin.buffer); "
        "examples.serve(*task)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=2**16,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        try:
            pickle.dump((examples, split, pieces), process.stdin)
            process.stdin.close()
            yield process
        finally:
            process.kill()


def builder(directory: Path):
    """TFDS's builder of a prepared set; UserError if it cannot be read."""
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory, file_format="array_record")
    except Exception as error:  # Whatever TFDS's readers of JSON and protobuf raise.
        raise damaged(directory, f"TFDS cannot read it: {error}") from None


def decoded(
    content: bytes, size: int, channels: int, name: str
) -> np.ndarray | picture.UnreadableError:
    """Pixels as `predict` also reads them: grey if the set is, else RGB."""
    try:
        return picture.decode(io.BytesIO(content), size, 1 if channels == 1 else 3)
    except picture.UnreadableError as error:
        return picture.UnreadableError(f"{name}: {error}")


def damaged(directory: Path, reason: str) -> UserError:
    """The error to raise if a prepared set's files are incomplete."""
    return UserError(
        f"{directory} is damaged or half-written ({reason}): delete it and run again"
    )
