"""Converts weights from one format to another, and compares the logits.

python -m resnet_jax.convert --source=resnet20.th --out=resnet20.safetensors
python -m resnet_jax.convert --source=cifar10_ResNet20v1.h5 --out=keras20.safetensors
python -m resnet_jax.convert --workdir=runs/v1_20/seed0 --out=resnet20.pt

Reads a run, a `torch.save` or safetensors file with the names of
akamaster/pytorch_resnet_cifar10 or of chenyaofo/pytorch-cifar-models and torchvision, a
model that the Keras example saved, and its own safetensors; writes all but Keras's.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from resnet_jax import (
    UserError,
    command_line,
    cost,
    expanded,
    keras_example,
    models,
    one_line,
    parallel,
    pytorch,
    trained,
    weights,
    workdir,
)
from resnet_jax.weights import Weights

TOLERANCE = 1e-4  # of a logit, relative to the largest if that is above 1


class Peer(NamedTuple):
    """Another program that can compute a network's logits."""

    name: str
    logits: Callable[[np.ndarray], np.ndarray]  # of [batch, height, width, channels]
    image_shape: tuple[int, int, int] | None = None  # None: any


def read(path: Path) -> tuple[Weights, list[Peer]]:
    """Reads weights of any format, and finds what else can compute their logits.

    Raises:
      UserError: the file is missing, or in none of the formats that are read.
    """
    if path.is_dir():
        raise UserError(f"--source={path} is a directory: give a run as --workdir")
    if not path.is_file():
        raise UserError(f"--source={path}: there is no such file: give another")
    if path.suffix in keras_example.SUFFIXES:
        loaded = keras_example.read(path)
        try:
            model = keras_example.load_model(path)
        except (ImportError, TypeError, ValueError, OSError) as error:
            cause = one_line(error)
            print(f"skipped   comparison with Keras ({cause})")
            return loaded, []
        shape = model.input_shape[1:]
        return loaded, [Peer("Keras", lambda x: np.asarray(model(x)), shape)]
    if path.suffix in pytorch.SUFFIXES:
        state = pytorch.read(path)
    elif path.suffix == ".safetensors":
        state, metadata = weights.read_tensors(path)
        if "resnet_jax" in metadata:
            return weights.read(path), []
        state = {name: np.float32(array) for name, array in state.items()}
    else:
        known = (".safetensors", *pytorch.SUFFIXES, *keras_example.SUFFIXES)
        raise UserError(
            f"--source={path}: the ending {path.suffix!r} is not supported: give a "
            f"file ending in {', '.join(known)}"
        )
    loaded = pytorch.from_state(state, str(path))
    return loaded, _torch_peers(state)


def _torch_peers(state: dict[str, np.ndarray]) -> list[Peer]:
    if importlib.util.find_spec("torch") is None:
        print("skipped   comparison with PyTorch (it is not installed)")
        return []
    return [Peer("PyTorch", lambda images: pytorch.logits(state, images))]


def encode(loaded: Weights, out: Path, naming: str | None) -> tuple[bytes, list[Peer]]:
    """The content of `out`, and what else can compute its logits.

    Args:
      loaded: the weights to encode.
      out: the file, whose ending determines the format.
      naming: 'resnet_jax' or one of `pytorch.NAMINGS`; None: as suits the network.

    Raises:
      UserError: the ending is unknown, or the network has no such form.
    """
    torch_file = out.suffix in pytorch.SUFFIXES
    if not torch_file and out.suffix != ".safetensors":
        raise UserError(
            f"--out={out}: the ending {out.suffix!r} is not supported: end it in "
            f".safetensors or {', '.join(pytorch.SUFFIXES)}"
        )
    if not naming and torch_file:
        naming = "akamaster" if loaded.network().shortcut == "A" else "chenyaofo"
    if naming in (None, "resnet_jax"):
        if torch_file:
            raise UserError(
                f"--naming=resnet_jax goes with .safetensors: give --out={out.stem}"
                ".safetensors"
            )
        return weights.to_bytes(loaded), []
    state = pytorch.to_state(loaded, naming)
    content = (
        pytorch.to_bytes(state, out) if torch_file else weights.state_to_bytes(state)
    )
    return content, _torch_peers(state)


def compare(loaded: Weights, peers: list[Peer]) -> None:
    """Prints how far our logits are from others'.

    Raises:
      MismatchError: further than `TOLERANCE`.
    """
    usual = loaded.inputs.image_shape if loaded.inputs else (32, 32, loaded.channels)
    for peer in peers:
        shape = (8, *(peer.image_shape or usual))
        images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        ours, theirs = weights.logits(loaded, images), peer.logits(images)
        difference, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
        outcome = (
            f"with {peer.name}: logits of 8 random images differ by at most "
            f"{difference:.1e}; the largest is {largest:.3g}"
        )
        if not difference <= TOLERANCE * max(1, largest):
            raise weights.MismatchError(
                f"{outcome}: nothing was written; please report this"
            )
        print(f"compared  {outcome}")


def main(argv: list[str]) -> None:
    """Converts the weights of a run or a file."""

    def define(values: flags.FlagValues) -> None:
        trained.define_flags(values)
        string = partial(flags.DEFINE_string, flag_values=values)
        enum = partial(flags.DEFINE_enum, flag_values=values)
        string("source", None, "Weights file, instead of --workdir.")
        string("out", None, "File to write: .safetensors, .pt, .pth or .th.")
        enum(
            "naming",
            None,
            ["resnet_jax", *pytorch.NAMINGS],
            "Names of the weights. (default: resnet_jax in safetensors, else akamaster "
            "for shortcuts A and chenyaofo for B)",
        )

    values = command_line.parse(argv, __doc__, define)
    if bool(values.source) == bool(values.workdir):
        raise UserError("give either --workdir=DIR of a run or --source=FILE")
    if not values.out:
        raise UserError("--out is missing: give the file to write")
    out = Path(values.out)
    if values.source:
        parallel.add_cpu()
        parallel.require_devices()
        origin = values.source
        loaded, readers = read(expanded(origin, "--source"))
    else:
        origin = values.workdir
        loaded = weights.from_run(trained.load(origin, values.checkpoint))
        readers = []
    net = loaded.network()
    count = cost.count_parameters(loaded.variables["params"])
    print(
        f"read      {origin}: {loaded.name}, {models.describe(net)}; "
        f"{loaded.num_classes} classes; {count:,} parameters"
    )
    content, writers = encode(loaded, out, values.naming)
    compare(loaded, readers + writers)
    workdir.make(out.parent)
    workdir.write(out, content, "give another --out=FILE")
    print(f"written   {out}: {len(content):,} bytes")


if __name__ == "__main__":
    command_line.run(main)
