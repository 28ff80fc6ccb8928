"""The optimizer and its learning-rate schedule, from the config, with Optax."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax import freeze, stacking


def _by_path(change: Callable) -> optax.GradientTransformation:
    """Turns each update into `change(path, update, param)`."""
    return optax.stateless(partial(jax.tree.map_with_path, change))


def _sgd(config: ConfigDict) -> optax.GradientTransformation:
    return optax.trace(config.momentum, nesterov=config.nesterov)


def _adam(config: ConfigDict) -> optax.GradientTransformation:
    return optax.scale_by_adam(eps=config.epsilon, nesterov=config.nesterov)


def _rmsprop(config: ConfigDict) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_rms(decay=0.9, eps=config.epsilon),
        optax.trace(config.momentum, nesterov=config.nesterov),
    )


def _lars(config: ConfigDict) -> optax.GradientTransformation:
    return optax.chain(
        _trust_ratio(0.001), optax.trace(config.momentum, nesterov=config.nesterov)
    )


def _trust_ratio(coefficient: float) -> optax.GradientTransformation:
    """Scales each kernel's update to the kernel's norm (You et al. 2017, 1708.03888).

    As `optax.scale_by_trust_ratio`, but each of the blocks that `model.scan` stacks in
    one array has its own norms. Biases and BatchNorm are left as they are.
    """

    def scale(path, update, param):
        if path[-1].key != "kernel":
            return update
        axes = tuple(range(_is_stacked(path), update.ndim))
        norm, change = (
            jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (param, update)
        )
        nonzero = (norm > 0) & (change > 0)
        return update * jnp.where(nonzero, coefficient * norm / change, 1)

    return _by_path(scale)


def _is_stacked(path) -> bool:
    """Whether `model.scan` stacks blocks along the first axis of a parameter."""
    return any(stacking.is_stack(part.key) for part in path)


OPTIMIZERS = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adam,
    "rmsprop": _rmsprop,
    "adagrad": lambda _: optax.scale_by_rss(),
    "adadelta": lambda _: optax.scale_by_adadelta(),
    "lars": _lars,
    "lion": lambda _: optax.scale_by_lion(),
}


def _mask(decay_on: str):
    """Tells which parameters decay; see `optimizer.decay_on` in configs/common.py."""

    def chosen(path, leaf) -> bool:
        if decay_on == "all":
            return True
        kernel = path[-1].key == "kernel"
        convolution = leaf.ndim - _is_stacked(path) == 4
        return kernel and (decay_on == "kernels" or convolution)

    return lambda params: jax.tree.map_with_path(chosen, params)


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Chains clipping, weight decay, the optimizer and the schedule.

    Args:
      config: `config.optimizer`.
      learning_rate: maps the number of updates done to the next one's rate.
    """
    decay = _weight_decay(config)
    # These two are defined with decoupled decay.
    decoupled = config.decay == "decoupled" or config.name in ("adamw", "lion")
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay and not decoupled:
        steps.append(decay)
    steps.append(OPTIMIZERS[config.name](config))
    if config.weight_decay and decoupled:
        steps.append(decay)
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if config.bn_bias_factor != 1:
        steps.append(_scale_bn_biases(config.bn_bias_factor))
    if config.freeze or config.backbone_factor != 1:
        steps.append(_scale_layers(config))
    return optax.chain(*steps)


def _is_bn_bias(path) -> bool:
    return len(path) > 1 and path[-1].key == "bias" and "bn" in path[-2].key


def _scale_bn_biases(factor: float) -> optax.GradientTransformation:
    """Scales BatchNorm biases' rate (Jordan 2024, arXiv 2404.00498, appendix)."""
    return _by_path(
        lambda path, update, _: factor * update if _is_bn_bias(path) else update
    )


def _scale_layers(config: ConfigDict) -> optax.GradientTransformation:
    """Zero updates for frozen parameters, scaled ones for the backbone."""

    def scale(path, update, _):
        if freeze.is_frozen(config, freeze.joined(path)):
            return jnp.full_like(update, -0.0)  # adding it changes no bit
        if path[0].key == "classifier":
            return update
        return config.backbone_factor * update

    return _by_path(scale)


def _weight_decay(config: ConfigDict) -> optax.GradientTransformation:
    """Adds each parameter's decay, which `bn_bias_factor` must not change.

    As in Jordan's code, the decay of BatchNorm's biases is divided by that factor (if
    it is 0, they have no decay, and stay as they are).
    """
    factor = config.bn_bias_factor

    def add(path, update, param):
        rate = config.weight_decay
        if _is_bn_bias(path):
            rate = rate / factor if factor else 0.0
        return update + rate * param

    return optax.masked(_by_path(add), _mask(config.decay_on))


def peak_rate(config: ConfigDict) -> float:
    """The learning rate that the schedule scales, from the whole config.

    With `optimizer.linear_rate_batch` it is proportional to the batch size: the linear
    scaling rule of Goyal et al. 2017, arXiv 1706.02677, section 2.1.
    """
    rate, batch = config.optimizer.learning_rate, config.optimizer.linear_rate_batch
    return rate * config.batch_size / batch if batch else rate


def schedule(
    config: ConfigDict, peak: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate of each update.

    Args:
      config: `config.schedule`.
      peak: the learning rate itself, which the schedule scales.
      total_steps: updates in the whole run.
      steps_per_epoch: updates in an epoch, not an integer if the batch size does not
        divide the training set.
    """
    if config.name == "onecycle":
        return optax.cosine_onecycle_schedule(max(total_steps, 1), peak)
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    # `main` counts from the end of the warm-up.
    if config.name == "cosine":
        main = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1))
    elif config.name == "step":
        rates = [peak, *(peak * factor for factor in config.factors)]
        ends = [round(fraction * total_steps) for fraction in config.boundaries]
        main = optax.join_schedules(
            [optax.constant_schedule(rate) for rate in rates],
            [end - warmup_steps for end in ends],
        )
    elif config.name == "constant":
        main = optax.constant_schedule(peak)
    else:
        raise ValueError(f"optimizers.schedule does not build {config.name!r}")
    if not warmup_steps:
        return main
    start = peak * config.warmup_factor
    end = start if config.warmup == "constant" else peak
    warmup = optax.linear_schedule(start, end, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])


def rates(schedule: optax.Schedule, total_steps: int) -> np.ndarray:
    """float32 [total_steps], the learning rate of each update."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        steps = jnp.arange(total_steps, dtype=jnp.int32)
        return np.asarray(jax.jit(jax.vmap(schedule))(steps), np.float32)
