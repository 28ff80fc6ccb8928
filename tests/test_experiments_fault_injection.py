import json
import shutil
import signal
import subprocess

import pytest

from experiments import fault_injection
from tests.quick import ENVIRONMENT

SHORT = ("--config.epochs=3",)


@pytest.fixture(scope="module")
def quick_processes():
    """What starts in this module compiles fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", ENVIRONMENT["XLA_FLAGS"])
        yield


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, quick_processes):
    directory = tmp_path_factory.mktemp("runs") / "untouched"
    assert fault_injection.start(directory, arguments=SHORT) == {"status": 0}
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "aims"),
    [
        (signal.SIGKILL, [("saving", 1, 0.1), ("committing", 2, 0.0)]),
        (signal.SIGKILL, [("start-up", 1, 3.0), ("training", 6, 0.02)]),
        (signal.SIGTERM, [("saving", 1, 0.0), ("evaluation", 1, 0.0)]),
    ],
)
def test_interrupted_run_is_equal_to_the_bit(untouched, tmp_path, number, aims):
    run = tmp_path / "run"
    starts = [fault_injection.start(run, number, aim, SHORT) for aim in aims]
    assert [ended["phase"] for ended in starts] == [phase for phase, *_ in aims]
    starts.append(fault_injection.start(run, arguments=SHORT))
    assert fault_injection.faults(starts, number) == []
    assert fault_injection.differences(untouched, run) == []


@pytest.mark.slow
def test_differences_are_found(untouched, tmp_path):
    changed = shutil.copytree(untouched, tmp_path / "run")
    with (changed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "epoch": 6.4, "test_accuracy": 1.0}\n')
    summary = json.loads((changed / "summary.json").read_text())
    (changed / "summary.json").write_text(json.dumps(summary | {"test_loss": 0.0}))
    found = fault_injection.differences(untouched, changed)
    assert found == ["metrics.jsonl", "summary.json"]
    other = tmp_path / "other" / "run"
    other.parent.mkdir()
    fault_injection.start(other, arguments=(*SHORT, "--config.seed=1"))
    assert "arrays" in fault_injection.differences(untouched, other)


def test_a_run_that_ignores_its_signal_was_not_finished_before(tmp_path, monkeypatch):
    class Ignores:
        returncode = 0

        def poll(self):
            return None

        def send_signal(self, _):
            (tmp_path / "run" / "summary.json").touch()

        def wait(self):
            return 0

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: Ignores())
    aim = ("start-up", 1, 0.0)
    ended = fault_injection.start(tmp_path / "run", signal.SIGTERM, aim)
    assert not ended["finished"]
    assert fault_injection.faults([ended], signal.SIGTERM) == ["exit status 0"]


def test_wrong_ends_are_found():
    ended = {"phase": "training", "finished": False, "seconds_to_end": 31.5}
    assert fault_injection.faults([{"status": 0}], signal.SIGTERM) == []
    assert fault_injection.faults([{"status": 1}], signal.SIGTERM)
    assert fault_injection.faults([ended | {"status": 143}], signal.SIGTERM) == [
        "31.5 s to end"
    ]
    assert fault_injection.faults([ended | {"status": 143}], signal.SIGKILL)


@pytest.mark.parametrize(
    ("phase", "finished", "status", "right"),
    [
        ("training", False, 143, True),
        ("training", False, 0, False),
        ("training", False, -signal.SIGTERM, False),
        ("saving", True, 0, True),
        ("saving", True, 143, True),  # it came while the last save was made
        ("start-up", False, -signal.SIGTERM, True),
        ("start-up", False, 143, True),
    ],
)
def test_how_a_process_may_end_by_sigterm(phase, finished, status, right):
    ended = {"phase": phase, "finished": finished, "status": status}
    assert (not fault_injection.faults([ended], signal.SIGTERM)) == right
