"""Checks a config, field by field, and builds the network that it describes."""

import math
import re
from collections.abc import Callable

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import common
from resnet_jax import UserError, did_you_mean, models, optimizers

# Builds a network, given a config and the number of classes.
Build = Callable[[ConfigDict, int], models.ResNet]

_CHOICES = {
    "parallel": ("jit", "pmap"),
    "model.version": (1, 2),
    "model.variant": ("paper", "keras"),
    "model.block": ("", "basic", "bottleneck"),
    "model.activation": ("", "post", "pre"),
    "model.shortcut": ("", "A", "B"),
    "model.stem": ("cifar", "imagenet"),
    "model.dtype": ("float32", "bfloat16"),
    "dataset.stream": ("auto", "always", "never"),
    "augment.normalization": ("mean", "mean_std", "pixel_mean"),
    "optimizer.name": tuple(optimizers.OPTIMIZERS),
    "optimizer.decay": ("coupled", "decoupled"),
    "optimizer.decay_on": ("all", "kernels", "convolutions"),
    "schedule.name": ("step", "cosine", "onecycle", "constant"),
    "schedule.warmup": ("linear", "constant"),
}
# Field: (smallest value, largest value, whether the smallest itself is allowed).
_RANGES = {
    "seed": (0, 2**32 - 1, True),
    "seeds": (1, 10**6, True),
    "epochs": (0, 10**6, True),
    "steps": (0, 10**9, True),
    "batch_size": (1, 10**6, True),
    "steps_per_call": (0, 10**6, True),
    "eval_every": (1, 10**6, True),
    "label_smoothing": (0, 0.999, True),
    "model.width": (0, 4096, True),
    "model.stochastic_depth": (0, 0.999, True),
    "dataset.image_size": (0, 4096, True),
    "dataset.split_seed": (0, 2**32 - 1, True),
    "augment.crop": (0, 1, True),
    "augment.random_resized_crop": (0, 1, True),
    "augment.shift": (0, 1, True),
    "augment.cutout": (0, 1, True),
    "augment.mixup": (0, 1e3, True),
    "augment.cutmix": (0, 1e3, True),
    "augment.plain_epochs": (0, 10**6, True),
    "optimizer.learning_rate": (0, 1e6, False),
    "optimizer.linear_rate_batch": (0, 10**6, True),
    "optimizer.momentum": (0, 1, True),
    "optimizer.epsilon": (0, 1, False),
    "optimizer.weight_decay": (0, 1, True),
    "optimizer.clip_norm": (0, 1e6, True),
    "optimizer.backbone_factor": (0, 1e3, False),
    "optimizer.bn_bias_factor": (0, 1e3, True),
    "optimizer.ema": (0, 0.999999, True),
    "optimizer.accumulate": (1, 10**6, True),
    "schedule.warmup_epochs": (0, 10**6, True),
    "schedule.warmup_factor": (0, 1, True),
    "checkpoint.every": (1, 10**6, True),
    "checkpoint.every_minutes": (0, 10**6, True),
    "checkpoint.keep": (1, 10**6, True),
}
_TYPES = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a string"),
    tuple: (tuple | list, "a tuple of numbers"),
    ConfigDict: (ConfigDict, "the fields of configs/common.py"),
}


def validate(config: ConfigDict) -> None:
    """Checks every field before any device is touched.

    `data.check` checks whether the data set is there or can be prepared.

    Raises:
      UserError: a sentence that names the field, its value and the fix.
    """
    _validate_fields(config, common.default(), "config")
    for field, choices in _CHOICES.items():
        value = get(config, field)
        if value not in choices:
            shown = ", ".join(repr(choice) for choice in choices if choice != "")
            _refuse(field, value, f"choose one of {shown}")
    for field, (low, high, inclusive) in _RANGES.items():
        value = get(config, field)
        if not (low <= value <= high) or (value == low and not inclusive):
            bound = "at least" if inclusive else "more than"
            _refuse(field, value, f"give {bound} {low} and at most {high}")
    if config.seed + config.seeds > 2**32:
        _refuse("seeds", config.seeds, f"give at most {2**32 - config.seed}")
    model = config.model
    try:
        build_network(config, num_classes=10)
    except ValueError as error:
        name = str(error).partition(" ")[0]  # it begins with the field at fault
        _refuse(f"model.{name}", model[name], str(error))
    if not model.residual:
        for name in ("zero_init", "stochastic_depth"):
            if model[name]:
                off = type(model[name])(0)
                fix = f"set it to {off!r}, or model.residual to True, which it needs"
                _refuse(f"model.{name}", model[name], fix)
    moves = ("random_resized_crop", "shift", "crop")
    if len(used := [name for name in moves if config.augment[name]]) > 1:
        _refuse(
            f"augment.{used[0]}",
            config.augment[used[0]],
            f"set it or augment.{used[1]} to 0",
        )
    _validate_augment(config.augment)
    if config.batch_size % config.optimizer.accumulate:
        _refuse(
            "optimizer.accumulate",
            config.optimizer.accumulate,
            f"choose a divisor of batch_size ({config.batch_size})",
        )
    if config.optimizer.freeze:
        _validate_freeze(config)
    if not config.epochs and not config.steps:
        _validate_without_training(config)
    _validate_schedule(config.schedule)


def _validate_fields(config: ConfigDict, known: ConfigDict, group: str) -> None:
    """Checks that a config, which any file may have made, has just the known fields."""
    for name in config:
        if name not in known:
            hint = f"{did_you_mean(name, known)}see configs/common.py"
            if meant := find_field(name):
                hint = f"did you mean config.{meant}?"
            raise UserError(f"{group}.{name} is not a field: {hint}")
    for name, default in known.items():
        field = f"{group}.{name}"
        if name not in config:
            raise UserError(f"{field} is missing: set it, as in configs/common.py")
        value, (allowed, what) = config[name], _TYPES[type(default)]
        mistaken = isinstance(value, bool) and not isinstance(default, bool)
        if mistaken or not isinstance(value, allowed):
            shown = value.to_dict() if isinstance(value, ConfigDict) else value
            raise UserError(f"{field}={shown!r}: give {what}")
        if isinstance(default, ConfigDict):
            _validate_fields(value, default, field)


def find_field(name: str) -> str | None:
    """The only field of configs/common.py whose last part has this name or initials."""

    def initials(field: str) -> str:
        return "".join(word[0] for word in field.split("_"))

    fields = flat(common.default())
    for read in (str, initials):
        found = [field for field in fields if read(field.rpartition(".")[2]) == name]
        if len(found) == 1 and len(name) > 1:
            return found[0]
    return None


def _validate_freeze(config: ConfigDict) -> None:
    field, pattern = "optimizer.freeze", config.optimizer.freeze
    try:
        re.compile(pattern)
    except re.error as error:
        _refuse(field, pattern, f"give a regular expression ({error})")
    if config.model.scan:
        _refuse(
            field,
            pattern,
            "set model.scan to False: it stores a stage's blocks as one array",
        )


def _validate_without_training(config: ConfigDict) -> None:
    if not config.init_from:
        _refuse("epochs", 0, "give 1 or more, or set init_from to weights to evaluate")
    if config.optimizer.ema:
        _refuse("optimizer.ema", config.optimizer.ema, "set it to 0 when epochs is 0")


def _validate_augment(augment: ConfigDict) -> None:
    if augment.mixup and augment.cutmix:
        _refuse("augment.mixup", augment.mixup, "set it or augment.cutmix to 0")
    if augment.alternating_flip and not augment.flip:
        _refuse("augment.flip", False, "set augment.alternating_flip to False, too")
    _validate_constants(augment)
    sizes, ends = tuple(augment.sizes), tuple(augment.size_ends)
    if not all(isinstance(size, int) and size >= 8 for size in sizes):
        _refuse("augment.sizes", sizes, "give whole numbers of pixels, 8 or more")
    if len(ends) != len(sizes) or not all(
        _is_number(end) and 0 < end < 1 for end in ends
    ):
        _refuse(
            "augment.size_ends",
            ends,
            f"give one fraction between 0 and 1 for each of the {len(sizes)} sizes",
        )
    if list(ends) != sorted(set(ends)):
        _refuse("augment.size_ends", ends, "give them in increasing order")


def _validate_constants(augment: ConfigDict) -> None:
    mean, std = tuple(augment.mean), tuple(augment.std)
    if not all(_is_number(value) and 0 <= value <= 1 for value in mean):
        _refuse("augment.mean", mean, "give numbers from 0 to 1")
    if not all(_is_number(value) and 0 < value <= 1 for value in std):
        _refuse("augment.std", std, "give numbers above 0 and at most 1")
    if len(mean) != len(std):
        _refuse("augment.mean", mean, "give as many as augment.std, one per channel")
    if mean and augment.normalization != "mean_std":
        _refuse("augment.mean", mean, "set augment.normalization to 'mean_std', too")


def _validate_schedule(schedule: ConfigDict) -> None:
    if schedule.name == "onecycle" and schedule.warmup_epochs:
        _refuse(
            "schedule.warmup_epochs",
            schedule.warmup_epochs,
            "set it to 0, since 'onecycle' has a warm-up of its own",
        )
    fractions, factors = tuple(schedule.boundaries), tuple(schedule.factors)
    if not all(_is_number(value) and 0 < value < 1 for value in fractions):
        _refuse("schedule.boundaries", fractions, "give fractions between 0 and 1")
    if list(fractions) != sorted(set(fractions)):
        _refuse("schedule.boundaries", fractions, "give them in increasing order")
    if len(factors) != len(fractions) or not all(
        _is_number(value) and 0 <= value < math.inf for value in factors
    ):
        _refuse(
            "schedule.factors",
            factors,
            f"give one number, 0 or more, for each of the {len(fractions)} boundaries",
        )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(field: str, value, fix: str) -> None:
    raise UserError(f"config.{field}={value!r}: {fix}")


def get(config: ConfigDict, field: str):
    """The value of a dotted field, such as `optimizer.learning_rate`."""
    for name in field.split("."):
        config = config[name]
    return config


def flat(config: ConfigDict) -> dict:
    """A config's values by dotted name."""
    fields = flatten_dict(config.to_dict(), sep=".")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
    }


def build_network(config: ConfigDict, num_classes: int) -> models.ResNet:
    """The network that `config.model` describes."""
    return models.resnet(num_classes=num_classes, **config.model)
