import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from resnet_jax import UserError, command_line, main, report, seeds, train
from resnet_jax.divergence import DivergedError
from resnet_jax.metrics import read_rows
from tests.quick import ENVIRONMENT
from tests.test_hosts import training
from tests.test_train import digits_config, same_bits, saved_arrays

ROOT = Path(__file__).parents[1]
DIGITS = [
    f"--config={ROOT}/configs/digits.py",
    *("--config.model.version=1", "--config.model.depth=8", "--config.model.width=4"),
    "--config.checkpoint.every=1",
    # A rate that does not depend on the number of steps, which is a program's then.
    *("--config.schedule.name=constant", "--config.schedule.warmup_epochs=0"),
]


def small(**changes):
    return digits_config(**{"steps": 4} | changes)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_a_seed_of_several_is_the_single_run_with_that_seed(
    tmp_path, capsys, quick_training
):
    result = seeds.run_all(
        small(seed=3, seeds=2), tmp_path / "all", train.train_and_evaluate
    )
    alone = train.train_and_evaluate(small(seed=4), tmp_path / "seed4")
    assert names(tmp_path / "all") == {"seed3", "seed4", "seeds.json"}
    one = tmp_path / "all" / "seed4"
    assert same_bits(
        saved_arrays(one, small(seed=4)), saved_arrays(tmp_path / "seed4", small())
    )
    for name in ("config.json", "metrics.jsonl"):
        assert (one / name).read_bytes() == (tmp_path / "seed4" / name).read_bytes()
    assert result == json.loads((tmp_path / "all" / "seeds.json").read_text())
    assert result["seeds"] == [3, 4]
    assert result["test_accuracy"][1] == alone["test_accuracy"]
    assert "mean" in capsys.readouterr().out


@pytest.mark.slow
def test_finished_ones_are_skipped_and_a_stopped_one_goes_on(
    tmp_path, capsys, quick_training
):
    made = []

    def run(config, directory):
        if config.seed == 1 and not made:
            half = config.copy_and_resolve_references()
            half.steps = 2
            train.train_and_evaluate(half, directory)
            made.append(1)
            raise KeyboardInterrupt
        return train.train_and_evaluate(config, directory)

    with pytest.raises(KeyboardInterrupt):
        seeds.run_all(small(seeds=2), tmp_path, run)
    assert names(tmp_path) == {"seed0", "seed1"}
    before = (tmp_path / "seed0" / "summary.json").read_bytes()
    capsys.readouterr()
    seeds.run_all(small(seeds=3), tmp_path, run)  # one more than before
    told = capsys.readouterr().out
    assert "finished  at step 4 of 4" in told
    assert "resumed   at step 2 of 4" in told
    assert "seed1 began with another length (steps 2 -> 4), so it differs from" in told
    # It is told at the end, too, and whenever the mean is printed again.
    again = (
        "seed 1 began with another length (steps 2 -> 4 at step 2), so these are not"
    )
    assert again in told
    seeds.run_all(small(seeds=3), tmp_path, run)
    assert again in capsys.readouterr().out
    result = json.loads((tmp_path / "seeds.json").read_text())
    assert result["length_changes"] == ["", "steps 2 -> 4 at step 2", ""]
    assert (tmp_path / "seed0" / "summary.json").read_bytes() == before
    assert names(tmp_path) == {"seed0", "seed1", "seed2", "seeds.json"}


def test_statistics_are_students():
    values = [0.91, 0.93, 0.92, 0.95]
    found = seeds.mean_and_interval(values)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found["interval"] == pytest.approx(list(expected))
    assert found["mean"] == pytest.approx(0.9275)
    assert found["standard_deviation"] == pytest.approx(0.01707825)
    assert seeds.mean_and_interval([0.5]) == {
        "mean": 0.5,
        "standard_deviation": None,
        "interval": None,
    }
    assert seeds.mean_and_interval([])["mean"] is None


def test_interval_of_accuracies_ends_at_one_and_at_zero():
    for values, end in (([0.9, 0.99], 1), ([0.1, 0.01], 0)):
        assert end in seeds.accuracy_interval(values)["interval"]


def test_accuracy_of_zero_counts_as_one(tmp_path):
    tmp_path.joinpath("seed0").mkdir()

    def run(config, directory):
        return {"test_accuracy": float(config.seed)}

    assert seeds.run_all(small(seeds=2), tmp_path, run)["mean"] == 0.5


def test_one_that_diverges_leaves_the_others(tmp_path):
    def run(config, directory):
        if config.seed == 1:
            raise DivergedError("training diverged")
        return {"test_accuracy": 0.5 + config.seed / 10}

    tmp_path.joinpath("seed1").mkdir()
    with pytest.raises(DivergedError, match="of 3 seeds, 1 diverged: try"):
        seeds.run_all(small(seeds=3), tmp_path, run)
    result = json.loads((tmp_path / "seeds.json").read_text())
    assert result["test_accuracy"] == [0.5, None, 0.7]
    assert result["mean"] == pytest.approx(0.6)


@pytest.mark.parametrize("begun", [1, 2])
def test_another_length_is_told_where_not_all_seeds_began_with_it(
    begun, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        "resnet_jax.workdir.is_run", lambda path: path.name[-1] in "012"[:begun]
    )
    monkeypatch.setattr("resnet_jax.workdir.check", lambda *_: ["steps 2 -> 4"])
    seeds._check(tmp_path / "all", dict.fromkeys(range(2), small()))
    assert ("began with another length" in capsys.readouterr().out) == (begun == 1)


def test_what_would_end_a_later_seed_is_refused_before_the_first(
    tmp_path, quick_training
):
    train.train_and_evaluate(small(seed=1), tmp_path / "all" / "seed1")
    changed = small(**{"seeds": 2, "optimizer.momentum": 0.5})
    with pytest.raises(UserError, match=r"seed1 holds a run with another config"):
        seeds.run_all(changed, tmp_path / "all", pytest.fail)
    with pytest.raises(UserError, match="holds a run of one seed: give another"):
        seeds.run_all(changed, tmp_path / "all" / "seed1", pytest.fail)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--config.seeds=0"], "config.seeds=0: give at least 1"),
        (["--config.seeds=two"], "give a whole number"),
        (
            ["--config.seed=4294967295", "--config.seeds=2"],
            "config.seeds=2: give at most 1",
        ),
    ],
)
def test_seeds_that_cannot_be(given, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command_line.call(main.main, ["main", *DIGITS, *given]) == 2
    assert told in capsys.readouterr().err
    assert not names(tmp_path)


@pytest.mark.slow
def test_by_default_they_are_where_single_runs_would_be(
    tmp_path, monkeypatch, quick_training
):
    monkeypatch.chdir(tmp_path)
    argv = ["main", *DIGITS, "--config.steps=2"]
    assert command_line.call(main.main, [*argv, "--config.seed=1"]) == 0
    before = (tmp_path / "runs/digits/seed1/summary.json").read_bytes()
    assert command_line.call(main.main, [*argv, "--config.seeds=2"]) == 0
    assert names(tmp_path / "runs/digits") == {"seed0", "seed1", "seeds.json"}
    assert (tmp_path / "runs/digits/seed1/summary.json").read_bytes() == before
    assert (tmp_path / "runs/digits/seed0/report.html").exists()


@pytest.mark.slow
def test_a_signal_ends_the_whole_and_the_same_command_goes_on(
    tmp_path, monkeypatch, quick_training
):
    command = [sys.executable, "-u", "-m", "resnet_jax.main", *DIGITS]
    command += ["--config.seeds=2", f"--workdir={tmp_path}", "--config.epochs=400"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("saved"):
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert names(tmp_path) == {"seed0"}
    step = read_rows(tmp_path / "seed0")[-1]["step"]
    monkeypatch.setattr(report, "update", lambda *_: None)  # not what is tested
    argv = ["main", *DIGITS, f"--config.steps={step + 2}", f"--workdir={tmp_path}"]
    assert command_line.call(main.main, [*argv, "--config.seeds=2"]) == 0
    assert names(tmp_path) == {"seed0", "seed1", "seeds.json"}


@pytest.mark.slow
def test_several_processes_train_them_together(tmp_path):
    pair = training(tmp_path, 2, 1, "--config.seeds=2")
    assert pair.wait() == [0, 0], pair.logs[0].read_text() + pair.logs[1].read_text()
    assert names(tmp_path / "run") == {"seed0", "seed1", "seeds.json"}
    assert "mean" in pair.logs[0].read_text()
    assert "mean" not in pair.logs[1].read_text()
    assert "2 x cpu of 2 processes" in pair.logs[0].read_text()
