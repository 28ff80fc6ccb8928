"""A training run: the loop, and what it leaves in its directory."""

import contextlib
import json
import shlex
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from resnet_jax import (
    UserError,
    bucket,
    compilation,
    data,
    finetune,
    hosts,
    models,
    parallel,
    profile,
    results,
    trained,
    workdir,
)
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import build_network
from resnet_jax.divergence import DivergedError, require_finite, require_finite_state
from resnet_jax.metrics import Recorder, read_rows
from resnet_jax.preemption import Preemption, StoppedError
from resnet_jax.step import TrainState
from resnet_jax.trainer import Trainer


def train_and_evaluate(
    config: ConfigDict,
    directory: Path,
    build: Callable[[ConfigDict, int], models.ResNet] = build_network,
) -> dict:
    """Trains as `config` says, in a directory, and returns the run's summary.

    Goes on from the newest checkpoint there; a finished run is left as it is. SIGTERM
    or SIGINT end it behind the call that is under way, with a checkpoint. Of several
    processes (`hosts`), the first alone uses the directory, and, where they are not
    streamed, the data set's files.

    `build(config, num_classes)` may build another network than the config's own, for
    experiments with blocks; the directory is then for that network alone.

    Raises:
      UserError: the data or the directory are not what they should be.
      DivergedError: training cannot go on; what was saved stays.
      WriteError: a file cannot be written; what was saved stays.
      StoppedError: a signal came; what was done is saved.
      LostError: another process is gone; what was saved stays.
    """
    clock = {"total": -time.perf_counter(), "training": 0.0, "compiling": 0.0}
    parallel.split_cpu(config.batch_size, hosts.count())
    compilation.use_compilation_cache()
    hosts.tell(f"workdir   {bucket.shown(directory)}")
    hosts.from_first(lambda: workdir.check(directory, config))
    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(Preemption())
        try:
            return _run(config, directory, build, clock, preemption, stack)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise _out_of_memory(config) from None
            if hosts.count() == 1:
                raise
            raise hosts.LostError(
                f"another process is gone ({' '.join(str(error).split())[:100]}): "
                "start all again, and they go on from the newest checkpoint"
            ) from None


def _run(
    config: ConfigDict,
    directory: Path,
    build: Callable[[ConfigDict, int], models.ResNet],
    clock: dict[str, float],
    preemption: Preemption,
    stack: contextlib.ExitStack,
) -> dict:
    checkpoints = None  # of the first process alone

    def enter() -> tuple:
        nonlocal checkpoints
        stack.enter_context(workdir.claimed(directory))
        changed = workdir.check(directory, config)  # now that nobody else can change it
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep)
        stack.callback(checkpoints.close)
        newest = checkpoints.newest()
        rows, done = read_rows(directory), workdir.read_summary(directory)
        return changed, newest, rows, done, data.load(config.dataset)

    changed, newest, rows, done, dataset = hosts.from_first(enter)
    if hosts.count() > 1:
        data.reopen(dataset, config.dataset)
    trainer = Trainer(config, dataset, build)
    plan = trainer.plan
    state, step, changes = trainer.new_state(), 0, []
    made_by = {
        "device": jax.devices()[0].device_kind,
        "device_count": trainer.parallel.device_count,
        **workdir.provenance(),
    }
    if newest:
        step, record = newest
        seen = record.get("examples", plan.examples)
        hosts.from_first(
            lambda: trained.require_same_data(
                directory, dataset, trainer.normalization, seen
            )
        )
        if step > plan.total_steps:
            raise UserError(
                f"--workdir={directory} is at step {step:,}, but config.epochs or "
                f"config.steps ends the run at {plan.total_steps:,}: give more, or "
                "another --workdir"
            )
        like = state.split()
        trees = hosts.from_first(lambda: checkpoints.restore(step, like))
        state = TrainState.join(trees)
        for name, seconds in record["clock"].items():
            clock[name] += seconds
        changed += workdir.differences(record["provenance"], made_by)
        changes = record["changes"]
        changes += [{"step": step, "changed": changed}] if changed else []
    elif config.init_from:
        begin = partial(
            *(finetune.begin_with, config.init_from, state, dataset.class_names),
            residual=config.model.residual,
            scale=trainer.normalization[1],
        )
        state, taken = hosts.from_first(begin)
        hosts.tell(f"weights   of {taken}")
    if done and done.get("steps") == step == plan.total_steps:
        hosts.tell(f"finished  at step {step:,} of {step:,}: {results.sentence(done)}")
        if any(told.startswith("dataset.eval_split") for told in changed):
            split = config.dataset.eval_split
            hosts.tell(
                "note      not of that split, which takes another command: "
                "python -m resnet_jax.evaluate "
                f"--workdir={shlex.quote(bucket.shown(directory))} "
                f"--split={shlex.quote(split)}"
            )
        return done
    if hosts.is_first():
        workdir.write_json(directory / "config.json", json.loads(config.to_json()))
        trained.write_inputs(directory, dataset, trainer.normalization)
        results.print_start(config, dataset, trainer, changed, newest)

    state = trainer.place(state)
    trainer.compile(state)
    clock["compiling"] += trainer.compile_seconds
    hosts.tell(f"compiled  in {trainer.compile_seconds:.1f} s")
    recorder = Recorder(directory if hosts.is_first() else None, rows, step, plan)
    stack.callback(recorder.close)
    preemption.started()

    def record() -> dict:
        return {
            "clock": clock | {"total": clock["total"] + time.perf_counter()},
            "total_steps": plan.total_steps,
            "examples": plan.examples,
            "changes": changes,
            "provenance": made_by,
            "config": json.loads(config.to_json()),
        }

    profile.trace_if(config.profile, trainer, directory)
    saver = _Saver(trainer, checkpoints, recorder, record, step)
    try:
        metrics = _loop(
            config, trainer, state, step, recorder, saver, preemption, clock
        )
    except DivergedError:
        saver.wait()
        raise
    clock["total"] += time.perf_counter()
    result = results.of_run(config, dataset, trainer, clock, metrics, made_by)
    if changes:
        result["changes"] = changes
    if hosts.is_first():
        workdir.write_json(directory / "summary.json", result)
    hosts.tell(f"finished  in {clock['total']:,.0f} s: {results.sentence(result)}")
    if number := hosts.largest(preemption.received or 0):
        raise StoppedError(signal.Signals(number), "at the end, which is saved")
    return result


def _loop(
    config: ConfigDict,
    trainer: Trainer,
    state: TrainState,
    step: int,
    recorder: Recorder,
    saver: "_Saver",
    preemption: Preemption,
    clock: dict[str, float],
) -> dict:
    """Trains to the end; returns the last evaluation, on every split."""
    plan, metrics, resumed = trainer.plan, {}, step

    def received() -> int:
        """The signal that came to any of the processes; 0: none."""
        return hosts.largest(preemption.received or 0)

    while True:
        saver.poll()
        epoch = plan.epoch(step)
        last = step == plan.total_steps
        ended = 0 < step == plan.epoch_end(epoch)
        due = last or (ended and epoch % config.checkpoint.every == 0)
        evaluates = due or (ended and epoch % config.eval_every == 0)
        # Evaluate, then save: metrics.jsonl says whether a checkpoint is the best.
        if last or (evaluates and not recorder.evaluated(step)):
            metrics = trainer.evaluate(state, last, lambda: received() > 0)
            if metrics is not None:
                recorder.epoch_row(step, epoch, metrics)
        elif ended and step != resumed:
            recorder.epoch_row(step, epoch, {})
        number = received()
        # Saving may take all devices: no process may decide it by its own clock.
        late = 0 < config.checkpoint.every_minutes <= saver.minutes
        due |= hosts.largest(int(late)) > 0
        due |= number > 0 or recorder.best_step == step
        if due and step and saver.saved_step != step:
            saver.save(state, step)
        if number:
            saver.wait()
            where = f"at step {step:,} of {plan.total_steps:,}, which is saved"
            raise StoppedError(signal.Signals(number), where if step else "at step 0")
        if last:
            saver.wait()
            return metrics
        start, stop = time.perf_counter(), plan.call_end(step)
        state, means = trainer.train(state, step, stop)
        clock["training"] += time.perf_counter() - start
        require_finite(means, step, stop, saver.saved_step)
        means["learning_rate"] = float(trainer.learning_rate(stop - 1))
        recorder.train_row(stop, means)
        step = stop


class _Saver:
    """Saves states, in the first process, and tells when they are saved.

    Attributes:
      saved_step: of the last state that was given to save; None: none yet.
    """

    def __init__(
        self,
        trainer: Trainer,
        checkpoints: Checkpoints | None,
        recorder: Recorder,
        record: Callable[[], dict],
        step: int,
    ):
        self._trainer, self._checkpoints = trainer, checkpoints
        self._recorder, self._record = recorder, record
        self.saved_step = step or None
        self._time = time.perf_counter()

    @property
    def minutes(self) -> float:
        """Since the last state was given to save, or the start."""
        return (time.perf_counter() - self._time) / 60

    def save(self, state: TrainState, step: int) -> None:
        """Saves in the background. Raises DivergedError if the state is not finite."""
        saved = self._trainer.fetch(state)
        require_finite_state(saved, step, self.saved_step)
        self.saved_step, self._time = step, time.perf_counter()
        if self._checkpoints:
            self._recorder.write()
            self._checkpoints.best_step = self._recorder.best_step
            self._tell(self._checkpoints.wait())
            self._checkpoints.save(step, saved.split(), self._record())

    def poll(self) -> None:
        """Tells of a save that has ended."""
        if self._checkpoints:
            self._tell(self._checkpoints.poll())

    def wait(self) -> None:
        """Waits in all processes for the end of a save, and tells of it.

        Those that do not save must not end before: JAX would end the first one, too.
        """
        hosts.from_first(lambda: self._tell(self._checkpoints.wait()))

    def _tell(self, ended: tuple[int, int, float] | None) -> None:
        if ended:
            step, size, seconds = ended
            self._recorder.tell(
                f"saved     step {step:,}: {size / 1e6:.1f} MB in {seconds:.2f} s"
            )


def _out_of_memory(config: ConfigDict) -> UserError:
    remat = "" if config.model.remat else "config.model.remat=True, or "
    return UserError(
        f"the device's memory is too small for config.batch_size={config.batch_size}: "
        f"give {remat}in another --workdir a smaller batch or "
        f"config.optimizer.accumulate={2 * config.optimizer.accumulate}"
    )
