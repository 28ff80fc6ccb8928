import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from configs import common
from experiments import parallel_runs, sweep
from resnet_jax import UserError, command_line, workdir
from resnet_jax.config import flat
from resnet_jax.preemption import StoppedError
from resnet_jax.seeds import mean_and_interval
from tests.quick import ENVIRONMENT

ROOT = Path(__file__).parents[1]
FIELDS = flat(common.default())
CONFIG = [
    f"--config={ROOT}/configs/digits.py",
    "--config.model.version=1",
    "--config.model.depth=8",
    "--config.model.width=4",
    "--config.steps=40",
    "--config.dataset.train_split=train[:200]",
    "--config.dataset.validation_split=train[200:300]",
    "--config.batch_size=8",
    "--config.schedule.warmup_epochs=0",
]


def call(*arguments: str) -> int:
    return command_line.call(sweep.main, ["sweep", *arguments])


def test_a_grid_is_read():
    text = "optimizer.learning_rate=.05, .1; schedule.boundaries=(0.5,0.75),(0.3,)"
    assert sweep.parse_grid(text, FIELDS) == {
        "optimizer.learning_rate": [".05", ".1"],
        "schedule.boundaries": ["(0.5,0.75)", "(0.3,)"],
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--grid=learning_rate=1"], "did you mean 'optimizer.learning_rate'?"),
        (["--grid=model.dept=20"], "did you mean 'model.depth'?"),
        (["--grid=optimizer=sgd"], "'optimizer' is not a field"),
        (["--grid=model.depth"], "write FIELD=VALUE,VALUE"),
        (["--grid=model.depth=8,8"], "has a value twice"),
        (["--grid=seed=1,2"], "seed cannot be swept: give --config.seed (the first)"),
        (["--grid=model.depth=8,9"], "config.model.depth=9: "),
        (["--grid=model.depth=8,x"], "--config.model.depth='x': give a whole number"),
        (["--grid=optimizer.learning_rate=0.1,-1"], "learning_rate=-1.0: give more"),
        (["--grid=model.depth=8", "--seeds=0"], "--seeds=0: give at least 1"),
        (["--grid=model.depth=8", "--config.seeds=2"], "config.seeds=2: give --seeds"),
        ([], "--grid is missing: give one"),
        (
            ["--grid=model.depth=8", "--config.dataset.validation_split="],
            "config.dataset.validation_split='': give one",
        ),
    ],
)
def test_mistakes_are_sentences_and_start_nothing(
    given, told, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parallel_runs, "start", pytest.fail)
    assert call(*CONFIG, *given) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_tenth_is_held_back_by_default_and_the_command_trains_on_all(tmp_path):
    argv = ["sweep", CONFIG[0], "--config.seed=3", "--seeds=2"]
    argv += ["--grid=model.width=4,8", f"--out={tmp_path}"]
    asked = sweep.parse(argv)
    assert [cell for cell, _ in asked.cells] == [
        {"model.width": "4"},
        {"model.width": "8"},
    ]
    seeds, widths = zip(
        *((job.config.seed, job.config.model.width) for job in asked.jobs), strict=True
    )
    assert seeds == (3, 4, 3, 4)
    assert widths == (4, 4, 8, 8)
    for job in asked.jobs:
        assert job.config.dataset.train_split == "train[:90%]"
        assert job.config.dataset.validation_split == "train[90%:]"
    assert not any("split" in word for word in asked.command)
    assert asked.on_all
    assert len({job.directory for job in asked.jobs}) == 4


def test_runs_of_another_length_are_not_compared_with_new_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(
        workdir,
        "check",
        lambda path, _: ["epochs 1 -> 3"] if path.parent.name.endswith("8") else [],
    )
    argv = ["sweep", *CONFIG, "--grid=model.width=4,8", f"--out={tmp_path}"]
    with pytest.raises(UserError, match=r"width=8/seed0 .* \(epochs 1 -> 3\), which"):
        sweep.parse(argv)


def test_splits_that_were_given_and_a_flagfile_are_those_of_every_run(tmp_path):
    (tmp_path / "flags").write_text("--config.epochs=3\n")
    given = [*CONFIG, f"--flagfile={tmp_path}/flags", "--noconfig.optimizer.nesterov"]
    argv = ["sweep", *given, "--seeds=1", "--grid=model.width=4", f"--out={tmp_path}"]
    asked = sweep.parse(argv)
    assert not asked.on_all
    assert asked.command[3:] == given
    assert [job.config.epochs for job in asked.jobs] == [3]
    assert not asked.jobs[0].config.optimizer.nesterov
    assert asked.jobs[0].config.dataset.train_split == "train[:200]"


STAND_IN = """
import json, os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[1])

def stop(*_):
    time.sleep(1)  # while it saves
    (out.parent / "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
with (out.parent / "order").open("a") as file:
    print(out.name, os.environ.get("CUDA_VISIBLE_DEVICES"), file=file, flush=True)
time.sleep(float(sys.argv[2]))
out.mkdir()
test = {"test_accuracy": 0.5, "test_loss": 1.0, "test_examples": 360}
summary = {"steps": 2, "epochs": 0.1, "validation_accuracy": 0.5, **test}
(out / "summary.json").write_text(json.dumps(summary))
"""


def stand_ins(monkeypatch, seconds: float):
    def start(job, device):
        command = [sys.executable, "-c", STAND_IN, str(job.directory), str(seconds)]
        return subprocess.Popen(command, env=device)

    monkeypatch.setattr(parallel_runs, "start", start)


def some_jobs(directory: Path, count: int) -> list[parallel_runs.Job]:
    config = common.default()
    config.steps = 2
    return [parallel_runs.Job(directory / f"run{n}", config, []) for n in range(count)]


def test_each_device_takes_a_run_at_a_time(tmp_path, monkeypatch, capfd):
    stand_ins(monkeypatch, 0.5)
    devices = [{"CUDA_VISIBLE_DEVICES": name} for name in ("4", "7")]
    parallel_runs.run_all(some_jobs(tmp_path, 4), devices)
    order = [line.split() for line in (tmp_path / "order").read_text().splitlines()]
    assert {name for name, _ in order[:2]} == {"run0", "run1"}
    assert sorted(device for _, device in order) == ["4", "4", "7", "7"]
    assert capfd.readouterr().out.count("of 4") == 4


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_ends_the_runs_and_is_told(tmp_path, monkeypatch, signals):
    """A second one comes while the run saves, which it still does."""
    stand_ins(monkeypatch, 60)
    for number in range(signals):
        threading.Timer(1 + 0.3 * number, signal.raise_signal, [signal.SIGTERM]).start()
    start = time.monotonic()
    with pytest.raises(StoppedError, match="by SIGTERM") as raised:
        parallel_runs.run_all(some_jobs(tmp_path, 2), [{}])
    assert raised.value.exit_status == 143
    assert (tmp_path / "saved").exists()
    assert time.monotonic() - start < 30
    assert not (tmp_path / "run0").exists()


def test_a_failure_is_told_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        parallel_runs, "start", lambda *_: subprocess.Popen([sys.executable, "-c", ""])
    )
    (job,) = some_jobs(tmp_path, 1)
    job.log.write_text("data\nerror: the disk is full\n")
    with pytest.raises(UserError, match=r"run0 failed: error: the disk is full \(see"):
        parallel_runs.run_all([job], [{}])


@pytest.mark.parametrize(
    ("answer", "shown", "expected"),
    [
        ("cpu 2", None, [None]),
        ("gpu 1", None, [None]),
        ("gpu 3", None, ["0", "1", "2"]),
        ("gpu 2", "3,5", ["3", "5"]),
        ("", None, [None]),
    ],
)
def test_devices(answer, shown, expected, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    found = subprocess.CompletedProcess([], 0, stdout=answer)
    monkeypatch.setattr(parallel_runs.subprocess, "run", lambda *_, **__: found)
    assert [d.get("CUDA_VISIBLE_DEVICES") for d in parallel_runs.devices()] == expected


def test_a_run_that_may_go_on_is_not_done(tmp_path):
    (job,) = some_jobs(tmp_path, 1)
    assert parallel_runs.outcome(job) is None
    job.directory.mkdir()
    written = {"steps": 23, "epochs": 23 * 128 / 1437}
    written |= {"test_accuracy": 0.5, "test_loss": 1.0, "test_examples": 360}
    (job.directory / "summary.json").write_text(json.dumps(written))
    job.config.update(steps=0, epochs=2)
    assert parallel_runs.outcome(job) == written
    job.config.epochs = 3
    assert parallel_runs.outcome(job) is None
    job.log.write_text("x\nerror: training diverged: loss is no longer finite\n")
    assert parallel_runs.outcome(job) is None  # the log may be of another config
    (job.directory / "config.json").write_text(job.config.to_json())
    assert parallel_runs.outcome(job) == {}
    job.config.optimizer.clip_norm = 1.0
    assert parallel_runs.outcome(job) is None


def cell(name: str, accuracies: list[float], diverged: int = 0) -> dict:
    told = {"validation_accuracy": accuracies, "diverged": diverged, "seconds": [1.0]}
    return {"cell": {"model.depth": name}} | told | mean_and_interval(accuracies)


def test_the_best_is_of_those_that_train_surely():
    found = [cell("8", [0.7, 0.8]), cell("14", [0.9], 1), cell("20", [0.75, 0.85])]
    assert sweep.best(found)["cell"] == {"model.depth": "20"}
    assert "| 14 | 90.00% | - | - | 1, 1 diverged | 1 |" in sweep.table(found)
    with pytest.raises(UserError, match="all runs diverged"):
        sweep.best([cell("8", [], 2)])


def test_cells_that_are_as_good_are_counted():
    chosen = cell("8", [0.84, 0.85, 0.86])
    others = [cell("14", [0.84]), cell("20", [0.7, 0.8]), cell("26", [], 2)]
    assert sweep.as_good([chosen, *others], chosen) == 1
    alone = cell("8", [0.9])
    assert sweep.as_good([alone, *others], alone) == 0


def test_bars_are_the_intervals_and_end_with_the_axis():
    found = [cell("8", [0.9, 1.0]), cell("14", [0.1, 0.9]), cell("20", [0.5])]
    (axes,) = sweep.draw({"model.depth": ["8", "14", "20"]}, found).axes
    (bars,) = axes.collections
    ends = [segment[:, 1] for segment in bars.get_segments()]
    expected = [found[0]["interval"], found[1]["interval"], (0.5, 0.5)]
    np.testing.assert_allclose(ends, 100 * np.array(expected))
    assert axes.get_ylim()[0] >= 0
    assert axes.get_ylim()[1] <= 100


def test_best_values_at_the_ends_of_their_axes_are_told():
    grid = {"optimizer.learning_rate": [".05", "0.1", "1e-3"]}
    grid |= {"model.depth": ["8", "20"], "model.scan": ["true", "false"]}

    def told(rate: str) -> list[str]:
        cell = {"optimizer.learning_rate": rate, "model.depth": "8"}
        return sweep.at_the_ends(grid, cell | {"model.scan": "true"})

    assert told(".05") == []
    (low,), (high,) = told("1e-3"), told("0.1")
    assert low.startswith("optimizer.learning_rate=1e-3 is at an end of its axis")
    assert "smaller" in low
    assert "larger" in high


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parallel_runs, "devices", lambda: [ENVIRONMENT])
    out = f"--out={tmp_path / 'out'}"
    arguments = ["--grid=optimizer.learning_rate=0.1,1e6", "--seeds=1", out]
    assert call(*CONFIG, *arguments) == 0
    told = capsys.readouterr().out
    assert "2 runs in" in told
    assert "diverged" in told
    assert "; to train it on the same split:\n" in told
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [cell["diverged"] for cell in content["cells"]] == [0, 1]
    for kind in ("md", "png", "svg"):
        assert (tmp_path / "out" / f"sweep.{kind}").exists()
    command = shlex.split(told.splitlines()[-1])
    assert command[:3] == ["python", "-m", "resnet_jax.main"]
    assert "--config.optimizer.learning_rate=0.1" in command
    *arguments_of_main, directory = command[3:]
    assert sweep._config(arguments_of_main).optimizer.learning_rate == 0.1
    assert directory.startswith(f"--workdir={tmp_path / 'out' / 'best'}/")
    monkeypatch.setattr(parallel_runs, "start", pytest.fail)
    assert call(*CONFIG, *arguments) == 0
    assert ", 0 to train" in capsys.readouterr().out
