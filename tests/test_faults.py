"""What becomes of a run when its process, its disk or its files fail."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from resnet_jax import UserError, checkpoint, data, preemption, train, workdir
from resnet_jax.divergence import DivergedError
from resnet_jax.metrics import read_rows
from resnet_jax.trainer import Trainer
from resnet_jax.workdir import WriteError
from tests.test_train import digits_config, same_bits, saved_arrays

pytestmark = pytest.mark.usefixtures("quick_trainings")


def config(**changes):
    """Two epochs of 23 steps, each saved."""
    return digits_config(**{"steps": 45, "checkpoint.every": 1, **changes})


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quick_trainings):
    directory = tmp_path_factory.mktemp("straight") / "run"
    train.train_and_evaluate(config(), directory)
    return directory


@pytest.fixture
def run(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / "run")


def assert_equal_runs(first, second, besides=frozenset()):
    assert (first / "metrics.jsonl").read_bytes() == (
        second / "metrics.jsonl"
    ).read_bytes()
    assert same_bits(saved_arrays(first, config()), saved_arrays(second, config()))
    summaries = [json.loads((d / "summary.json").read_text()) for d in (first, second)]
    times = {
        "seconds",
        "compile_seconds",
        "train_seconds",
        "evaluation_seconds",
        "images_per_second",
        "images_per_second_per_device",
        "flops_per_second",
        "mfu",
        "peak_memory_bytes",
    }
    for summary in summaries:
        for name in times | besides:
            summary.pop(name, None)
    assert summaries[0] == summaries[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("method", "call"), [("train", 2), ("evaluate", 1)])
def test_signal_saves_and_the_same_command_goes_on(
    straight, tmp_path, monkeypatch, number, method, call
):
    original, calls = getattr(Trainer, method), []

    def signalled(self, *args):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args)

    monkeypatch.setattr(Trainer, method, signalled)
    with pytest.raises(preemption.StoppedError, match="which is saved") as raised:
        train.train_and_evaluate(config(), tmp_path / "run")
    assert raised.value.exit_status == 128 + number
    assert not (tmp_path / "run" / ".lock").exists()
    monkeypatch.undo()
    train.train_and_evaluate(config(), tmp_path / "run")
    assert_equal_runs(straight, tmp_path / "run")


@pytest.mark.slow
def test_signal_at_the_end_ends_the_command_too(straight, tmp_path, monkeypatch):
    original = train.results.summarize

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(train.results, "summarize", signalled)
    with pytest.raises(preemption.StoppedError, match="after the last update"):
        train.train_and_evaluate(config(), tmp_path / "run")
    assert_equal_runs(straight, tmp_path / "run")


@pytest.mark.slow
def test_processes_agree_when_a_timed_save_is_due(tmp_path, monkeypatch):
    asked, ask = [], train.hosts.max_over_processes
    monkeypatch.setattr(
        train.hosts,
        "max_over_processes",
        lambda number: asked.append(number) or ask(number),
    )
    often = config(**{"checkpoint.every": 10, "checkpoint.every_minutes": 1e-9})
    train.train_and_evaluate(often, tmp_path / "run")
    assert 1 in asked
    saved = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert saved == {"44", "45"}  # the last two calls


@pytest.mark.slow
def test_memory_that_is_too_small_is_told_with_what_to_do(tmp_path, monkeypatch):
    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(Trainer, "train", fail)
    with pytest.raises(
        UserError, match=r"config\.batch_size=64.*model\.remat=True, or"
    ):
        train.train_and_evaluate(config(), tmp_path / "run")


@pytest.mark.slow
def test_deleted_metrics_are_missed_by_no_one(run, straight):
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "45")
    train.train_and_evaluate(config(), run)
    assert same_bits(saved_arrays(straight, config()), saved_arrays(run, config()))


def signalled_twice(seconds_between: float) -> subprocess.CompletedProcess:
    """A process that gets SIGTERM twice, and ends when it has seen one."""
    script = (
        "import os, signal, time\n"
        "from resnet_jax.preemption import Preemption\n"
        "with Preemption() as preemption:\n"
        "    preemption.started()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    while not preemption.received: time.sleep(.01)\n"
        f"    time.sleep({seconds_between})\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(1)\n"
        "    print('saved')\n"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True)


def test_second_signal_ends_at_once():
    ended = signalled_twice(seconds_between=1.1)
    assert ended.returncode == 143
    assert b"on a second signal" in ended.stderr
    assert not ended.stdout


def test_a_signal_that_is_sent_twice_is_one():
    ended = signalled_twice(seconds_between=0.1)
    assert b"after the last update, which is saved" in ended.stderr
    assert b"saved" in ended.stdout


def test_a_signal_while_saving_is_no_write_error(tmp_path, monkeypatch):
    def interrupted():
        os.kill(os.getpid(), signal.SIGTERM)

    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    monkeypatch.setattr(checkpoints._manager, "check_for_errors", interrupted)
    stopped = pytest.raises(preemption.StoppedError, match="while starting")
    with stopped, preemption.Preemption():
        checkpoints.poll()
    checkpoints.close()


def test_read_error_is_not_told_as_a_write_error(tmp_path, monkeypatch):
    def unreadable(_):
        raise PermissionError(13, "Permission denied", "sets/digits")

    monkeypatch.setattr(data, "load", unreadable)
    with pytest.raises(PermissionError):
        train.train_and_evaluate(config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unfinished_checkpoint_is_removed_by_who_writes(tmp_path):
    unfinished = tmp_path / "45.orbax-checkpoint-tmp" / "variables.orbax-checkpoint-tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "half").write_text("x")
    checkpoint.Checkpoints(tmp_path, keep=None).close()
    assert (unfinished / "half").exists()
    checkpoint.Checkpoints(tmp_path, keep=2).close()
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_best_checkpoint_that_is_damaged_is_a_sentence(run):
    (run / "checkpoints" / "23" / "record" / "metadata").unlink()
    checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep=None)
    with pytest.raises(UserError, match=r"checkpoints/23 is damaged .*: restore it"):
        checkpoints.require_intact(23)


@pytest.mark.slow
def test_signal_while_starting_leaves_nothing(tmp_path, monkeypatch, capsys):
    compile_programs = Trainer.compile

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        compile_programs(self)

    monkeypatch.setattr(Trainer, "compile", signalled)
    with pytest.raises(preemption.StoppedError, match="while starting"):
        train.train_and_evaluate(config(), tmp_path / "run")
    assert "saving" not in capsys.readouterr().err
    monkeypatch.undo()
    assert train.train_and_evaluate(config(), tmp_path / "run")["steps"] == 45


def test_signal_while_starting_is_not_said_to_save(capsys):
    """Where the thread that sees it too comes late."""

    class Late(preemption.Preemption):
        def _watch(self) -> None:
            while self._starting:
                time.sleep(0.01)
            super()._watch()

    def signalled() -> None:
        with Late():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # until the signal's handler ends it

    with pytest.raises(preemption.StoppedError, match="while starting"):
        signalled()
    assert capsys.readouterr().err == ""


def test_signal_between_the_end_and_the_return_is_not_lost():
    """So that of several seeds the next one does not begin."""

    def signalled() -> None:
        with preemption.Preemption() as running:
            running.started()
            os.kill(os.getpid(), signal.SIGTERM)
            while not running.received:
                time.sleep(0.01)

    with pytest.raises(preemption.StoppedError, match="after the last update"):
        signalled()


@pytest.mark.slow
def test_change_is_recorded_although_the_start_that_made_it_died(
    straight, tmp_path, monkeypatch
):
    run = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "45")
    (run / "summary.json").unlink()

    def die(self):
        raise RuntimeError("killed")

    with monkeypatch.context() as dying:
        dying.setattr(Trainer, "compile", die)
        with pytest.raises(RuntimeError, match="killed"):
            train.train_and_evaluate(config(parallel="pmap"), run)
    summary = train.train_and_evaluate(config(parallel="pmap"), run)
    (change,) = summary["changes"]
    assert change["step"] == 23
    assert "parallel 'jit' -> 'pmap'" in change["changed"]


def test_results_without_checkpoints_are_not_taken_for_a_new_run(run):
    shutil.rmtree(run / "checkpoints")
    content = (run / "config.json").read_bytes()
    for changes in ({}, {"optimizer.learning_rate": 0.01}):
        with pytest.raises(UserError, match="whose checkpoints are gone"):
            train.train_and_evaluate(config(**changes), run)
    assert (run / "config.json").read_bytes() == content


def test_finished_run_keeps_its_config(run):
    content = json.loads((run / "config.json").read_text())
    longer = content | {"steps": 90}  # of a start that died
    (run / "config.json").write_text(json.dumps(longer))
    train.train_and_evaluate(config(), run)
    assert json.loads((run / "config.json").read_text()) == content


@pytest.mark.slow
@pytest.mark.parametrize("how", ["truncated", "zeros", "deleted", "bit"])
@pytest.mark.parametrize(
    "pattern",
    ["record/metadata", "variables/_METADATA", "variables/manifest.ocdbt",
     "optimizer/ocdbt.process_0/d/*", "manifest.json"],
)  # fmt: skip
def test_damaged_checkpoint_is_put_aside_for_the_one_before(
    run, straight, capsys, how, pattern
):
    (run / "summary.json").unlink()
    files = (run / "checkpoints" / "45").glob(pattern)
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 128
    elif how == "zeros":
        content = bytes(len(content))
    path.unlink()
    if how != "deleted":
        path.write_bytes(content[: len(content) // 2 if how == "truncated" else None])
    step, _ = checkpoint.Checkpoints(run / "checkpoints", keep=None).newest()
    assert step == 23
    assert "damaged   checkpoint of step 45" in capsys.readouterr().err
    if (how, pattern) == ("bit", "optimizer/ocdbt.process_0/d/*"):
        train.train_and_evaluate(config(), run)
        assert (run / "checkpoints" / "damaged-45").is_dir()
        assert_equal_runs(straight, run)


def test_manifest_that_is_no_list_of_files_is_damage(run, capsys):
    (run / "checkpoints" / "45" / "manifest.json").write_text("[]")
    step, _ = checkpoint.Checkpoints(run / "checkpoints", keep=None).newest()
    assert step == 23
    assert "damaged   checkpoint of step 45" in capsys.readouterr().err


def test_all_damaged_is_refused_and_nothing_changes(run):
    for step in (23, 45):
        (run / "checkpoints" / str(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        train.train_and_evaluate(config(), run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"23", "45"}


def test_newer_format_is_refused(run, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 0)
    with pytest.raises(
        UserError, match="has format 1, but this version reads only up to 0"
    ):
        train.train_and_evaluate(config(), run)


# The threads of TensorStore tell their errors too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_full_disk_ends_the_run_and_keeps_what_was_saved(straight, tmp_path):
    train.train_and_evaluate(config(steps=23), tmp_path / "run")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"File too large.*same command"):
            train.train_and_evaluate(config(), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "checkpoints" / "23").is_dir()
    train.train_and_evaluate(config(), tmp_path / "run")
    arrays = [saved_arrays(d, config()) for d in (straight, tmp_path / "run")]
    assert same_bits(*arrays)


@contextlib.contextmanager
def read_only(directory):
    """Root may write everywhere, and so becomes another user for a while."""
    root = os.geteuid() == 0
    directories = [path for path in (directory, *directory.rglob("*")) if path.is_dir()]
    for path in directories:
        path.chmod(0o555)
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in directories:
            path.chmod(0o755)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_directory_that_turns_read_only_ends_the_run(straight, monkeypatch):
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        Path(temporary).chmod(0o755)  # for the other user
        run = Path(temporary) / "run"
        train.train_and_evaluate(config(steps=23), run)
        compile_programs = Trainer.compile

        def compiled(self):
            compile_programs(self)
            stack.enter_context(read_only(run))

        monkeypatch.setattr(Trainer, "compile", compiled)
        with pytest.raises(WriteError, match=r"Permission denied.*same command"):
            train.train_and_evaluate(config(), run)
        stack.close()
        monkeypatch.undo()
        assert (run / "checkpoints" / "23").is_dir()
        train.train_and_evaluate(config(), run)
        assert_equal_runs(straight, run, {"changes"})


def test_config_that_was_deleted_is_in_the_checkpoints(run, straight, capsys):
    (run / "config.json").unlink()
    # A saving that was cut off is none of them.
    cut_off = run / "checkpoints" / "46.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "45", cut_off)
    assert workdir.read_config(run).to_json() == config().to_json()
    other = config(**{"model.width": 8})
    with pytest.raises(UserError, match=r"another config \(model.width 4 -> 8\)"):
        train.train_and_evaluate(other, run)
    (run / "summary.json").unlink()
    train.train_and_evaluate(config(), run)
    assert_equal_runs(straight, run)
    assert (run / "config.json").read_bytes() == (straight / "config.json").read_bytes()


def test_arrays_of_another_shape_are_named(run):
    narrow = Trainer(config(**{"model.width": 8}), data.load(config().dataset))
    checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep=None)
    with pytest.raises(UserError, match=r"head/bias|kernel has shape .* instead of"):
        checkpoints.restore(45, narrow.blank_state().split())


def test_lock_that_was_removed_since_it_was_opened_does_not_count(
    tmp_path, monkeypatch
):
    lock, locked = tmp_path / ".lock", []

    def removed_before(file, how):
        if not locked:
            lock.unlink()
        locked.append(file.fileno())
        real(file, how)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", removed_before)
    with workdir.claim(tmp_path):
        assert len(locked) == 2
        assert lock.exists()


def test_full_disk_does_not_keep_the_lock_from_being_taken(tmp_path, monkeypatch):
    """What is written into it is for the reader alone."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workdir.os, "write", full)
    with workdir.claim(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_second_process_is_told_and_a_dead_ones_lock_is_taken_over(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        file.write("process 1 on host")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process 1 on host"):
            train.train_and_evaluate(config(steps=4), tmp_path)
    train.train_and_evaluate(config(steps=4), tmp_path)
    assert read_rows(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_update_that_overflows_is_never_saved(tmp_path, monkeypatch):
    fetch = Trainer.fetch

    def overflown(self, state):
        state = fetch(self, state)
        bad = np.float32(np.inf)
        return state.replace(params={**state.params, "added": bad})

    monkeypatch.setattr(Trainer, "fetch", overflown)
    with pytest.raises(
        DivergedError, match=r": params/added .* step 4 \(none has been saved yet"
    ):
        train.train_and_evaluate(config(steps=4), tmp_path)


@pytest.mark.slow
def test_change_of_length_warns_and_is_recorded(tmp_path, capsys):
    first = config(steps=8, **{"schedule.name": "cosine"})
    train.train_and_evaluate(first, tmp_path)
    longer = config(steps=12, **{"schedule.name": "cosine"})
    summary = train.train_and_evaluate(longer, tmp_path)
    assert "the cosine schedule now spans 12 steps, not 8" in (capsys.readouterr().out)
    assert summary["changes"] == [{"step": 8, "changed": ["steps 8 -> 12"]}]


@pytest.mark.slow
def test_change_of_length_tells_what_else_follows_it(tmp_path, capsys):
    growing = {"augment.sizes": (8,), "augment.size_ends": (0.7,)}
    growing["dataset.image_size"] = 16
    mixing = {"augment.mixup": 0.2, "augment.plain_epochs": 0.1}
    for steps in (4, 8):
        train.train_and_evaluate(config(steps=steps, **growing, **mixing), tmp_path)
    told = capsys.readouterr().out
    assert "schedule now spans" not in told
    assert "size_ends are now fractions of 8 steps: images have 8 pixels" in told
    assert "plain_epochs=0.1 are now the last of 8 steps" in told
