"""Weights that the Keras example cifar10_resnet.py saved, as .h5 or .keras."""

import io
import os
import re
import zipfile
from pathlib import Path

import numpy as np

from configs import common
from resnet_jax import UserError, models, weights
from resnet_jax.config import build_network
from resnet_jax.weights import Weights

SUFFIXES = (".h5", ".hdf5", ".keras")

# In the order in which Keras keeps a layer's arrays.
_LEAVES = {
    "conv": ("params/{}/kernel", "params/{}/bias"),
    "bn": (
        "params/{}/scale",
        "params/{}/bias",
        "batch_stats/{}/mean",
        "batch_stats/{}/var",
    ),
}


def read(path: Path) -> Weights:
    """Reads the weights, and which network of the example they belong to.

    Raises:
      UserError: the file cannot be read or is another network's, or h5py is missing.
    """
    layers = _layers(path)
    convs = [arrays for arrays in layers if arrays[0].ndim == 4]
    norms = [arrays for arrays in layers if len(arrays) == 4]
    dense = [arrays for arrays in layers if arrays[0].ndim == 2]
    biased = all(len(arrays) == 2 for arrays in (*convs, *dense))
    if len(convs) < 3 or len(dense) != 1 or not biased:
        raise UserError(
            f"{path} has {len(convs)} convolutions and {len(dense)} dense layers"
            f"{'' if biased else ', not all with a bias'}, unlike any network of the "
            "Keras example: give a model that it saved"
        )
    version = 1 if convs[1][0].shape[:2] == (3, 3) else 2
    model = {
        "version": version,
        # Besides the stem's and the branches' there are projections in 2 or 3 stages,
        # and depth counts the classifier.
        "depth": len(convs) - version,
        "variant": "keras",
        "width": convs[0][0].shape[-1],
    }
    flat = {
        f"params/classifier/{name}": array
        for name, array in zip(("kernel", "bias"), dense[0], strict=True)
    }
    try:
        order = _creation_order(model)
    except ValueError as error:
        raise UserError(
            f"{path} is not a network of the Keras example ({error}): give a model "
            "that it saved"
        ) from None
    for kind, stored in (("conv", convs), ("bn", norms)):
        names = [name for name in order if kind in name.rpartition("/")[2]]
        for name, arrays in zip(names, stored, strict=False):
            for leaf, array in zip(_LEAVES[kind], arrays, strict=True):
                flat[leaf.format(name)] = array
        if len(names) != len(stored):
            raise UserError(
                f"{path} has {len(stored)} layers of type {kind!r}, but version "
                f"{version} of the Keras example with {model['depth']} layers has "
                f"{len(names)}: give a model that it saved"
            )
    return weights.from_arrays(model, flat, str(path))


def _creation_order(model: dict) -> list[str]:
    """Paths of convolutions and BatchNorms, in the order of the example's code.

    A block's projection comes after its branch.
    """
    config = common.default()
    config.model.update(model)
    net = build_network(config, 10)
    shapes = models.zeros(net, (8, 8, 3))["params"]
    names = {path.rpartition("/")[0] for path in weights.flatten(shapes)}

    def place(name: str):
        numbers = [int(number) for number in re.findall(r"\d+", name)[:2]]
        return name.startswith("final"), numbers if "stage" in name else [], name

    return sorted(names, key=place)


def _layers(path: Path) -> list[list[np.ndarray]]:
    """The arrays of each layer that has any, in the order of the layers' numbers."""
    try:
        import h5py
    except ImportError:
        raise UserError(
            f"{path} needs h5py, which is not installed: pip install h5py"
        ) from None
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                content = io.BytesIO(archive.read("model.weights.h5"))
        else:
            content = path
        with h5py.File(content) as file:
            layers = _new_layers(file) or _old_layers(file.get("model_weights", file))
    # The last three come from other HDF5 files, whose groups may hold anything.
    except (
        OSError,
        KeyError,
        zipfile.BadZipFile,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path} cannot be read as a Keras model ({error}): give a .h5 or "
            ".keras file that Keras saved"
        ) from None

    def number(layer) -> int:
        return int((re.findall(r"_(\d+)$", layer[0]) or ["0"])[0])

    return [arrays for _, arrays in sorted(layers, key=number) if arrays]


def _new_layers(file) -> list[tuple[str, list[np.ndarray]]]:
    """Reads Keras 3's own format: layers/PLACE/vars/NUMBER, with the layer's name."""
    layers = []
    for group in file.get("layers", {}).values():
        arrays = group["vars"]
        ordered = sorted(arrays, key=int)
        layers.append((arrays.attrs["name"], [arrays[n][()] for n in ordered]))
    return layers


def _old_layers(file) -> list[tuple[str, list[np.ndarray]]]:
    """Reads the older format: NAME/..., with lists of names as attributes."""
    return [
        (name, [file[name][weight][()] for weight in file[name].attrs["weight_names"]])
        for name in map(_text, file.attrs["layer_names"])
    ]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def load_model(path: Path):
    """Loads a saved model with Keras itself, without its softmax.

    Raises:
      ImportError: Keras is not installed.
      ValueError: the file holds weights alone, or Keras cannot open it.
    """
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    model = keras.saving.load_model(path, compile=False)
    model.layers[-1].activation = keras.activations.linear  # instead of softmax
    return model
