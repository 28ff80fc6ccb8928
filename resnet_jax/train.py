"""A training run: the loop, and what it leaves in its directory."""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from resnet_jax import (
    UserError,
    bucket,
    compilation,
    data,
    hosts,
    one_line,
    opening,
    parallel,
    profile,
    provenance,
    results,
    workdir,
)
from resnet_jax.clock import Clock
from resnet_jax.config import Build, build_network, validate
from resnet_jax.divergence import DivergedError, require_finite
from resnet_jax.metrics import Recorder
from resnet_jax.preemption import AT_THE_END, Preemption, StoppedError
from resnet_jax.saver import Saver
from resnet_jax.step import TrainState
from resnet_jax.trainer import Trainer


def train_and_evaluate(
    config: ConfigDict,
    directory: str | Path,
    build: Build = build_network,
) -> dict:
    """Trains as `config` says, in a directory, and returns the run's summary.

    Resumes from the newest checkpoint there; a finished run is left as it is. SIGTERM
    or SIGINT end it after the call that is under way, with a checkpoint. Of several
    processes (`hosts`), only the first uses the directory and, unless they are
    streamed, the data set's files.

    `build(config, num_classes)` may build a network other than the config's own, for
    experiments with blocks; the directory is then for that network alone.

    Raises:
      UserError: the config, the data or the directory are not what they should be.
      DivergedError: training cannot continue; what was saved stays.
      WriteError: a file cannot be written; what was saved stays.
      StoppedError: a signal came; what was done is saved.
      LostError: another process was lost; what was saved stays.
    """
    clock, directory = Clock(), Path(directory)
    validate(config)
    if config.seeds > 1:
        raise UserError(
            f"config.seeds={config.seeds}: give 1 here; seeds.run_all trains several"
        )
    image_size = data.known_size(config.dataset)
    parallel.split_cpu(config.batch_size, hosts.count(), image_size)
    parallel.require_devices()
    compilation.use_compilation_cache()
    hosts.print_once(f"workdir   {bucket.display_path(directory)}")
    hosts.run_on_first(lambda: workdir.check(directory, config))
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
                f"another process was lost ({one_line(error, 100)}): "
                "start all processes again to resume from the newest checkpoint"
            ) from None


def _run(
    config: ConfigDict,
    directory: Path,
    build: Build,
    clock: Clock,
    preemption: Preemption,
    stack: contextlib.ExitStack,
) -> dict:
    opened = opening.open_run(config, directory, build, stack)
    trainer = Trainer(config, opened.dataset, build)
    made_by = _made_by(trainer, build)
    if opened.newest:
        hosts.run_on_first(
            lambda: opening.require_resumable(config, directory, trainer, opened)
        )
        done, total = opened.summary, trainer.plan.total_steps
        if done and done["steps"] == opened.newest[0] == total:
            return opening.finished(config, directory, done, made_by)
        clock.add(opened.newest[1]["clock"])
    trainer.begin_compiling()  # while the state is made
    state, step, changes = opening.begin(config, directory, trainer, opened, made_by)
    state = trainer.place(state)
    trainer.compile()
    clock.compiling += trainer.compile_seconds
    hosts.print_once(f"compiled  in {trainer.compile_seconds:.1f} s")
    plan = trainer.plan
    recorder = Recorder(
        directory if hosts.is_first() else None, opened.rows, step, plan
    )
    stack.callback(recorder.close)
    preemption.started()

    def record() -> dict:
        return {
            "clock": clock.record(),
            "total_steps": plan.total_steps,
            "examples": plan.examples,
            "changes": changes,
            "provenance": made_by,
            "config": workdir.as_json(config),
        }

    def received() -> int:
        """The signal that came to any of the processes; 0: none."""
        return hosts.max_over_processes(preemption.received or 0)

    saved_step = step if opened.newest else None
    saver = Saver(trainer, opened.checkpoints, recorder, record, saved_step)
    try:
        metrics = _loop(
            config, directory, trainer, state, step, recorder, saver, received, clock
        )
    except DivergedError:
        saver.wait()
        raise
    result = results.summarize(config, opened.dataset, trainer, clock, metrics, made_by)
    if changes:
        result["changes"] = changes
    if hosts.is_first():
        workdir.write_json(directory / "summary.json", result)
    recorder.print_line(
        f"finished  in {clock.total:,.0f} s: {results.sentence(result)}"
    )
    if number := received():
        raise StoppedError(signal.Signals(number), AT_THE_END)
    return result


def _made_by(trainer: Trainer, build: Build) -> dict:
    """The devices, versions and code that train, as a summary names them."""
    made_by = {
        "device": jax.devices()[0].device_kind,
        "device_count": trainer.parallel.device_count,
        **provenance.versions_and_commit(),
    }
    if build is not build_network:
        made_by["build"] = provenance.source_of(build)
    return made_by


def _loop(
    config: ConfigDict,
    directory: Path,
    trainer: Trainer,
    state: TrainState,
    step: int,
    recorder: Recorder,
    saver: Saver,
    received: Callable[[], int],
    clock: Clock,
) -> dict:
    """Trains to the end; returns the last evaluation, on every split."""
    plan, metrics, resumed = trainer.plan, {}, step
    while True:
        saver.poll()
        epoch = plan.epoch(step)
        last = step == plan.total_steps
        ended = 0 < step == plan.epoch_end(epoch)
        due = last or (ended and epoch % config.checkpoint.every == 0)
        evaluates = due or (ended and epoch % config.eval_every == 0)
        # Evaluate, then save: metrics.jsonl says whether a checkpoint is the best.
        if last or (evaluates and not recorder.evaluated(step)):
            start = time.perf_counter()
            metrics = trainer.evaluate(state, last, lambda: received() > 0)
            clock.evaluating += time.perf_counter() - start
            if metrics is not None:
                recorder.epoch_row(step, epoch, metrics)
        elif ended and step != resumed:
            recorder.epoch_row(step, epoch, {})
        number = received()
        # Saving may take all devices, so no process may decide on it by its own clock.
        late = 0 < config.checkpoint.every_minutes <= saver.minutes
        due |= hosts.max_over_processes(int(late)) > 0
        due |= number > 0 or recorder.best_step == step
        if due and (step or last) and saver.saved_step != step:
            saver.save(state, step)
        if number:
            saver.wait()
            where = f"at step {step:,} of {plan.total_steps:,}"
            where += ", which is saved" if saver.saved_step == step else ""
            raise StoppedError(signal.Signals(number), where)
        if last:
            saver.wait()
            return metrics
        stop, trace = plan.call_end(step), contextlib.nullcontext()
        # The first call warms up.
        if config.profile and step == plan.call_end(resumed) and hosts.is_first():
            trace = profile.traced(trainer, directory, step, stop)
        with trace:
            start = time.perf_counter()
            state, means = trainer.train(state, step, stop)
            clock.training += time.perf_counter() - start
        require_finite(means, step, stop, saver.saved_step)
        recorder.train_row(stop, means, float(trainer.learning_rates[stop - 1]))
        step = stop


def _out_of_memory(config: ConfigDict) -> UserError:
    remat = "" if config.model.remat else "config.model.remat=True, or "
    return UserError(
        f"the device's memory is too small for config.batch_size={config.batch_size}: "
        f"give {remat}in another --workdir, a smaller batch or "
        f"config.optimizer.accumulate={2 * config.optimizer.accumulate}"
    )
