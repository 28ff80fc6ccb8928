"""Trained networks for experiments that look inside: ordinary runs, each made once."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments.curves import run_directory
from resnet_jax import config, data, models, train
from resnet_jax.augment import normalize, statistics
from resnet_jax.checkpoint import Checkpoints


class Trained(NamedTuple):
    """A trained network, and the normalised examples that it is reported on."""

    summary: dict
    net: models.ResNet
    variables: dict  # unrolled names
    images: jax.Array  # float32 [examples, height, width, channels]
    labels: np.ndarray

    @property
    def made_by(self) -> dict:
        """For `Study.cell`: what trained it, perhaps before."""
        names = ("device", "versions", "git_commit")
        return {"made_by": {name: self.summary[name] for name in names}}


def training(
    scale: str,
    depth: int,
    residual: bool,
    seed: int,
    epochs: int = 20,
    width: int = 0,
) -> dict:
    """The config, as JSON holds it, of version 1 with or without shortcuts.

    'full' is He's recipe on CIFAR-10, 'smoke' so many epochs of the digits, `width`
    channels wide at first (0: 16), at a rate at which both kinds learn.
    """
    recipe = "smoke" if scale == "smoke" else "paper"
    settings = common.get_config(recipe, 1, depth, residual=residual, scan=True)
    settings.seed = seed
    if recipe == "smoke":
        settings.epochs = settings.checkpoint.every = settings.eval_every = epochs
        settings.model.width = width
        settings.optimizer.learning_rate = 0.02
        settings.schedule.warmup_epochs = epochs / 10
    return json.loads(settings.to_json())


def trained(settings: dict) -> Trained:
    """Trains as a config says, once: experiments with equal configs share the run.

    The run is in runs/experiments.
    """
    directory, settings = run_directory(settings), ConfigDict(settings)
    summary = train.train_and_evaluate(settings, directory)
    dataset = data.load(settings.dataset)
    net = config.build_network(settings, dataset.num_classes).clone(scan=False)
    checkpoints = Checkpoints(directory / "checkpoints", keep=None)
    shapes = {"variables": models.variable_shapes(net, dataset.image_shape)}
    trees = checkpoints.restore(checkpoints.saved_step, shapes)
    checkpoints.close()
    scaling = statistics(settings.augment.normalization, dataset.train.images)
    images = normalize(jnp.asarray(dataset.eval.images), *scaling)
    return Trained(summary, net, trees["variables"], images, dataset.eval.labels)


def training_examples(settings: dict, count: int) -> tuple[jax.Array, np.ndarray]:
    """The first training examples of a config: normalised images, and labels."""
    settings = ConfigDict(settings)
    train = data.load(settings.dataset).train
    scaling = statistics(settings.augment.normalization, train.images)
    images = normalize(jnp.asarray(train.images[:count]), *scaling)
    return images, train.labels[:count]
