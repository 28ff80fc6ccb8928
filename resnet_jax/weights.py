"""A network's weights and description in one safetensors file."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from configs import common
from resnet_jax import UserError, models
from resnet_jax.config import build_network
from resnet_jax.trained import Inputs, Trained

FORMAT = 1  # of a file's content; another one is not read
# Fields of `config.model` that say how a network is computed, not which one it is.
_COMPUTED = ("dtype", "scan", "remat")


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network's variables and what they belong to.

    Attributes:
      model_config: the fields of `config.model` that say which network it is.
      variables: 'params' and 'batch_stats', NumPy arrays under the unrolled names.
      inputs: what the network was trained to read; None: unknown.
    """

    model_config: dict
    variables: dict
    inputs: Inputs | None = None

    @property
    def name(self) -> str:
        """The network's version and depth, such as 'v2-56'."""
        return f"v{self.model_config['version']}-{self.model_config['depth']}"

    @property
    def num_classes(self) -> int:
        """The length of the logits."""
        return len(self.variables["params"]["classifier"]["bias"])

    @property
    def channels(self) -> int:
        """The channels of an image."""
        return self.variables["params"]["stem_conv"]["kernel"].shape[2]

    def network(self) -> models.ResNet:
        """The network, in float32 and with its blocks unrolled."""
        config = common.default()
        config.model.update(self.model_config)
        return build_network(config, self.num_classes)


class MismatchError(UserError):
    """A converted or exported network does not compute what it did before."""

    exit_status = 1


def from_run(run: Trained) -> Weights:
    """The weights of a trained network."""
    fields = run.config.model.to_dict()
    model = {name: fields[name] for name in fields if name not in _COMPUTED}
    return Weights(model, models.unstack(run.variables), run.inputs)


def flatten(variables: dict) -> dict:
    """Leaves by path, such as 'params/stage1_block1/conv1/kernel'."""
    return flatten_dict(variables, sep="/")


def from_arrays(
    model: dict, flat: dict[str, np.ndarray], where: str, inputs: Inputs | None = None
) -> Weights:
    """Makes weights from arrays by path, if they are exactly those of the network.

    Raises:
      UserError: `model` describes no network; or an array is missing, superfluous, or
        of another shape. The sentence begins with `where` and names the first.
    """
    weights = Weights(model, unflatten_dict(flat, sep="/"), inputs)
    try:
        net, channels = weights.network(), weights.channels
    except (LookupError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} does not hold a network of this package ({error}): give "
            "weights of one"
        ) from None
    shapes = flatten(models.zeros(net, (8, 8, channels)))
    name = weights.name
    for path in sorted(shapes.keys() | flat.keys()):
        if path not in flat:
            problem = f"has no {path}, which {name} needs"
        elif path not in shapes:
            problem = f"has {path}, which {name} lacks"
        elif shapes[path].shape != flat[path].shape:
            problem = (
                f"has {path} of shape {flat[path].shape}, but {name} needs "
                f"{shapes[path].shape}"
            )
        else:
            continue
        raise UserError(f"{where} {problem}: give weights of another network")
    return weights


def to_bytes(weights: Weights) -> bytes:
    """The content of a file of weights; `read` reverses it."""
    tensors = {
        name.replace("/", "."): np.ascontiguousarray(array, np.float32)
        for name, array in flatten(weights.variables).items()
    }
    described = {"format": FORMAT, "model": weights.model_config}
    if inputs := weights.inputs:
        mean, scale = inputs.normalization
        tensors |= {"normalization.mean": mean, "normalization.scale": scale}
        described["inputs"] = {
            "dataset": inputs.dataset,
            "class_names": inputs.class_names,
            "image_shape": inputs.image_shape,
        }
    # In one field: the library writes several in no fixed order.
    return safetensors.numpy.save(tensors, {"resnet_jax": json.dumps(described)})


def read(path: Path) -> Weights:
    """Reads a file with the content that `to_bytes` gives.

    Raises:
      UserError: it cannot be read, is damaged, or is another program's.
    """
    tensors, metadata = read_tensors(path)
    if "resnet_jax" not in metadata:
        raise UserError(
            f"{path} is a safetensors file from another program: give one written by "
            "`python -m resnet_jax.convert` or `export`"
        )
    try:
        described = json.loads(metadata["resnet_jax"])
        number, model = described["format"], dict(described["model"])
        inputs = described.get("inputs")
        if inputs:
            mean, scale = (
                tensors.pop(f"normalization.{name}") for name in ("mean", "scale")
            )
            inputs = Inputs(
                inputs["dataset"],
                tuple(inputs["class_names"]),
                tuple(inputs["image_shape"]),
                (mean, scale),
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): write it again"
        ) from None
    if number != FORMAT:
        raise UserError(
            f"{path} has format {number}, but this version reads {FORMAT}: use the "
            "version that wrote it"
        )
    flat = {name.replace(".", "/"): array for name, array in tensors.items()}
    return from_arrays(model, flat, str(path), inputs)


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of any safetensors file, by name, and its metadata."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    # NumPy has no such type as float8.
    except (OSError, safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): give another file"
        ) from None


def state_to_bytes(state: dict[str, np.ndarray]) -> bytes:
    """A safetensors file of arrays by any names, as PyTorch's tools read it."""
    return safetensors.numpy.save(state, {"format": "pt"})


def logits(weights: Weights, images: np.ndarray) -> np.ndarray:
    """The network's logits for float images [batch, height, width, channels]."""
    net = weights.network().clone(scan=True)  # compiles in seconds at any depth
    return np.asarray(jax.jit(net.apply)(models.stack(weights.variables), images))
