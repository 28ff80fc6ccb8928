"""The contenders of `experiments.benchmark`: one class each, of the same form.

    peer = Peer(task, **settings)   builds the network and reads the initial weights
    peer.first_step()              one update, its compilation included
    peer.in_memory()               an epoch's updates, on batches that are ready
    peer.epoch()                   an epoch's updates, with its own input pipeline
    peer.evaluate()                accuracy on the evaluation images
    peer.logits()                  of the first of them, with the initial weights
    peer.peak_memory()             bytes, on the GPU if there is one (Keras: host)

They return when the work is done. This module imports nothing large, so that a
contender's start-up time is that of its own imports.
"""

import dataclasses
import importlib.util
import json
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resnet_jax import UserError

PROBES = 8  # no more than the smallest batch


class Contender(NamedTuple):
    """Where a contender's class is, and what it requires.

    Attributes:
      title: its name in figures.
      place: module in this package, and class.
      settings: arguments of the class.
      packages: that must be installed.
    """

    title: str
    place: tuple[str, str]
    settings: dict
    packages: tuple[str, ...] = ()


def _torch(title: str, **settings) -> Contender:
    return Contender(title, ("torch_peer", "Torch"), settings, ("torch",))


def _keras(title: str, backend: str, *packages: str) -> Contender:
    settings = {"backend": backend}
    return Contender(title, ("keras_peer", "Keras"), settings, ("keras", *packages))


_LAST, _LAST_BF16 = "channels last", "channels last, bfloat16"
CONTENDERS = {
    "ours": Contender("ours", ("ours", "Ours"), {}),
    "ours_bf16": Contender("ours, bfloat16", ("ours", "Ours"), {"dtype": "bfloat16"}),
    "plain": Contender("plain Flax loop", ("plain", "Plain"), {}),
    "torch": _torch("PyTorch eager"),
    "torch_channels_last": _torch(f"PyTorch eager,\n{_LAST}", channels_last=True),
    "torch_bf16": _torch(
        f"PyTorch eager,\n{_LAST_BF16}", channels_last=True, bf16=True
    ),
    "torch_compile": _torch(
        f"PyTorch compiled,\n{_LAST}", channels_last=True, compiled=True
    ),
    "torch_compile_bf16": _torch(
        f"PyTorch compiled,\n{_LAST_BF16}",
        channels_last=True,
        bf16=True,
        compiled=True,
    ),
    "keras_tensorflow": _keras("Keras on TensorFlow", "tensorflow", "tensorflow"),
    "keras_jax": _keras("Keras on JAX", "jax", "tensorflow"),
    "keras_torch": _keras("Keras on PyTorch", "torch", "torch"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What all contenders of a comparison are given.

    Attributes:
      directory: where `prepare` has written it.
      config: ours, as JSON holds it.
      arrays: uint8 `train_images` and `eval_images` [images, height, width, channels],
        int32 `train_labels` and `eval_labels`, float32 `mean` of the pixels, and what
        they are divided by, `scale`, if it is not 1.
    """

    directory: Path
    config: dict
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, directory: Path) -> "Task":
        config = json.loads((directory / "config.json").read_text())
        return cls(directory, config, dict(np.load(directory / "data.npz")))

    @property
    def version(self) -> int:
        return self.config["model"]["version"]

    @property
    def depth(self) -> int:
        return self.config["model"]["depth"]

    @property
    def batch_size(self) -> int:
        return self.config["batch_size"]

    def images(self, split: str) -> np.ndarray:
        """float32 [images, height, width, channels], normalised."""
        images = self.arrays[f"{split}_images"].astype(np.float32) / 255 - self.mean
        return images / self.arrays["scale"] if "scale" in self.arrays else images

    def labels(self, split: str) -> np.ndarray:
        return self.arrays[f"{split}_labels"]

    @property
    def mean(self) -> np.ndarray:
        return self.arrays["mean"]

    def weights(self, naming: str) -> dict[str, np.ndarray]:
        """The initial weights, under the names of 'ours' or of 'torch'."""
        return dict(np.load(self.directory / f"{naming}.npz"))


def require(*packages: str) -> None:
    """Raises UserError if one of the packages is not installed."""
    for package in packages:
        if not importlib.util.find_spec(package):
            raise UserError(
                f"{package} is not installed, but the comparison needs it: run pip "
                "install -r requirements-bench.txt"
            )


def process_memory() -> int:
    """The most bytes that this process has held so far, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
