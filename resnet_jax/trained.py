"""A trained network as its run left it, for every command that uses one.

What a network takes as input (`inputs.json`: class names, image shape, normalisation)
is kept in the run's directory, so that using it needs no data set on the disk.
"""

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
from absl import flags
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from resnet_jax import (
    UserError,
    bucket,
    compilation,
    data,
    evaluator,
    models,
    parallel,
    workdir,
)
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Build, build_network, validate
from resnet_jax.metrics import best_step, read_rows

_INPUTS = "inputs.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a network was trained to read.

    Attributes:
      dataset: name of the data set, for titles.
      class_names: one per label.
      image_shape: height, width and channels.
      normalization: mean and scale, as `augment.normalize` takes them.
      network: describes the network if it is not the config's; '': it is.
    """

    dataset: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    normalization: tuple[np.ndarray, np.ndarray]
    network: str = ""


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run's network at one of its checkpoints.

    Attributes:
      directory: the run's.
      step: of the checkpoint.
      config: the run's, validated.
      inputs: what the network reads.
      net: the network, with `scan`: it compiles in seconds at any depth.
      variables: what `net.apply` takes, as NumPy arrays; `models.unstack` gives the
        blocks the names that they have in files.
      examples: how many images it was trained on.
    """

    directory: Path
    step: int
    config: ConfigDict = dataclasses.field(repr=False)
    inputs: Inputs
    net: models.ResNet = dataclasses.field(repr=False)
    variables: dict = dataclasses.field(repr=False)
    examples: int

    def logits(
        self, variables: dict, images: UInt8[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """What evaluation computes of images as they are stored, for use inside jit."""
        flip = self.config.test_time_flip
        return evaluator.logits(
            self.net, variables, images, self.inputs.normalization, flip
        )


def define_flags(values: flags.FlagValues) -> None:
    """Defines `--workdir` and `--checkpoint`, which `load` takes."""
    flags.DEFINE_string(
        "workdir", None, "Directory of a run, or gs://BUCKET/DIR.", flag_values=values
    )
    flags.DEFINE_string(
        "checkpoint",
        "latest",
        "Which checkpoint: 'latest', 'best' by validation, or a step.",
        flag_values=values,
    )


def load(
    directory: str | Path | None,
    checkpoint: str | int = "latest",
    build: Build = build_network,
) -> Trained:
    """Restores the network of a run, on the host; JAX is set up as for training it.

    Args:
      directory: the run's, as `--workdir` gave it.
      checkpoint: 'latest', 'best' by validation, or the step of one.
      build: what `train.train_and_evaluate` was given, for a run of a network that its
        config does not describe.

    Raises:
      UserError: there is no run, no such checkpoint, or one that cannot be read; the
        network is another; or the run's `inputs.json` cannot be read.
    """
    if not directory:
        raise UserError("--workdir is missing: give the directory of a run")
    if checkpoint not in ("latest", "best") and not str(checkpoint).isdecimal():
        raise UserError(
            f"--checkpoint={checkpoint}: give latest, best, or the step of one"
        )
    directory = bucket.local(directory)
    config = workdir.read_config(directory)
    validate(config)  # its file may have been edited
    parallel.split_cpu(config.batch_size, image_size=data.known_size(config.dataset))
    parallel.require_devices()
    compilation.use_compilation_cache()
    checkpoints, step, examples = _find(directory, checkpoint, config)
    inputs = read_inputs(directory)
    build = build if inputs.network else build_network
    net = build(config, len(inputs.class_names))
    require_same_network(directory, inputs.network, own_network(net, config))
    like = models.zeros(net, inputs.image_shape)
    checkpoints.require_intact(step)
    variables = checkpoints.restore(step, {"variables": like})["variables"]
    checkpoints.close()
    net, variables = net.clone(scan=True), models.stack(variables)
    return Trained(directory, step, config, inputs, net, variables, examples)


def _find(
    directory: Path, checkpoint: str | int, config: ConfigDict
) -> tuple[Checkpoints, int, int]:
    """The checkpoints, the step of the chosen one, and the run's training examples."""
    step, saved, path = None, [], directory / "checkpoints"
    if path.is_dir():
        checkpoints = Checkpoints(path, keep=None)
        newest, saved = checkpoints.newest(), checkpoints.steps()
        if checkpoint == "best":  # of those evaluated and saved
            rows = read_rows(directory)
            step = best_step([row for row in rows if row["step"] in saved])
        elif checkpoint == "latest":
            step = newest and newest[0]
        elif int(checkpoint) in saved:
            step = int(checkpoint)
    if step is not None:
        return checkpoints, step, newest[1]["examples"]
    known = checkpoint in ("latest", "best")
    name = f"{checkpoint} checkpoint" if known else f"checkpoint of step {checkpoint}"
    reason = "it has saved none yet"
    if checkpoint == "best":
        reason = "the run had no validation split"
        if config.dataset.validation_split:
            reason = "none of those it saved has been evaluated"
    elif saved:
        reason = f"give one of {', '.join(map(str, sorted(saved)))}"
    raise UserError(f"--workdir={directory} has no {name}: {reason}")


def load_data(run: Trained) -> data.Dataset:
    """The data set of a run, for what comes after training.

    Warns if the number of training images has changed.

    Raises:
      UserError: it is missing, or has other classes or another shape of images.
    """
    dataset = data.load(run.config.dataset)
    now = len(dataset.train.labels)
    if what := _differing(run.inputs, dataset):
        raise _other_data(run.directory, what)
    if run.examples != now:
        print(
            f"warning   {run.examples:,} training examples then, {now:,} now: the test "
            "split may have changed too, and contain images that were trained on",
            file=sys.stderr,
        )
    return dataset


def own_network(net: models.ResNet, config: ConfigDict) -> str:
    """Describes a network if it is not the one that its config describes; '': it is."""
    standard = build_network(config, net.num_classes)
    same = net.clone(scan=standard.scan, remat=standard.remat) == standard
    return "" if same else models.describe(net)


def require_same_network(directory: Path, before: str, now: str) -> None:
    """Refuses a network other than the run's; both as `own_network` gives them."""
    if before != now:
        raise UserError(
            f"--workdir={directory} holds a run of "
            f"{before or 'the network of its config'}, not of "
            f"{now or 'the network of its config'}: give the same `build` as before to "
            "train_and_evaluate or trained.load"
        )


def write_inputs(
    directory: Path,
    dataset: data.Dataset,
    normalization: tuple[np.ndarray, np.ndarray],
    network: str = "",
) -> None:
    """Writes a run's `inputs.json`. Raises WriteError where it cannot."""
    mean, scale = (array.tolist() for array in normalization)  # exact in JSON
    content = {
        "dataset": dataset.name,
        "class_names": dataset.class_names,
        "image_shape": dataset.image_shape,
        "normalization": {"mean": mean, "scale": scale},
        "network": network,
    }
    workdir.write(directory / _INPUTS, json.dumps(content) + "\n")


def require_same_data(
    directory: Path,
    dataset: data.Dataset,
    normalization: tuple[np.ndarray, np.ndarray],
    seen: int,
) -> None:
    """Refuses to train a run further on data other than it has seen.

    Args:
      directory: the run's.
      dataset: as it is now.
      normalization: mean and scale of its training images.
      seen: how many training examples there were.

    Raises:
      UserError: what differs, and what to do.
    """
    inputs = read_inputs(directory)
    now = len(dataset.train.labels)
    what = _differing(inputs, dataset)
    if not what and seen != now:
        what = f"{seen:,} training examples then, {now:,} now"
    if not what and not all(map(np.allclose, inputs.normalization, normalization)):
        what = "the training images now have another mean or standard deviation"
    if what:
        raise _other_data(directory, what)


def _differing(inputs: Inputs, dataset: data.Dataset) -> str:
    """Why a network cannot read a data set; '': it can."""
    if inputs.class_names != tuple(dataset.class_names):
        pairs = itertools.zip_longest(
            map(repr, inputs.class_names), map(repr, dataset.class_names)
        )
        old, new = next((old, new) for old, new in pairs if old != new)
        return f"class {old or 'none'} then, {new or 'none'} now"
    if inputs.image_shape != tuple(dataset.image_shape):
        return f"image shape {inputs.image_shape} then, {dataset.image_shape} now"
    return ""


def _other_data(directory: Path, what: str) -> UserError:
    return UserError(
        f"--workdir={directory} holds a run on other data ({what}): give the original "
        "data, or another --workdir"
    )


def read_inputs(directory: Path) -> Inputs:
    """What the network of a run reads.

    Raises:
      UserError: the file is damaged or not there.
    """
    path = directory / _INPUTS
    try:
        content = json.loads(path.read_text())
        mean, scale = (content["normalization"][name] for name in ("mean", "scale"))
        height, width, channels = map(int, content["image_shape"])
        return Inputs(
            str(content["dataset"]),
            tuple(map(str, content["class_names"])),
            (height, width, channels),
            (np.asarray(mean, np.float32), np.asarray(scale, np.float32)),
            str(content["network"]),
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): restore it"
        ) from None
