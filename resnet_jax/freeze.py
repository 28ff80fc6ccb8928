"""Training some layers and not others, by `optimizer.freeze`.

Each function that takes `config.optimizer` does nothing if this field is off.
"""

import contextlib
import re
from contextlib import AbstractContextManager

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resnet_jax import UserError


def is_frozen(config: ConfigDict, path: str) -> bool:
    """Whether a parameter, such as 'stage1_block1/conv1/kernel', stays as it is."""
    return bool(config.freeze) and re.search(config.freeze, path) is not None


def check(config: ConfigDict, params: dict) -> None:
    """Raises UserError where the pattern matches no parameter, or all of them."""
    if not config.freeze:
        return
    names = flatten_dict(params, sep="/")
    frozen = [is_frozen(config, name) for name in names]
    if any(frozen) and not all(frozen):
        return
    matches = "every parameter: leave some to train"
    if not any(frozen):
        matches = f"no parameter: they have names such as {min(names, key=len)}"
    raise UserError(f"config.optimizer.freeze={config.freeze!r} matches {matches}")


def stop_gradients(config: ConfigDict, params: dict) -> dict:
    """Makes frozen parameters constants, so that no gradient is computed for them."""
    if not config.freeze:
        return params

    def stop(path, leaf):
        return jax.lax.stop_gradient(leaf) if is_frozen(config, joined(path)) else leaf

    return jax.tree.map_with_path(stop, params)


def kept_statistics(config: ConfigDict) -> AbstractContextManager:
    """In this context BatchNorm with a frozen scale uses its running statistics as is.

    So a frozen layer computes the same in training as in evaluation.
    """
    if not config.freeze:
        return contextlib.nullcontext()

    def intercept(call, args, kwargs, context):
        norm = isinstance(context.module, nn.BatchNorm)
        if norm and is_frozen(config, "/".join((*context.module.path, "scale"))):
            kwargs = {**kwargs, "use_running_average": True}
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def joined(path) -> str:
    """A parameter's path as `is_frozen` takes it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
