"""Training some layers and not others: `optimizer.freeze`, `optimizer.backbone_factor`.

Each function takes `config.optimizer` and does nothing where these fields are off.
"""

import contextlib
import re
from contextlib import AbstractContextManager

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resnet_jax import UserError


def is_frozen(config: ConfigDict, path: str) -> bool:
    """Whether a parameter, such as 'stage1_block1/conv1/kernel', stays as it is."""
    return bool(config.freeze) and re.search(config.freeze, path) is not None


def check(config: ConfigDict, params: dict) -> None:
    """Raises UserError where the pattern fits none of the parameters, or all."""
    if not config.freeze:
        return
    names = flatten_dict(params, sep="/")
    frozen = [is_frozen(config, name) for name in names]
    if any(frozen) and not all(frozen):
        return
    fits = "every parameter: leave some to train"
    if not any(frozen):
        fits = f"no parameter: they have names such as {min(names, key=len)}"
    raise UserError(f"config.optimizer.freeze={config.freeze!r} fits {fits}")


def stop_gradients(config: ConfigDict, params: dict) -> dict:
    """Frozen parameters as constants: nothing is computed to change them."""
    if not config.freeze:
        return params
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jax.lax.stop_gradient(leaf) if is_frozen(config, _name(path)) else leaf
        ),
        params,
    )


def kept_statistics(config: ConfigDict) -> AbstractContextManager:
    """Within, BatchNorm whose scale is frozen uses its running statistics, unchanged.

    So a frozen layer computes in training what it does in evaluation.
    """
    if not config.freeze:
        return contextlib.nullcontext()

    def intercept(call, args, kwargs, context):
        norm = isinstance(context.module, nn.BatchNorm)
        if norm and is_frozen(config, "/".join((*context.module.path, "scale"))):
            kwargs = {**kwargs, "use_running_average": True}
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def scale_updates(config: ConfigDict) -> list[optax.GradientTransformation]:
    """The last transformations of the chain: zero updates for frozen parameters, scaled
    ones for the backbone.
    """
    if not config.freeze and config.backbone_factor == 1:
        return []

    def scale(path, update):
        if is_frozen(config, _name(path)):
            return jnp.full_like(update, -0.0)  # adding it keeps every bit
        if path[0].key == "classifier":
            return update
        return config.backbone_factor * update

    return [
        optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)
        )
    ]


def _name(path) -> str:
    return "/".join(part.key for part in path)
