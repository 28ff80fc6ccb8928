"""A new run that starts from the weights of another: `config.init_from`."""

import numpy as np
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from resnet_jax import UserError, expanded, keras_example, pytorch, trained, weights
from resnet_jax.config import Build, build_network
from resnet_jax.step import TrainState
from resnet_jax.weights import Weights


def begin_with(
    old_run: Weights,
    init_from: str,
    state: TrainState,
    class_names: tuple[str, ...],
    model: ConfigDict,
    scale: np.ndarray,
    trains: bool = True,
) -> tuple[TrainState, str]:
    """Puts the weights of `config.init_from` into the state of step 0.

    The classifier stays new if the classes differ: in name, or in number if the file
    does not name them.

    Args:
      old_run: what `read` returned.
      init_from: where it was read from.
      state: as `Trainer.new_state` returns it.
      class_names: of the new run.
      model: the new run's `config.model`.
      scale: the divisor of its images. Prints a warning if the old run's was quite
        different, where the weights have it.
      trains: whether the new run makes any update.

    Returns:
      The state, and a sentence about what was taken.

    Raises:
      UserError: it is of another network or, where nothing is trained, of other
        classes.
    """
    # Shapes do not show whether there are shortcuts.
    if old_run.model_config.get("residual", True) != model.residual:
        raise UserError(
            f"config.init_from={init_from} holds a network "
            f"{'without' if model.residual else 'with'} shortcuts: set "
            f"config.model.residual to {not model.residual}"
        )
    if old_run.inputs:
        theirs, ours = np.mean(old_run.inputs.normalization[1]), np.mean(scale)
        if not 0.5 < theirs / ours < 2:
            print(
                f"warning   {init_from} expects images divided by {theirs:.2g}, but "
                f"this run divides by {ours:.2g}: give the augment.normalization of "
                "that run"
            )
        same = old_run.inputs.class_names == class_names
    else:
        same = old_run.num_classes == len(class_names)
    if not same and not trains:
        raise UserError(
            f"config.init_from={init_from} has other classes than the data, and "
            "config.epochs=0 trains no classifier for these: give data with its "
            "classes, or more epochs"
        )
    old, new = weights.flatten(old_run.variables), weights.flatten(state.variables)
    taken = {}
    for path in sorted(old.keys() | new.keys()):
        if path.startswith("params/classifier/") and not same:
            taken[path] = new[path]
            continue
        shapes = [np.shape(tree[path]) if path in tree else None for tree in (old, new)]
        if shapes[0] != shapes[1]:
            theirs, ours = (shape or "none" for shape in shapes)
            raise UserError(
                f"config.init_from={init_from} holds another network "
                f"({old_run.name}) than config.model (v{model.version}-{model.depth}): "
                f"{path} has shape {theirs} there and {ours} here: give the weights of "
                "this network, or set config.model to match"
            )
        taken[path] = old[path]
    head = (
        "its classifier" if same else f"a new classifier of {len(class_names)} classes"
    )
    begun = state.replace(**unflatten_dict(taken, sep="/"))
    if state.ema:
        begun = begun.replace(ema=begun.trained)
    return begun, f"{init_from}, with {head}"


def read(init_from: str, build: Build = build_network) -> Weights:
    """Reads the weights of a run's directory, or of a file that `weights.read` reads.

    `build` builds the run's network if that was a custom one.

    Raises:
      UserError: there are none that can be read.
    """
    path = expanded(init_from, "config.init_from")
    if path.is_dir() or "://" in init_from:
        try:
            return weights.from_run(trained.load(init_from, build=build))
        except UserError as error:
            sentence = str(error).replace("--workdir=", "config.init_from=")
            raise UserError(sentence) from None
    if not path.exists():
        raise UserError(
            f"config.init_from={init_from}: there is no such file or directory: give a "
            "run's directory or a .safetensors file"
        )
    if path.suffix in (*pytorch.SUFFIXES, *keras_example.SUFFIXES):
        raise UserError(
            f"config.init_from={init_from} must be converted first: python -m "
            f"resnet_jax.convert --source={init_from} --out={path.stem}.safetensors"
        )
    try:
        return weights.read(path)
    except UserError as error:
        raise UserError(f"config.init_from={error}") from None
