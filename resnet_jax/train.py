"""A training run: the loop, and what it leaves in its directory."""

import contextlib
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import UserError, data, parallel, summary, workdir
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.metrics import Recorder
from resnet_jax.step import TrainState
from resnet_jax.trainer import Trainer


class DivergedError(UserError):
    """A loss or a gradient became infinite or NaN."""

    exit_status = 1


def train_and_evaluate(config: ConfigDict, directory: Path) -> dict:
    """Trains as `config` says, in a directory, and returns the run's summary.

    Goes on from the newest checkpoint there; a finished run is left as it is.

    Raises:
      UserError: the data or the directory are not what they should be.
      DivergedError: training cannot go on; what was saved stays.
    """
    clock = {"total": -time.perf_counter(), "training": 0.0, "compiling": 0.0}
    print(f"workdir   {directory}", flush=True)
    changed = workdir.check(directory, config)
    parallel.split_cpu(config.batch_size)
    parallel.use_compilation_cache()
    dataset = data.load(config.dataset)
    trainer = Trainer(config, dataset)
    plan = trainer.plan

    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(
            directory / "checkpoints",
            config.checkpoint.keep,
            best=dataset.validation is not None,
        )
        stack.callback(checkpoints.close)
        state, step, best = trainer.new_state(), checkpoints.latest_step or 0, -1.0
        if step:
            trees, record = checkpoints.restore(step, like=state.split())
            state, best = TrainState.join(trees), record["best"]
            for name, seconds in record["clock"].items():
                clock[name] += seconds
        if step > plan.total_steps:
            raise UserError(
                f"--workdir={directory} is at step {step:,}, but config.epochs or "
                f"config.steps ends the run at {plan.total_steps:,}: give more, or "
                "another --workdir"
            )
        done = workdir.read_summary(directory)
        if done and done["steps"] == step == plan.total_steps:
            print(f"finished  at step {step:,} of {step:,}: {_result(done)}")
            return done
        workdir.write_json(directory / "config.json", json.loads(config.to_json()))
        print(_banner(config, dataset, trainer))
        for change in changed:
            print(f"changed   {change}")
        if step:
            print(f"resumed   at step {step:,} of {plan.total_steps:,}")

        state = trainer.place(state)
        trainer.compile(state)
        clock["compiling"] += trainer.compile_seconds
        print(f"compiled  in {trainer.compile_seconds:.1f} s", flush=True)
        recorder = Recorder(directory, step, plan)
        stack.callback(recorder.close)
        metrics = {} if step < plan.total_steps else trainer.evaluate(state, True)

        while step < plan.total_steps:
            start, stop = time.perf_counter(), plan.call_end(step)
            state, means = trainer.train(state, step, stop)
            clock["training"] += time.perf_counter() - start
            _require_finite(means, step, stop, checkpoints.latest_step)
            means["learning_rate"] = float(trainer.learning_rate(stop - 1))
            recorder.train_row(stop, means)
            step = stop
            epoch = plan.epoch(step)
            if step < plan.epoch_end(epoch):
                continue
            # Evaluate, then save: a checkpoint knows how good it is.
            last = step == plan.total_steps
            save = last or epoch % config.checkpoint.every == 0
            metrics = {}
            if save or epoch % config.eval_every == 0:
                metrics = trainer.evaluate(state, every_split=last)
            recorder.epoch_row(step, epoch, metrics)
            accuracy = metrics.get("validation_accuracy", -1.0)
            if save or accuracy > best:
                best = max(best, accuracy)
                now = clock | {"total": clock["total"] + time.perf_counter()}
                record = {"clock": now, "best": best}
                saved = trainer.fetch(state)
                checkpoints.save(step, saved.split(), record, accuracy)

    clock["total"] += time.perf_counter()
    result = _summary(config, dataset, trainer, clock, metrics)
    workdir.write_json(directory / "summary.json", result)
    print(f"finished  in {clock['total']:,.0f} s: {_result(result)}")
    return result


def _require_finite(means: dict, start: int, stop: int, saved: int | None) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        kept = (
            f"the checkpoint of step {saved:,} stays" if saved else "none was saved yet"
        )
        raise DivergedError(
            f"training diverged: {bad[0]} is no longer finite between steps {start:,} "
            f"and {stop:,} ({kept}). Try a lower optimizer.learning_rate, a longer "
            "schedule.warmup_epochs, or optimizer.clip_norm=1, in another --workdir"
        )


def _banner(config: ConfigDict, dataset: data.Dataset, trainer: Trainer) -> str:
    net, plan, model = trainer.net, trainer.plan, config.model
    cost = summary.cost(net, dataset.image_shape)
    device = jax.devices()[0]
    count = trainer.parallel.device_count
    sizes = [f"{len(dataset.train.labels):,} to train on"]
    if dataset.validation:
        sizes.append(f"{len(dataset.validation.labels):,} to validate")
    sizes.append(f"{len(dataset.eval.labels):,} to test")
    shape = "x".join(map(str, dataset.image_shape))
    optimizer = config.optimizer
    return "\n".join(
        [
            f"network   v{model.version}-{model.depth}: {summary.describe(net)}; "
            f"{cost['params']:,} parameters, {cost['macs'] / 1e6:,.2f} million "
            "multiply-accumulates an image",
            f"data      {dataset.name}: {', '.join(sizes)}; {shape} pixels, "
            f"{dataset.num_classes} classes",
            f"devices   {count} x {device.device_kind}, {config.parallel}; "
            f"{config.batch_size} images a batch, {config.batch_size // count} each; "
            f"{model.dtype}",
            f"training  {plan.total_steps:,} steps, {plan.total_epochs:.4g} epochs; "
            f"{optimizer.name}, learning rate {optimizer.learning_rate:g}, "
            f"{config.schedule.name} schedule",
        ]
    )


def _result(result: dict) -> str:
    loss = result["test_loss"]
    return (
        f"test accuracy {result['test_accuracy']:.2%} of {result['test_examples']:,}, "
        f"loss {'not finite' if loss is None else format(loss, '.4f')}"
    )


def _summary(
    config: ConfigDict,
    dataset: data.Dataset,
    trainer: Trainer,
    clock: dict[str, float],
    metrics: dict,
) -> dict:
    plan = trainer.plan
    results = {}
    for name, value in metrics.items():
        if name.endswith("_class_accuracy"):
            accuracies = np.round(value, 6).tolist()
            results[name] = dict(zip(dataset.class_names, accuracies, strict=True))
        else:
            results[name] = value if math.isfinite(value) else None  # JSON has no NaN
    return {
        **results,
        "dataset": dataset.name,
        **summary.cost(trainer.net, dataset.image_shape),
        "steps": plan.total_steps,
        "epochs": plan.total_epochs,
        "seed": config.seed,
        "seconds": round(clock["total"], 1),
        "compile_seconds": round(clock["compiling"], 1),
        "images_per_second": round(
            plan.total_steps * plan.batch_size / max(clock["training"], 1e-9), 1
        ),
        "device": jax.devices()[0].device_kind,
        "device_count": trainer.parallel.device_count,
        **workdir.provenance(),
    }
