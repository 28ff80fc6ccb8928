import json
import os
from pathlib import Path

import pytest

from configs import common
from resnet_jax import UserError, workdir


def config_of(**changes):
    config = common.get_config("paper", version=1, depth=20)
    config.update_from_flattened_dict(changes)
    return config


def start_run(directory: Path, config, step=10) -> Path:
    """What a run with a checkpoint leaves, as far as `check` looks."""
    (directory / "checkpoints" / str(step)).mkdir(parents=True)
    workdir.write_json(directory / "config.json", json.loads(config.to_json()))
    return directory


def files(directory: Path) -> dict:
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.mark.parametrize(
    ("flag", "changes", "expected"),
    [
        ("configs/v1_20.py", {}, "runs/v1_20/seed0"),
        ("configs/v1_20.py:paper", {}, "runs/v1_20-paper/seed0"),
        ("configs/v1_20.py:keras", {}, "runs/v1_20-keras/seed0"),
        ("/elsewhere/my_net.py", {"seed": 7}, "runs/my_net/seed7"),
        (
            "configs/v1_20.py",
            {"dataset.name": "cifar100"},
            "runs/v1_20-cifar100/seed0",
        ),
        (
            "configs/v1_20.py:keras",
            {"dataset.name": "digits", "seed": 3},
            "runs/v1_20-keras-digits/seed3",
        ),
        ("configs/digits.py", {"dataset.name": "digits"}, "runs/digits/seed0"),
        ("configs/digits.py:smoke", {"dataset.name": "digits"}, None),
    ],
)
def test_default_is_named_after_config_recipe_dataset_and_seed(flag, changes, expected):
    expected = expected or "runs/digits-smoke/seed0"
    assert workdir.default(flag, config_of(**changes)) == Path(expected)


@pytest.mark.parametrize("name", ["new", "new/below/below"])
def test_new_directory_may_be_used_and_is_not_made(tmp_path, name):
    assert workdir.check(tmp_path / name, config_of()) == []
    assert not files(tmp_path)


def test_empty_directory_may_be_used(tmp_path):
    assert workdir.check(tmp_path, config_of()) == []


def test_relative_directory_may_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workdir.check(Path("runs/mine"), config_of()) == []
    assert workdir.check(Path("new"), config_of()) == []
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["file", "file/run", "file/run/below"])
def test_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file") as raised:
        workdir.check(tmp_path / name, config_of())
    assert f"--workdir={tmp_path / name}" in str(raised.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "new", "new/below"])
def test_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name):
    asked = []

    def access(path, mode):
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(UserError, match="is not writable") as raised:
        workdir.check(tmp_path / name, config_of())
    assert f"--workdir={tmp_path / name}" in str(raised.value)
    # Names are made in the nearest directory that is there.
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


@pytest.mark.parametrize("content", ["notes.txt", "src/main.py", "checkpoints/last"])
def test_directory_of_other_files_is_refused(tmp_path, content):
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(UserError, match="is neither empty nor a run"):
        workdir.check(tmp_path, config_of())
    assert files(tmp_path) == before


def test_home_that_the_shell_left_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--out=~/figures: write \$HOME for ~"):
        workdir.make(Path("~/figures"))
    assert not files(tmp_path)


def test_directory_of_runs_is_refused_with_their_own(tmp_path):
    for seed in (1, 0):
        start_run(tmp_path / f"seed{seed}", config_of())
    with pytest.raises(UserError, match="is neither empty nor a run") as raised:
        workdir.check(tmp_path, config_of())
    assert str(raised.value).endswith(f"({tmp_path}/seed0, {tmp_path}/seed1)")


def test_run_without_a_checkpoint_may_be_started_again_with_any_config(tmp_path):
    workdir.write_json(tmp_path / "config.json", json.loads(config_of().to_json()))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    assert workdir.check(tmp_path, config_of(**{"model.depth": 32})) == []


def test_run_killed_in_its_first_save_may_be_started_again_with_any_config(tmp_path):
    workdir.write_json(tmp_path / "config.json", json.loads(config_of().to_json()))
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp-1").mkdir(parents=True)
    assert workdir.check(tmp_path, config_of(**{"model.depth": 32})) == []


def test_run_of_the_same_config_may_go_on(tmp_path):
    start_run(tmp_path, config_of())
    before = files(tmp_path)
    assert workdir.check(tmp_path, config_of()) == []
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("epochs", 200, "epochs 164 -> 200"),
        ("steps", 5, "steps 0 -> 5"),
        ("steps_per_call", 7, "steps_per_call 0 -> 7"),
        ("eval_every", 3, "eval_every 1 -> 3"),
        ("parallel", "pmap", "parallel 'jit' -> 'pmap'"),
        ("model.scan", True, "model.scan False -> True"),
        ("model.remat", True, "model.remat False -> True"),
        ("dataset.data_dir", "d", "dataset.data_dir '' -> 'd'"),
        ("dataset.mirror", "m", "dataset.mirror '' -> 'm'"),
        ("checkpoint.every", 2, "checkpoint.every 10 -> 2"),
        ("checkpoint.keep", 9, "checkpoint.keep 2 -> 9"),
    ],
)
def test_field_that_may_change_is_told(tmp_path, field, value, told):
    start_run(tmp_path, config_of())
    assert workdir.check(tmp_path, config_of(**{field: value})) == [told]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("seed", 1, "seed 0 -> 1"),
        ("batch_size", 64, "batch_size 128 -> 64"),
        ("label_smoothing", 0.1, "label_smoothing 0.0 -> 0.1"),
        ("model.depth", 32, "model.depth 20 -> 32"),
        ("model.dtype", "bfloat16", "model.dtype 'float32' -> 'bfloat16'"),
        ("dataset.name", "digits", "dataset.name 'cifar10' -> 'digits'"),
        ("dataset.train_split", "t", "dataset.train_split 'train' -> 't'"),
        ("dataset.validation_split", "v", "dataset.validation_split '' -> 'v'"),
        ("augment.flip", False, "augment.flip True -> False"),
        ("optimizer.name", "adam", "optimizer.name 'sgd' -> 'adam'"),
        ("optimizer.weight_decay", 0.0, "optimizer.weight_decay 0.0001 -> 0.0"),
        ("schedule.boundaries", (0.2, 0.4), "(0.5, 0.75) -> (0.2, 0.4)"),
    ],
)
def test_run_of_another_config_is_refused(tmp_path, field, value, told):
    start_run(tmp_path, config_of())
    before = files(tmp_path)
    # That a field which may change does so too is no help.
    other = config_of(**{field: value, "epochs": 300})
    with pytest.raises(UserError, match="another config") as raised:
        workdir.check(tmp_path, other)
    assert told in str(raised.value)
    assert "epochs" not in str(raised.value)
    assert f"--workdir={tmp_path}" in str(raised.value)
    assert files(tmp_path) == before


def test_all_that_is_refused_is_named(tmp_path):
    start_run(tmp_path, config_of())
    with pytest.raises(UserError, match=r"batch_size 128 -> 64; .*seed 0 -> 1"):
        workdir.check(tmp_path, config_of(seed=1, batch_size=64))


def test_every_field_may_change_or_is_refused(tmp_path):
    start_run(tmp_path, config_of())
    flat = {}
    for name, value in config_of().to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    for field, value in flat.items():
        other = config_of()
        with other.ignore_type(), other.unlocked():
            other.update_from_flattened_dict({field: f"not {value}"})
        try:
            told = workdir.check(tmp_path, other)
        except UserError as error:
            told = [str(error)]
        assert len(told) == 1, field
        assert f"{field} " in told[0]


def test_field_that_the_run_did_not_have_was_off(tmp_path):
    older = config_of()
    with older.unlocked():
        del older.label_smoothing
        del older.model.stem
        older.model.width = 16
    start_run(tmp_path, older)
    read, expected = workdir.read_config(tmp_path), config_of()
    assert json.loads(read.to_json()) == json.loads(expected.to_json())
    assert workdir.check(tmp_path, config_of()) == []
    with pytest.raises(UserError, match=r"label_smoothing 0\.0 -> 0\.1"):
        workdir.check(tmp_path, config_of(label_smoothing=0.1))
    with pytest.raises(UserError, match=r"model\.stem 'cifar' -> 'imagenet'"):
        workdir.check(tmp_path, config_of(**{"model.stem": "imagenet"}))


def test_read_config_gives_the_run_s_config(tmp_path):
    config = config_of(**{"model.depth": 32, "seed": 5})
    start_run(tmp_path, config)
    assert workdir.is_run(tmp_path)
    read = workdir.read_config(tmp_path)
    assert read.to_json() == config.to_json()
    assert read.model.depth == 32


def test_config_that_was_deleted_is_that_of_the_newest_checkpoint(tmp_path):
    for step in (20, 100, 3):
        record = tmp_path / "checkpoints" / str(step) / "record" / "metadata"
        record.parent.mkdir(parents=True)
        content = {"config": workdir.as_json(config_of(steps=step))}
        record.write_text(json.dumps(content))
    assert workdir.read_config(tmp_path).steps == 100


def test_directory_of_no_run_is_told_with_the_nearest(tmp_path):
    start_run(tmp_path / "seed0", config_of())
    (tmp_path / "seed_").mkdir()
    with pytest.raises(UserError, match="holds no run") as raised:
        workdir.read_config(tmp_path / "sed0")
    assert f"--workdir={tmp_path / 'sed0'}" in str(raised.value)
    assert str(tmp_path / "seed0") in str(raised.value)
    with pytest.raises(UserError, match=f"as {tmp_path / 'seed0'}$"):
        workdir.read_config(tmp_path)
    with pytest.raises(UserError, match="holds no run") as raised:
        workdir.read_config(tmp_path / "nothing" / "like" / "it")
    assert "seed0" not in str(raised.value)


@pytest.mark.parametrize("text", [b"", b"{", b'{"seed": 1', b"[]", b"\xff\xfe"])
def test_damaged_config_is_told(tmp_path, text):
    start_run(tmp_path, config_of())
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json.*damaged"):
        workdir.read_config(tmp_path)
    with pytest.raises(UserError, match=r"config\.json.*damaged"):
        workdir.check(tmp_path, config_of())


def test_read_summary_is_none_until_the_run_has_ended(tmp_path):
    assert workdir.read_summary(tmp_path) is None
    summary = {"steps": 3, "epochs": 0.5, "test_accuracy": 0.1, "test_loss": None}
    workdir.write_json(tmp_path / "summary.json", summary)
    with pytest.raises(UserError, match=r"damaged \(no test_examples\)"):
        workdir.read_summary(tmp_path)
    summary["test_examples"] = 360
    workdir.write_json(tmp_path / "summary.json", summary)
    assert workdir.read_summary(tmp_path) == summary


def test_write_leaves_the_file_and_nothing_else(tmp_path):
    for text in ("one\n", "two, and longer\n", ""):
        workdir.write(tmp_path / "a.txt", text)
        assert files(tmp_path) == {tmp_path / "a.txt": text.encode()}


def test_write_json_can_be_read_by_people_and_programs(tmp_path):
    workdir.write_json(tmp_path / "a.json", {"a": [1, 2.5, None], "b": "c"})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": [1, 2.5, None], "b": "c"}
    assert text.endswith("}\n")
    assert text.count("\n") > 3
    assert files(tmp_path).keys() == {tmp_path / "a.json"}


def test_reader_sees_the_old_text_until_the_new_one_is_on_the_disk(
    tmp_path, monkeypatch
):
    path, seen, fsync = tmp_path / "a.txt", [], os.fsync
    workdir.write(path, "old")

    def watch(descriptor):
        fsync(descriptor)
        seen.append(path.read_text())
        seen.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", watch)
    workdir.write(path, "newer")
    assert seen == ["old", 5]
    assert path.read_text() == "newer"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.txt"
    workdir.write(path, "old")

    def fail(*_):
        raise OSError("no space left")

    owner = os if failing == "fsync" else Path
    with monkeypatch.context() as patch:
        patch.setattr(owner, failing, fail)
        with pytest.raises(workdir.WriteError, match=r"a\.txt .*no space left.*same"):
            workdir.write(path, "new")
    assert path.read_text() == "old"
    # What a killed run left half-written is no obstacle to the next.
    workdir.write(path, "newest")
    assert files(tmp_path) == {path: b"newest"}


def test_content_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    workdir.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"a": object()})
    assert files(tmp_path).keys() == {path}
    assert json.loads(path.read_text()) == {"a": 1}
