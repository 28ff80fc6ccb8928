"""Opening a run: its directory and data, and the state that it starts from."""

import contextlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import common
from resnet_jax import (
    UserError,
    bucket,
    data,
    finetune,
    hosts,
    results,
    trained,
    workdir,
)
from resnet_jax.checkpoint import Checkpoints
from resnet_jax.config import Build
from resnet_jax.metrics import read_rows
from resnet_jax.step import TrainState
from resnet_jax.trainer import Trainer
from resnet_jax.weights import Weights


class Opened(NamedTuple):
    """What the first process finds in a run's directory, and the run's data.

    Attributes:
      newest: step and record of the newest checkpoint, if there is one.
      rows: of metrics.jsonl.
      summary: of a run that had ended.
      dataset: the data.
      weights: those of `config.init_from`, for a run that starts with them.
      checkpoints: where states are saved; None except in the first process.
    """

    newest: tuple[int, dict] | None
    rows: list[dict]
    summary: dict | None
    dataset: data.Dataset
    weights: Weights | None
    checkpoints: Checkpoints | None = None


def open_run(
    config: ConfigDict, directory: Path, build: Build, stack: contextlib.ExitStack
) -> Opened:
    """Claims the directory until `stack` is left, and loads data and weights.

    Raises:
      UserError: another process has the directory; or it, the data or the weights are
        not what they should be.
    """
    checkpoints = None  # cannot be sent to other processes

    def find() -> Opened:
        nonlocal checkpoints
        stack.enter_context(workdir.claim(directory))
        workdir.check(directory, config)  # now that nobody else can change it
        checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint.keep)
        stack.callback(checkpoints.close)
        dataset = data.load(config.dataset)
        for note in dataset.notes:
            hosts.print_once(note)
        newest = checkpoints.newest()
        begins = bool(config.init_from) and not newest
        return Opened(
            newest=newest,
            rows=read_rows(directory),
            summary=workdir.read_summary(directory),
            dataset=dataset,
            weights=finetune.read(config.init_from, build) if begins else None,
        )

    opened = hosts.run_on_first(find)
    if hosts.count() > 1:
        data.reopen(opened.dataset, config.dataset)
    return opened._replace(checkpoints=checkpoints)


def require_resumable(
    config: ConfigDict, directory: Path, trainer: Trainer, opened: Opened
) -> None:
    """Raises UserError if data or network have changed, or the run now ends earlier."""
    (step, record), plan = opened.newest, trainer.plan
    seen = record["examples"]
    trained.require_same_data(directory, opened.dataset, trainer.normalization, seen)
    before = trained.read_inputs(directory).network
    trained.require_same_network(
        directory, before, trained.own_network(trainer.net, config)
    )
    if step > plan.total_steps:
        raise UserError(
            f"--workdir={directory} is at step {step:,}, but config.epochs or "
            f"config.steps ends the run at {plan.total_steps:,}: give more, or "
            "another --workdir"
        )


def finished(config: ConfigDict, directory: Path, summary: dict, made_by: dict) -> dict:
    """Reports that a run has ended, and whether by other code; returns its summary."""
    step = f"{summary['steps']:,}"
    hosts.print_once(f"finished  at step {step} of {step}: {results.sentence(summary)}")
    then, now = (
        {name: made.get(name) for name in ("git_commit", "build")}
        for made in (summary, made_by)
    )
    if changed := workdir.differences(then, now):
        hosts.print_once(
            f"warning   by different code ({'; '.join(changed)}): to train with the "
            f"current code, remove {bucket.display_path(directory)} or give another "
            "--workdir"
        )
    if hosts.is_first():  # a start of another length may have left its own
        workdir.write_json(directory / "config.json", workdir.as_json(config))
    return summary


def begin(
    config: ConfigDict,
    directory: Path,
    trainer: Trainer,
    opened: Opened,
    made_by: dict,
) -> tuple[TrainState, int, list[dict]]:
    """Makes or restores the state; writes and prints what the run starts with.

    Returns:
      The state, on the host; its step; and what differed from the checkpoint, at each
      start that resumed.
    """
    if opened.newest:
        step, saved = opened.newest
        state = _restored(trainer, opened.checkpoints, step)
        before = workdir.as_json(common.completed(saved["config"]))
        changed = workdir.differences(before, workdir.as_json(config))
        changed += workdir.differences(saved["provenance"], made_by)
        changes = saved["changes"]
        changes += [{"step": step, "changed": changed}] if changed else []
    else:
        state, step = _first_state(config, trainer, opened), 0
        changed, changes = [], []
    if hosts.is_first():
        workdir.write_json(directory / "config.json", workdir.as_json(config))
        trained.write_inputs(
            directory,
            opened.dataset,
            trainer.normalization,
            trained.own_network(trainer.net, config),
        )
        results.print_start(config, opened.dataset, trainer, changed, opened.newest)
    return state, step, changes


def _restored(
    trainer: Trainer, checkpoints: Checkpoints | None, step: int
) -> TrainState:
    like = trainer.blank_state().split()
    return TrainState.join(hosts.run_on_first(lambda: checkpoints.restore(step, like)))


def _first_state(config: ConfigDict, trainer: Trainer, opened: Opened) -> TrainState:
    """The state of step 0, with the weights that `config.init_from` names, if any."""
    state = trainer.new_state()
    if not opened.weights:
        return state
    begin_with = partial(
        finetune.begin_with,
        opened.weights,
        config.init_from,
        state,
        opened.dataset.class_names,
        model=config.model,
        scale=trainer.normalization[1],
        trains=trainer.plan.total_steps > 0,
    )
    state, taken = hosts.run_on_first(begin_with)
    hosts.print_once(f"weights   of {taken}")
    return state
