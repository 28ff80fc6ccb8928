"""Classifies pictures with a trained network: files, folders, or - for standard input.

python -m resnet_jax.predict --workdir=runs/v2_56/seed0 cat.jpg holiday/

Pictures of any size are scaled and centre cropped to what the network was trained on.
"""

import collections
import csv
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from scipy.special import softmax

from resnet_jax import UserError, command_line, trained
from resnet_jax.config import Build, build_network
from resnet_jax.data import listing
from resnet_jax.data.picture import SUFFIXES, UnreadableError, decode
from resnet_jax.data.stream import StreamedImages
from resnet_jax.parallel import Parallel
from resnet_jax.trained import Trained

STDIN = "-"
_BATCH_SIZE = 128  # at most
_MANY = 5_000  # examples, for which speed matters more than a fast start
_AHEAD = 256  # pictures decoded while the devices compute


class SkippedError(UserError):
    """Some pictures could not be read; the others are classified."""

    exit_status = 1


class Predictor:
    """One compiled program that gives a network's logits for any number of images."""

    def __init__(self, run: Trained, examples: int):
        """Chooses a batch size that suits this many examples, and compiles for it."""
        devices = jax.local_devices()
        batch = min(_BATCH_SIZE, 1 << max(examples - 1, 0).bit_length())
        self.batch_size = -(-batch // len(devices)) * len(devices)
        self._shape = run.inputs.image_shape
        self._parallel = Parallel.over(
            devices, "jit", self.batch_size, self._shape, fast_start=examples < _MANY
        )
        self._variables = self._parallel.replicate(run.variables)

        images = self._parallel.shard(self._padded(np.empty((0, *self._shape))))
        self._logits = self._parallel.compile(
            run.logits, self._variables, images, inference=True
        )

    def __call__(self, images: np.ndarray | StreamedImages) -> np.ndarray:
        """Logits, float32 [images, classes], of images as they are stored."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            placed = self._parallel.shard(self._padded(batch))
            logits = self._parallel.fetch(self._logits(self._variables, placed))
            parts.append(logits[: len(batch)])
        return np.concatenate(parts)

    def _padded(self, images: np.ndarray) -> np.ndarray:
        batch = np.zeros((self.batch_size, *self._shape), np.uint8)
        batch[: len(images)] = images
        return batch


def find_pictures(arguments: list[str]) -> list[str]:
    """The files that arguments name; for folders, the pictures anywhere in them.

    Raises:
      UserError: there are no arguments, one is not there, or a folder has no picture.
    """
    if not arguments:
        raise UserError("no picture was given: name files or folders, or - for stdin")
    pictures = []
    for argument in arguments:
        if not argument:
            raise UserError("'' is not a picture: name a file or a folder")
        path = Path(argument)
        if argument == STDIN or path.is_file():
            pictures.append(argument)
        elif path.is_dir():
            inside, rest = listing.pictures(path)
            if not inside:
                suffixes = ", ".join(sorted(SUFFIXES))
                raise UserError(
                    f"{argument} contains no pictures ({suffixes}): give another"
                )
            pictures += inside
            if rest:
                print(
                    f"ignored   {len(rest):,} other files in {argument}, such as "
                    f"{rest[0]}",
                    file=sys.stderr,
                )
        else:
            raise UserError(f"{argument} does not exist: name a file or a folder")
    return pictures


def read_pictures(
    names: list[str], image_shape: tuple[int, int, int]
) -> Iterator[tuple[str, np.ndarray | None]]:
    """Decodes pictures in parallel, in order; prints those that it cannot read.

    Yields names with images, uint8 of `image_shape`, or None for an unreadable one.

    Raises:
      UserError: the network reads no pictures.
    """
    height, width, channels = image_shape
    if channels not in (1, 3):
        raise UserError(
            f"this network reads images of {channels} channels, which no picture has: "
            "use it from Python, with trained.load"
        )

    def read(name: str) -> np.ndarray | UnreadableError:
        try:
            source = io.BytesIO(sys.stdin.buffer.read()) if name == STDIN else name
            return decode(source, (height, width), channels)
        except UnreadableError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = iter(names)
        pending = collections.deque()
        while True:
            for name in itertools.islice(waiting, _AHEAD - len(pending)):
                pending.append((name, pool.submit(read, name)))
            if not pending:
                return
            name, future = pending.popleft()
            image = future.result()
            if isinstance(image, UnreadableError):
                print(f"skipped   {name}: {image}", file=sys.stderr)
                image = None
            yield name, image


def require_all_read(read: int, total: int) -> None:
    """Raises SkippedError where pictures were skipped, UserError where all were."""
    if not read:
        raise UserError("no picture could be read: give others")
    if read < total:
        raise SkippedError(f"{total - read} of {total} pictures could not be read")


def _groups(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


class _Writer:
    """Prints predictions as they come: a table, CSV, or JSON (a list of objects)."""

    def __init__(self, form: str, top: int, names: list[str], classes: tuple[str, ...]):
        self._form, self._first = form, True
        self._file_width = max(map(len, names))
        self._class_width = max(map(len, classes))
        self._csv = csv.writer(sys.stdout, lineterminator="\n")
        if form == "csv":
            ranks = range(1, top + 1)
            pairs = [(f"class_{rank}", f"probability_{rank}") for rank in ranks]
            self._csv.writerow(["file", *itertools.chain(*pairs)])

    def row(self, name: str, best: list[tuple[str, float]]) -> None:
        if self._form == "table":
            shown = [f"{label:<{self._class_width}} {p:>6.1%}" for label, p in best]
            print(f"{name:<{self._file_width}}  {'   '.join(shown)}")
        elif self._form == "csv":
            cells = [(label, f"{p:.6f}") for label, p in best]
            self._csv.writerow([name, *itertools.chain(*cells)])
        else:
            classes = [
                {"class": label, "probability": round(p, 6)} for label, p in best
            ]
            line = json.dumps({"file": name, "classes": classes}, ensure_ascii=False)
            print("[" if self._first else ",", line, sep="\n", end="")
        self._first = False

    def close(self) -> None:
        if self._form == "json":
            print("[]" if self._first else "\n]")


def predict(run: Trained, names: list[str], form: str, top: int) -> None:
    """Prints the `top` likeliest classes of each picture; see `main`."""
    classes = run.inputs.class_names
    predictor = Predictor(run, len(names))
    pictures = read_pictures(names, run.inputs.image_shape)
    writer = _Writer(form, top, names, classes)
    read = 0
    for group in _groups(pictures, predictor.batch_size):
        group = [(name, image) for name, image in group if image is not None]
        if not group:
            continue
        logits = predictor(np.stack([image for _, image in group]))
        probabilities = softmax(np.float64(logits), axis=-1)
        read += len(group)
        for (name, _), row in zip(group, probabilities, strict=True):
            best = np.argsort(-row, kind="stable")[:top]
            writer.row(name, [(classes[label], float(row[label])) for label in best])
        sys.stdout.flush()
    writer.close()
    require_all_read(read, len(names))


def main(argv: list[str], build: Build = build_network) -> None:
    """Prints the likeliest classes of pictures. `build` as for `trained.load`."""

    def define(values: flags.FlagValues) -> None:
        trained.define_flags(values)
        enum = partial(flags.DEFINE_enum, flag_values=values)
        integer = partial(flags.DEFINE_integer, flag_values=values)
        enum("format", "table", ["table", "csv", "json"], "Output format.")
        integer("top", 3, "Classes to show per picture.", lower_bound=1)

    values, arguments = command_line.parse_with_arguments(argv, __doc__, define)
    names = find_pictures(arguments)
    run = trained.load(values.workdir, values.checkpoint, build)
    top = min(values.top, len(run.inputs.class_names))
    predict(run, names, values.format, top)


if __name__ == "__main__":
    command_line.run(main)
