"""The optimizer and its learning-rate schedule, from the config, by Optax."""

import jax
import optax
from ml_collections import ConfigDict


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
    # You et al. 2017 (arXiv 1708.03888): biases and BatchNorm are left out.
    return optax.chain(
        optax.masked(
            optax.scale_by_trust_ratio(trust_coefficient=0.001), _mask("kernels")
        ),
        optax.trace(config.momentum, nesterov=config.nesterov),
    )


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
        ndim = leaf.ndim - ("_blocks" in jax.tree_util.keystr(path))  # without scan's
        kernel = path[-1].key == "kernel"
        return kernel and (decay_on == "kernels" or ndim == 4)

    return lambda params: jax.tree_util.tree_map_with_path(chosen, params)


def optimizer(
    config: ConfigDict, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
    """Chains clipping, weight decay, the optimizer and the schedule.

    Args:
      config: `config.optimizer`.
      learning_rate: maps the number of updates done to the next one's rate.
    """
    decay = optax.add_decayed_weights(config.weight_decay, _mask(config.decay_on))
    decoupled = config.decay == "decoupled" or config.name == "adamw"
    steps = []
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    if config.weight_decay and not decoupled:
        steps.append(decay)
    steps.append(OPTIMIZERS[config.name](config))
    if config.weight_decay and decoupled:
        steps.append(decay)
    return optax.chain(*steps, optax.scale_by_learning_rate(learning_rate))


def schedule(
    config: ConfigDict, peak: float, total_steps: int, steps_per_epoch: float
) -> optax.Schedule:
    """The learning rate of each update.

    Args:
      config: `config.schedule`.
      peak: the learning rate itself, which the schedule scales.
      total_steps: updates in the whole run.
      steps_per_epoch: updates in an epoch, with a fraction where batches do not
        divide the training set.
    """
    if config.name == "onecycle":
        return optax.cosine_onecycle_schedule(total_steps, peak)
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
    else:
        main = optax.constant_schedule(peak)
    if not warmup_steps:
        return main
    start = peak * config.warmup_factor
    end = start if config.warmup == "constant" else peak
    warmup = optax.linear_schedule(start, end, warmup_steps)
    return optax.join_schedules([warmup, main], [warmup_steps])
