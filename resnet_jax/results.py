"""A run's opening lines and warnings, and its final summary."""

import math
import resource
import sys

import jax
from ml_collections import ConfigDict

from resnet_jax import cost, data, hosts, models, optimizers, roofline
from resnet_jax.clock import Clock
from resnet_jax.plan import Plan, total_steps
from resnet_jax.trainer import Trainer

# The optimizers that `optimizer.nesterov` changes.
_NESTEROV = ("sgd", "adam", "adamw", "rmsprop", "lars")
_NOT_FLIP_INVARIANT = ("digits", "svhn_cropped", "mnist", "emnist", "kmnist")


def print_start(
    config: ConfigDict,
    dataset: data.Dataset,
    trainer: Trainer,
    changed: list[str],
    newest: tuple[int, dict] | None,
) -> None:
    """Prints the run's banner, warnings, what changed, and where it resumes."""
    print(_banner(config, dataset, trainer))
    for warning in (
        *unreached_settings(config, trainer.plan),
        *suspicious_settings(config),
    ):
        print(f"warning   {warning}")
    for change in changed:
        print(f"changed   {change}")
    step, record = newest or (0, None)
    if config.profile:
        _warn_without_second_call(step, trainer.plan)
    if not newest:
        return
    plan, augment = trainer.plan, config.augment
    total, before = plan.total_steps, record["total_steps"]
    print(f"resumed   at step {step:,} of {total:,}")
    if not step or total == before:
        return
    if total == step:
        if config.schedule.name != "constant":
            print(
                f"warning   the {config.schedule.name} schedule spanned {before:,} "
                f"steps, and is cut off at step {step:,}"
            )
        return
    if config.schedule.name != "constant":
        print(
            f"warning   the {config.schedule.name} schedule now spans {total:,} "
            f"steps, not {before:,}: its learning rate at step {step:,} is "
            f"{trainer.learning_rates[step]:g}"
        )
    if plan.sizes:
        size = plan.image_size(step)
        print(
            f"warning   augment.size_ends are now fractions of {total:,} steps: images "
            f"have {f'{size} pixels' if size else 'their full size'} at step {step:,}"
        )
    if (augment.mixup or augment.cutmix) and augment.plain_epochs:
        print(
            f"warning   augment.plain_epochs={augment.plain_epochs:g} are now the last "
            f"of {total:,} steps: images are mixed until then"
        )


def of_length(changed: list[str]) -> list[str]:
    """Those of `workdir.differences`' sentences that are about a run's length."""
    return [told for told in changed if told.startswith(("epochs ", "steps "))]


def length_changes(summary: dict) -> str:
    """When a run got another length: 'epochs 1 -> 3 at step 23'; '': never."""
    return "; ".join(
        f"{told} at step {change['step']:,}"
        for change in summary.get("changes", ())
        for told in of_length(change["changed"])
    )


def _warn_without_second_call(step: int, plan: Plan) -> None:
    """The first call warms up; `profile` traces the second."""
    if not plan.total_steps:
        print("profile   nothing is traced: no updates are made")
    elif step < plan.total_steps == plan.call_end(step):
        half = (plan.total_steps - step) // 2
        fix = f"; set config.steps_per_call={half}" if half else ""
        print(f"profile   nothing is traced: the whole run is one call{fix}")


def unreached_settings(config: ConfigDict, plan: Plan) -> list[str]:
    """What a run of so few epochs never reaches."""
    if not plan.total_steps:
        return []
    found, augment = [], config.augment
    epochs = plan.total_epochs if config.steps else config.epochs
    if config.schedule.warmup_epochs >= epochs:
        found.append(
            "the run ends before its warm-up does: lower schedule.warmup_epochs"
        )
    mixes = next((name for name in ("mixup", "cutmix") if augment[name]), None)
    if mixes and augment.plain_epochs >= epochs:
        found.append(
            f"augment.plain_epochs={augment.plain_epochs:g} leaves no epoch for "
            f"{mixes}: lower it"
        )
    return found


def suspicious_settings(config: ConfigDict) -> list[str]:
    """What no recipe for this data or depth would have, except by mistake."""
    found, augment, schedule = [], config.augment, config.schedule
    if data.base_name(config.dataset.name) in _NOT_FLIP_INVARIANT:
        flips = ("flip", "alternating_flip")
        named = [f"augment.{name}" for name in flips if augment[name]]
        named += ["test_time_flip"] if config.test_time_flip else []
        if named:
            found.append(
                f"digits and letters are mirrored: set {' and '.join(named)} to False"
            )
    warm = schedule.warmup_epochs or schedule.name == "onecycle"
    deep = config.model.depth >= 110 and config.model.stem == "cifar"
    trains = config.epochs or config.steps
    if trains and deep and config.optimizer.name == "sgd" and not warm:
        found.append(
            f"{config.model.depth} layers without a warm-up, which the papers use "
            "from 110 on: set schedule.warmup_epochs=1, or use the config of that "
            "depth"
        )
    return found


def _banner(config: ConfigDict, dataset: data.Dataset, trainer: Trainer) -> str:
    net, plan, model = trainer.net, trainer.plan, config.model
    total = cost.totals(cost.layers(net, dataset.image_shape))
    device = jax.devices()[0]
    count = trainer.parallel.device_count
    shared = f" of {hosts.count()} processes" if hosts.count() > 1 else ""
    sizes = [f"{len(dataset.train.labels):,} to train on"]
    if dataset.validation:
        sizes.append(f"{len(dataset.validation.labels):,} to validate")
    sizes.append(f"{len(dataset.eval.labels):,} to test")
    shape = "x".join(map(str, dataset.image_shape))
    return "\n".join(
        [
            f"network   v{model.version}-{model.depth}: {models.describe(net)}; "
            f"{total['params']:,} parameters, {total['macs'] / 1e6:,.2f} million "
            "multiply-accumulates per image",
            f"data      {dataset.name}: {', '.join(sizes)}; {shape} pixels, "
            f"{dataset.num_classes} classes{', streamed' * dataset.train.streams}",
            f"devices   {count} x {device.device_kind}{shared}, {config.parallel}; "
            f"{config.batch_size} images per batch, {config.batch_size // count} each; "
            f"{model.dtype}",
            f"training  {_training(config, plan)}",
        ]
    )


def _training(config: ConfigDict, plan: Plan) -> str:
    if not plan.total_steps:
        return "none: the weights are evaluated as they are"
    optimizer = config.optimizer
    name = optimizer.name
    if optimizer.nesterov and name in _NESTEROV:
        name += " with Nesterov momentum"
    of_batch, rule = optimizer.linear_rate_batch, ""
    if of_batch:
        rule = f" ({optimizer.learning_rate:g} for {of_batch:,} images)"
    return (
        f"{plan.total_steps:,} steps, {plan.total_epochs:.4g} epochs; "
        f"{name}, learning rate {optimizers.peak_rate(config):g}{rule}, "
        f"{config.schedule.name} schedule"
    )


def is_whole(result: dict, config: ConfigDict) -> bool:
    """Whether a `summary.json` covers all updates that the config now asks for."""
    if not (steps := result["steps"]):
        return not config.epochs and not config.steps
    examples = round(steps * config.batch_size / result["epochs"])
    return steps == total_steps(config, examples)


def sentence(result: dict) -> str:
    """The test accuracy and loss of a `summary.json`, in words."""
    loss = result["test_loss"]
    return (
        f"test accuracy {result['test_accuracy']:.2%} of {result['test_examples']:,}, "
        f"loss {'not finite' if loss is None else format(loss, '.4f')}"
    )


def summarize(
    config: ConfigDict,
    dataset: data.Dataset,
    trainer: Trainer,
    clock: Clock,
    metrics: dict,
    made_by: dict,
) -> dict:
    """What `summary.json` holds: results, cost, times, and what computed them."""
    plan = trainer.plan
    results = {}
    for name, value in metrics.items():
        if name.endswith("_class_accuracy"):
            shares = (share and round(share, 6) for share in value)  # None: no example
            results[name] = dict(zip(dataset.class_names, shares, strict=True))
        else:
            results[name] = value if math.isfinite(value) else None
    total = cost.totals(cost.layers(trainer.net, dataset.image_shape))
    speed = {}
    if plan.total_steps:
        seconds = max(clock.training, 1e-9) / plan.total_steps
        rate, count = plan.batch_size / seconds, made_by["device_count"]
        speed["images_per_second"] = round(rate, 1)
        speed["images_per_second_per_device"] = round(rate / count, 1)
        if not plan.sizes:  # steps on smaller images cost less
            step = roofline.step_cost(trainer, config, total["macs"])
            speed |= step | roofline.achieved(step, seconds)
    return {
        **results,
        "dataset": dataset.name,
        "eval_split": config.dataset.eval_split,
        **total,
        "steps": plan.total_steps,
        "epochs": plan.total_epochs,
        "seed": config.seed,
        "seconds": round(clock.total, 1),
        "compile_seconds": round(clock.compiling, 1),
        "train_seconds": round(clock.training, 1),
        "evaluation_seconds": round(clock.evaluating, 1),
        "peak_memory_bytes": peak_memory(),
        **speed,
        **made_by,
    }


def peak_memory() -> int:
    """The most bytes that this process has held so far, on its first device.

    On a CPU, whose memory JAX does not track, in total.
    """
    counted = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return counted["peak_bytes_in_use"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
