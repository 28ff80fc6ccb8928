import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from resnet_jax import UserError, cost, data, models, results, train, trained
from resnet_jax.checkpoint import Checkpoints, read_record
from resnet_jax.clock import Clock
from resnet_jax.config import build_network
from resnet_jax.divergence import DivergedError, require_finite
from resnet_jax.metrics import read_rows
from resnet_jax.preemption import StoppedError
from resnet_jax.trainer import Trainer
from tests.quick import ENVIRONMENT, one_device

ROOT = Path(__file__).parents[1]


def digits_config(**changes) -> ConfigDict:
    """Narrow v1-8 on digits, twelve steps; the rate does not depend on how many."""
    config = common.get_config("smoke", version=1, depth=8, width=4)
    config.update(steps=12, steps_per_call=4)
    config.schedule.update(name="constant", warmup_epochs=0.0)
    config.update_from_flattened_dict(changes)
    return config


def saved_arrays(directory: Path, config: ConfigDict) -> list[np.ndarray]:
    """All arrays of a run's newest checkpoint."""
    like = Trainer(config, data.load(config.dataset)).blank_state().split()
    checkpoints = Checkpoints(directory / "checkpoints", keep=None)
    trees = checkpoints.restore(checkpoints.saved_step, like)
    checkpoints.close()
    return jax.tree.leaves(trees)


def same_bits(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer.name": "adamw", "model.scan": True, "optimizer.ema": 0.99},
        {"optimizer.freeze": "^stem|^stage1", "optimizer.backbone_factor": 0.1},
    ],
    ids=str,
)
def test_summary_tells_the_bytes_that_each_device_gets(changes):
    config = digits_config(**changes)
    dataset = data.load(config.dataset)
    trainer = Trainer(config, dataset)
    state, splits = trainer.new_state(), (dataset.train, dataset.eval)
    examples = sum(len(split.labels) for split in splits)
    shape = dataset.image_shape
    found = cost.device_bytes(config, trainer.net, shape, examples)

    def size(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    expected = [size(state), size(state.params), size(splits)]
    assert list(found.values()) == expected
    config.dataset.stream = "always"
    found = cost.device_bytes(config, trainer.net, shape, examples)
    assert found["data set"] == 0


@pytest.mark.parametrize("beyond", [0, 1])
def test_summary_leaves_out_images_that_are_streamed(beyond, monkeypatch):
    monkeypatch.setattr(data, "RESIDENT_BYTES", 100 * 8 * 8 * 1 - beyond)
    config = digits_config()
    net = build_network(config, 10)
    found = cost.device_bytes(config, net, (8, 8, 1), examples=100)
    assert found["data set"] == (0 if beyond else 100 * (8 * 8 * 1 + 4))


def test_linear_rule_is_in_the_updates_and_in_the_banner(capsys):
    config = digits_config(**{"optimizer.linear_rate_batch": 16})
    dataset = data.load(config.dataset)
    trainer = Trainer(config, dataset)
    assert trainer.learning_rates[0] == pytest.approx(0.4)
    results.print_start(config, dataset, trainer, [], None)
    told = capsys.readouterr().out
    assert "sgd with Nesterov momentum, " in told
    assert "momentum, learning rate 0.4 (0.1 for 16 images)," in told


@pytest.mark.parametrize(
    ("mode", "scan"),
    [
        ("jit", False),
        pytest.param("jit", True, marks=pytest.mark.slow),
        pytest.param("pmap", False, marks=pytest.mark.slow),
    ],
)
def test_stopping_half_way_changes_no_bit(tmp_path, mode, scan):
    depth = 14 if scan else 8  # a loop has something to loop over
    config = digits_config(**{"parallel": mode, "model.scan": scan})
    config.model.depth = depth
    train.train_and_evaluate(config, tmp_path / "straight")
    half = config.copy_and_resolve_references()
    half.steps = 8
    train.train_and_evaluate(half, tmp_path / "halves")
    train.train_and_evaluate(config, tmp_path / "halves")

    straight = saved_arrays(tmp_path / "straight", config)
    assert same_bits(straight, saved_arrays(tmp_path / "halves", config))
    rows = [
        [row for row in read_rows(tmp_path / run) if "train_loss" in row]
        for run in ("straight", "halves")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [4, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("jit", 8), ("jit", 1)),
        (("jit", 8), ("jit", 2)),
        (("jit", 8), ("jit", 4)),
        (("pmap", 8), ("jit", 1)),
        (("jit", 1), ("pmap", 8)),
    ],
)
def test_checkpoint_resumes_on_other_devices(
    tmp_path, monkeypatch, quick_compilation, first, second
):
    devices = jax.devices()
    for (mode, count), steps in ((first, 4), (second, 8)):
        monkeypatch.setattr(jax, "devices", lambda count=count: devices[:count])
        config = digits_config(**{"parallel": mode, "optimizer.learning_rate": 0.01})
        config.steps = steps
        summary = train.train_and_evaluate(config, tmp_path)
        assert summary["device_count"] == count
        assert summary["test_examples"] == 360
    losses = [row["train_loss"] for row in read_rows(tmp_path) if "train_loss" in row]
    if "pmap" in (first[0], second[0]):  # whose BatchNorm differs
        assert len(losses) == 2
        return
    monkeypatch.setattr(jax, "devices", lambda: devices)
    config.parallel = "jit"
    train.train_and_evaluate(config, tmp_path / "straight")
    rows = read_rows(tmp_path / "straight")
    straight = [row["train_loss"] for row in rows if "train_loss" in row]
    np.testing.assert_allclose(losses, straight[:2], rtol=1e-2)


@pytest.mark.slow
def test_run_leaves_a_complete_summary(tmp_path, capsys):
    config = digits_config(steps=30, **{"model.width": 16})
    summary = train.train_and_evaluate(config, tmp_path / "run")
    on_disk = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert on_disk == summary
    assert summary["test_examples"] == 360
    assert 0.1 < summary["test_accuracy"] <= 1
    assert set(summary["test_class_accuracy"]) == set("0123456789")
    assert summary["params"] == 75002
    assert summary["macs"] > 0
    assert summary["steps"] == 30
    assert summary["device_count"] == 8
    assert summary["seed"] == 0
    assert {"jax", "flax", "optax", "python"} <= set(summary["versions"])
    seconds = read_record(tmp_path / "run" / "checkpoints" / "30")["clock"]
    speed = 30 * config.batch_size / seconds["training"]
    assert summary["images_per_second"] == pytest.approx(speed, abs=0.051)
    each = summary["images_per_second_per_device"]
    assert each == pytest.approx(speed / 8, abs=0.051)
    assert summary["seconds"] > summary["compile_seconds"] > 0
    assert summary["compile_seconds"] == round(seconds["compiling"], 1)
    assert summary["train_seconds"] == round(seconds["training"], 1)
    parts = ("training", "compiling", "evaluating")
    assert seconds["total"] > sum(seconds[part] for part in parts)
    assert min(seconds[part] for part in parts) > 0
    assert summary["seconds"] >= round(seconds["total"], 1)
    output = capsys.readouterr().out
    assert output.startswith(f"workdir   {tmp_path / 'run'}\n")
    for told in ("75,002 parameters", "digits: 1,437", "8 x cpu", "epoch 2,"):
        assert told in output

    again = train.train_and_evaluate(config, tmp_path / "run")
    assert again == summary
    assert "finished" in capsys.readouterr().out


def test_rows_are_finite_numbers_with_rising_steps(tmp_path, quick_training):
    changes = {"schedule.name": "step", "schedule.boundaries": (0.32,)}
    changes["schedule.factors"] = (0.5,)
    train.train_and_evaluate(digits_config(steps=25, **changes), tmp_path)
    rows = read_rows(tmp_path)
    # Of a call's last update: the rate is halved after the eighth.
    rates = [row["learning_rate"] for row in rows if "train_loss" in row]
    assert rates == pytest.approx([0.1, 0.1] + 6 * [0.05])
    steps = [row["step"] for row in rows if "train_loss" in row]
    assert steps == [4, 8, 12, 16, 20, 23, 24, 25]
    assert [row["step"] for row in rows if "test_loss" in row] == [23, 25]
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_divergence_stops_with_the_steps_and_what_to_try(tmp_path, quick_training):
    config = digits_config(**{"optimizer.learning_rate": 1e6, "steps": 40})
    with pytest.raises(DivergedError, match=r"between steps .* and") as raised:
        train.train_and_evaluate(config, tmp_path)
    assert "optimizer.learning_rate" in str(raised.value)
    assert raised.value.exit_status == 1
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("saved", "kept"),
    [
        (None, "none has been saved yet"),
        (0, "the checkpoint of step 0 is kept"),
        (1000, "the checkpoint of step 1,000 is kept"),
    ],
)
def test_divergence_names_what_is_left(saved, kept):
    means = {"loss": 1.0, "gradient_norm": math.inf, "accuracy": math.nan}
    with pytest.raises(DivergedError) as raised:
        require_finite(means, 1200, 1210, saved)
    told = "gradient_norm is no longer finite between steps 1,200 and 1,210"
    assert f"{told} ({kept}): " in str(raised.value)


@pytest.mark.slow
def test_infinite_test_loss_leaves_valid_files(
    tmp_path, monkeypatch, capsys, quick_training
):
    """The running statistics of the first steps can be too far off to evaluate by."""
    evaluate = Trainer.evaluate

    def infinite(self, *args):
        return evaluate(self, *args) | {"test_loss": math.nan}

    monkeypatch.setattr(Trainer, "evaluate", infinite)
    train.train_and_evaluate(digits_config(steps=4), tmp_path)
    assert "loss not finite" in capsys.readouterr().out

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse)["test_loss"] is None
    assert read_rows(tmp_path)[-1]["test_loss"] is None
    train.train_and_evaluate(digits_config(steps=4), tmp_path)


@pytest.mark.slow
def test_best_by_validation_is_kept_beside_the_newest(
    tmp_path, monkeypatch, quick_training
):
    changes = {"checkpoint.keep": 1, "checkpoint.every": 10}
    config = digits_config(steps=0, epochs=4, **changes)
    config.dataset.update(train_split="train[:1024]", validation_split="train[1024:]")
    evaluate, accuracies = Trainer.evaluate, iter((0.1, 0.9, 0.9, 0.3))

    def scripted(self, *args):
        return evaluate(self, *args) | {"validation_accuracy": next(accuracies)}

    monkeypatch.setattr(Trainer, "evaluate", scripted)
    summary = train.train_and_evaluate(config, tmp_path)
    assert summary["validation_examples"] == 413
    rows = [row for row in read_rows(tmp_path) if "validation_accuracy" in row]
    assert [row["step"] for row in rows] == [16, 32, 48, 64]
    assert [row["step"] for row in rows if "test_accuracy" in row] == [64]
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"32", "64"}  # the first of the best, and the newest
    best, newest = (trained.load(tmp_path, name) for name in ("best", "latest"))
    assert (best.step, newest.step) == (32, 64)
    kernels = (
        run.variables["params"]["classifier"]["kernel"] for run in (best, newest)
    )
    assert not np.array_equal(*kernels)


def test_other_config_is_refused_and_longer_run_goes_on(
    tmp_path, capsys, quick_training
):
    config = digits_config(steps=8)
    train.train_and_evaluate(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = digits_config(steps=8, seed=1, **{"optimizer.learning_rate": 0.2})
    with pytest.raises(UserError, match=r"learning_rate 0.1 -> 0.2; seed 0 -> 1"):
        train.train_and_evaluate(other, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError, match=r"step 8"):
        train.train_and_evaluate(digits_config(steps=4), tmp_path)
    assert train.train_and_evaluate(digits_config(steps=12), tmp_path)["steps"] == 12
    assert "steps 8 -> 12" in capsys.readouterr().out


def test_a_run_that_goes_on_draws_no_weights(tmp_path, monkeypatch, quick_training):
    train.train_and_evaluate(digits_config(steps=4), tmp_path)
    monkeypatch.setattr(models, "initialize", pytest.fail)
    assert train.train_and_evaluate(digits_config(steps=8), tmp_path)["steps"] == 8


@pytest.mark.slow
def test_seconds_go_on_where_a_run_goes_on(tmp_path, quick_training):
    train.train_and_evaluate(digits_config(steps=4), tmp_path)
    path = tmp_path / "checkpoints" / "4" / "record" / "metadata"
    record = json.loads(path.read_text())
    record["clock"] = {"total": 9000.0, "training": 2000.0, "compiling": 5000.0}
    path.write_text(json.dumps(record))
    manifest = tmp_path / "checkpoints" / "4" / "manifest.json"
    sizes = json.loads(manifest.read_text())
    del sizes["record/metadata"]
    manifest.write_text(json.dumps(sizes))
    summary = train.train_and_evaluate(digits_config(steps=8), tmp_path)
    assert 9000 < summary["seconds"] < 9900
    assert 5000 < summary["compile_seconds"] < 5900
    assert summary["evaluation_seconds"] < 900
    # Those of both parts' images, over both parts' seconds.
    seconds = read_record(tmp_path / "checkpoints" / "8")["clock"]
    assert 2000 < seconds["training"] < 2900
    assert summary["images_per_second"] == pytest.approx(8 * 64 / 2000, abs=0.1)


def test_seconds_of_all_earlier_processes_are_kept():
    clock = Clock()
    clock.add({"total": 4000.0, "training": 300.0, "compiling": 20.0})
    clock.training += 300.0
    clock.evaluating += 7.0
    again = Clock()
    again.add(clock.record())
    again.evaluating += 7.0
    record = again.record()
    assert 4000 <= record.pop("total") < 4100
    assert record == {"training": 600.0, "compiling": 20.0, "evaluating": 14.0}


def test_epochs_are_evaluated_and_saved_as_often_as_the_config_says(
    tmp_path, quick_training
):
    """Seven epochs of two steps: what is saved is evaluated too, and so is the last."""
    often = {"eval_every": 2, "checkpoint.every": 3, "checkpoint.keep": 9}
    config = digits_config(steps=0, epochs=7, batch_size=32, **often)
    config.dataset.update(train_split="train[:64]", eval_split="test[:32]")
    train.train_and_evaluate(config, tmp_path)
    evaluated = [row["step"] for row in read_rows(tmp_path) if "test_loss" in row]
    assert evaluated == [2 * epoch for epoch in (2, 3, 4, 6, 7)]
    saved = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert saved == {2 * epoch for epoch in (3, 6, 7)}


@pytest.mark.slow
def test_scan_may_change_when_a_run_goes_on(tmp_path, quick_training):
    rolled = digits_config(steps=8, **{"model.depth": 14, "model.scan": True})
    train.train_and_evaluate(rolled, tmp_path)
    unrolled = digits_config(steps=12, **{"model.depth": 14})
    assert train.train_and_evaluate(unrolled, tmp_path)["steps"] == 12


@pytest.mark.slow
def test_training_and_verbs_never_load_tensorflow(tmp_path):
    script = (
        "import sys\n"
        "from resnet_jax import command_line, evaluate, explain, main, predict\n"
        "from resnet_jax import summary\n"
        "from resnet_jax.report import __main__ as report\n"
        f"config = '--config={ROOT}/configs/digits.py'\n"
        "small = ['--config.model.version=1', '--config.model.depth=8']\n"
        f"run = '--workdir={tmp_path}/run'\n"
        "argv = ['main', config, *small, '--config.steps=4', run]\n"
        "assert command_line.call(main.main, argv) == 0\n"
        "assert command_line.call(evaluate.main, ['evaluate', run]) == 0\n"
        "assert command_line.call(summary.main, ['summary', config]) == 0\n"
        f"picture = '{tmp_path}/run/curves.png'\n"
        "assert command_line.call(predict.main, ['predict', run, picture]) == 0\n"
        "assert command_line.call(explain.main, ['explain', run, picture]) == 0\n"
        "assert command_line.call(report.main, ['report', run]) == 0\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    environment = os.environ | ENVIRONMENT
    subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, check=True
    )
    for name in (
        *("config.json", "inputs.json", "metrics.jsonl", "summary.json", "curves.png"),
        "report.html",
    ):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.slow
def test_digits_recipe_learns(tmp_path):
    config = common.get_config("smoke", version=1, depth=8, width=4)
    with one_device():
        summary = train.train_and_evaluate(config, tmp_path)
    assert summary["test_accuracy"] > 0.95


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("TFDS_DATA_DIR", "/nowhere"), "cifar10").is_dir(),
    reason="needs CIFAR-10 in $TFDS_DATA_DIR",
)
def test_cifar10_trains_and_counts_every_test_image(tmp_path, quick_training):
    config = common.get_config("paper", version=1, depth=8)
    config.update(steps=20, batch_size=64)
    config.dataset.train_split = "train[:2000]"
    summary = train.train_and_evaluate(config, tmp_path)
    assert summary["test_examples"] == 10000
    assert summary["test_accuracy"] > 0.12


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "scan"), [("jit", True), ("pmap", False)])
def test_every_ingredient_at_once_resumes_to_the_same_bits(
    tmp_path, quick_compilation, mode, scan
):
    config = digits_config(
        **{
            "parallel": mode,
            "label_smoothing": 0.1,
            "test_time_flip": True,
            "dataset.image_size": 16,
            "model.scan": scan,
            "model.depth": 14 if scan else 8,
            "model.stochastic_depth": 0.2,
            "model.zero_init": True,
            "augment.flip": True,
            "augment.alternating_flip": True,
            "augment.cutout": 0.25,
            "augment.cutmix": 1.0,
            "augment.plain_epochs": 0.2,
            "augment.sizes": (8,),
            "augment.size_ends": (0.5,),
            "optimizer.bn_bias_factor": 8.0,
            "optimizer.ema": 0.9,
        }
    )
    straight = train.train_and_evaluate(config, tmp_path / "straight")
    stopped = Stopped(signal.SIGTERM, after=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", stopped(Trainer.train))
        with pytest.raises(StoppedError):
            train.train_and_evaluate(config, tmp_path / "halves")
    resumed = train.train_and_evaluate(config, tmp_path / "halves")
    arrays = [saved_arrays(tmp_path / name, config) for name in ("straight", "halves")]
    assert same_bits(*arrays)
    for name in ("test_accuracy", "test_loss"):
        assert straight[name] == resumed[name]
    # What is evaluated again, from the checkpoint, is what the run reported.
    run = trained.load(tmp_path / "straight")
    dataset = data.load(config.dataset)
    logits = np.asarray(jax.jit(run.logits)(run.variables, dataset.eval.images))
    accuracy = (logits.argmax(1) == dataset.eval.labels).mean()
    assert accuracy == straight["test_accuracy"]


class Stopped:
    """Makes a signal come behind some calls of a method."""

    def __init__(self, number: signal.Signals, after: int):
        self._number, self._left = number, after

    def __call__(self, method):
        def counted(*args):
            result = method(*args)
            self._left -= 1
            if not self._left:
                signal.raise_signal(self._number)
            return result

        return counted
