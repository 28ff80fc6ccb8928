"""BatchNorm statistics for averaged weights (`optimizer.ema`)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resnet_jax import data, freeze, models
from resnet_jax.augment import normalize
from resnet_jax.plan import Plan
from resnet_jax.step import epoch_order

# Batches whose BatchNorm statistics are averaged.
_STATISTICS_BATCHES = 50


def other_statistics(net: models.ResNet, image_shape: tuple[int, int, int]) -> str:
    """A module that keeps statistics other than the network's BatchNorms do; '': none.

    Only those of a known momentum can be found for other params.
    """
    if not (net.norm_class or net.block_class):
        return ""
    net, known = net.clone(scan=False), set()

    def note(method, args, kwargs, context):
        module = context.module
        own = isinstance(module, nn.BatchNorm) and not net.norm_class
        if own and module.momentum == net.norm_momentum:
            known.add(module.path)
        return method(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    with nn.intercept_methods(note):
        shapes = jax.eval_shape(net.init, jax.random.key(0), images)
    for path in flatten_dict(shapes.get("batch_stats", {})):
        if path[:-1] not in known:
            return "/".join(path[:-1])
    return ""


def make_statistics_call(
    net: models.ResNet,
    plan: Plan,
    config: ConfigDict,
    normalization: tuple[np.ndarray, np.ndarray],
    axis_name: str | None,
) -> Callable:
    """Builds `statistics_call(params, batch_stats, split, positions, seed)`.

    It returns the BatchNorm statistics that averaged params need, over plain training
    images. Neither the statistics of the steps' own params (`batch_stats`) nor their
    mean fits (Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
    """
    net = net.clone(stochastic_depth=0.0)
    momentum = net.norm_momentum
    batches = min(_STATISTICS_BATCHES, plan.examples // plan.batch_size)

    def statistics_call(params, batch_stats, split: data.Split, positions, seed):
        order = epoch_order(seed, 0, plan.examples)

        def add(number, total):
            chosen = order[number * plan.batch_size + positions]
            with freeze.kept_statistics(config.optimizer):
                _, changed = net.apply(
                    {"params": params, "batch_stats": batch_stats},
                    normalize(split.images[chosen], *normalization),
                    train=True,
                    mutable=["batch_stats"],
                    rngs={"dropout": jax.random.key(0)},
                )
            # `new` is momentum * old + (1 - momentum) * the batch's own statistics.
            return jax.tree.map(
                lambda total, old, new: (
                    total + (new - momentum * old) / (1 - momentum) / batches
                ),
                total,
                batch_stats,
                changed["batch_stats"],
            )

        zeros = jax.tree.map(jnp.zeros_like, batch_stats)
        found = jax.lax.fori_loop(0, batches, add, zeros)
        return jax.lax.pmean(found, axis_name) if axis_name else found

    return statistics_call
