"""Trained networks for experiments that look inside: ordinary runs, each made once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common
from experiments.curves import run_directory
from resnet_jax import data, models, train, trained, workdir
from resnet_jax.augment import normalization, normalize


class Subject(NamedTuple):
    """A trained network, and the normalised examples that it is reported on."""

    summary: dict
    net: models.ResNet
    variables: dict  # unrolled names
    images: jax.Array  # float32 [examples, height, width, channels]
    labels: np.ndarray

    @property
    def made_by(self) -> dict:
        """For `Study.cell`, since the run may have been made before."""
        names = ("device", "versions", "git_commit")
        return {"made_by": {name: self.summary[name] for name in names}}


def run_config(
    scale: str,
    depth: int,
    residual: bool,
    epochs: int = 20,
    width: int = 0,
) -> dict:
    """The config, as JSON holds it, of version 1 with or without shortcuts.

    'full' is He's recipe on CIFAR-10, 'smoke' `epochs` epochs of the digits, with
    `width` channels at first (0: 16), at a rate at which both kinds learn.
    """
    recipe = "smoke" if scale == "smoke" else "paper"
    settings = common.get_config(recipe, 1, depth, residual=residual, scan=True)
    if recipe == "smoke":
        settings.epochs = settings.checkpoint.every = settings.eval_every = epochs
        settings.model.width = width
        settings.optimizer.learning_rate = 0.02
        settings.schedule.warmup_epochs = epochs / 10
    return workdir.as_json(settings)


def subject(settings: dict) -> Subject:
    """Trains as a config says, once: experiments with equal configs share the run.

    The run is in runs/experiments.
    """
    directory, settings = run_directory(settings), ConfigDict(settings)
    summary = train.train_and_evaluate(settings, directory)
    run = trained.load(directory)
    test = trained.load_data(run).eval
    images = normalize(jnp.asarray(test.images), *run.inputs.normalization)
    net, variables = run.net.clone(scan=False), models.unstack(run.variables)
    return Subject(summary, net, variables, images, test.labels)


def training_examples(settings: dict, count: int) -> tuple[jax.Array, np.ndarray]:
    """The first training examples of a config: normalised images, and labels."""
    settings = ConfigDict(settings)
    train = data.load(settings.dataset).train
    scaling = normalization(settings.augment, train.images)
    images = normalize(jnp.asarray(train.images[:count]), *scaling)
    return images, train.labels[:count]
