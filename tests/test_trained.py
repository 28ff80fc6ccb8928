import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from resnet_jax import UserError, data, models, provenance, train, trained
from resnet_jax.augment import normalize, statistics
from tests.test_train import digits_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_trainings):
    """A run with a validation split, and its summary."""
    config = digits_config(steps=30, **{"model.depth": 14})
    config.dataset.update(train_split="train[:1200]", validation_split="train[1200:]")
    directory = tmp_path_factory.mktemp("trained") / "run"
    return directory, train.train_and_evaluate(config, directory)


@pytest.mark.slow
def test_restores_what_the_run_measured(run):
    directory, summary = run
    restored = trained.load(directory)
    dataset = data.load(restored.config.dataset)
    images = normalize(jnp.asarray(dataset.eval.images), *restored.inputs.normalization)
    logits = restored.net.apply(restored.variables, images)
    accuracy = (np.asarray(logits).argmax(1) == dataset.eval.labels).mean()
    assert restored.step == summary["steps"]
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-6)
    # Files have the unrolled names.
    names = models.unstack(restored.variables)["params"]
    assert "stage1_block2" in names
    assert "stage1_blocks" not in names


def test_best_checkpoint_is_the_best_of_those_that_are_saved(run, tmp_path):
    """Rows are written before: a run that was killed between has none of its best."""
    copy = shutil.copytree(run[0], tmp_path / "copy")
    best = trained.load(copy, "best").step
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 999, "validation_accuracy": 1.0}) + "\n")
    assert trained.load(copy, "best").step == best


def test_a_checkpoint_is_chosen_by_its_step(run):
    directory, _ = run
    saved = sorted(int(path.name) for path in (directory / "checkpoints").iterdir())
    assert len(saved) > 1
    for step in saved:
        assert trained.load(directory, step).step == step
        assert trained.load(directory, str(step)).step == step
    shown = ", ".join(map(str, saved))
    with pytest.raises(
        UserError, match=f"no checkpoint of step 29: give one of {shown}"
    ):
        trained.load(directory, 29)
    for other in ("first", -1):
        with pytest.raises(UserError, match=f"--checkpoint={other}: give latest, best"):
            trained.load(directory, other)


def test_a_finished_run_says_that_the_code_is_another_now(run, monkeypatch, capsys):
    directory, summary = run
    config = trained.load(directory).config
    assert train.train_and_evaluate(config, directory) == summary
    assert "warning" not in capsys.readouterr().out
    found = provenance.versions_and_commit() | {"git_commit": "another"}
    monkeypatch.setattr(provenance, "versions_and_commit", lambda: found)
    assert train.train_and_evaluate(config, directory) == summary
    told = capsys.readouterr().out
    assert "warning   by different code (git_commit " in told
    assert f"remove {directory} or give another --workdir" in told


def test_is_shown_without_its_arrays(run):
    restored = trained.load(run[0])
    assert len(repr(restored)) < 1000
    assert "step=30" in repr(restored)
    dataset = trained.load_data(restored)
    assert "train=Split(1,200 images of 8x8x1)" in repr(dataset)
    assert len(repr(dataset)) < 1000


def test_needs_no_data_set(run, tmp_path, monkeypatch):
    directory, _ = run
    expected = trained.load(directory).inputs
    monkeypatch.setattr(data, "load", lambda _: pytest.fail("read the data set"))
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    config["dataset"]["data_dir"] = "/nowhere"
    config["dataset"]["name"] = "cifar10"
    (copy / "config.json").write_text(json.dumps(config))
    inputs = trained.load(copy).inputs
    assert inputs.class_names == tuple("0123456789")
    assert inputs.image_shape == (8, 8, 1)
    for found, wanted in zip(inputs.normalization, expected.normalization, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("normalization", ["mean", "mean_std", "pixel_mean"])
def test_file_gives_the_same_normalization(normalization, tmp_path):
    config = digits.get_config()
    dataset = data.load(config.dataset)
    expected = statistics(normalization, dataset.train.images)
    trained.write_inputs(tmp_path, dataset, expected)
    inputs = trained.read_inputs(tmp_path)
    assert (inputs.dataset, inputs.class_names) == ("digits", dataset.class_names)
    for found, wanted in zip(inputs.normalization, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == np.float32


@pytest.mark.slow
def test_other_data_are_refused(run):
    directory, _ = run
    dataset = data.load(trained.load(directory).config.dataset)
    normalization = trained.load(directory).inputs.normalization

    def told(dataset=dataset, normalization=normalization, seen=1200):
        with pytest.raises(UserError, match="on other data") as raised:
            trained.require_same_data(directory, dataset, normalization, seen)
        assert str(raised.value).endswith(
            "give the original data, or another --workdir"
        )
        return str(raised.value)

    trained.require_same_data(directory, dataset, normalization, 1200)
    renamed = (*dataset.class_names[:9], "x")
    more = (*dataset.class_names, "x")
    for names, what in (
        (renamed, "class '9' then, 'x' now"),
        (more, "class none then, 'x' now"),
    ):
        other = dataclasses.replace(dataset, class_names=names)
        assert what in told(other)
    assert "1,199 training examples then, 1,200 now" in told(seen=1199)
    mean, scale = normalization
    assert "another mean or standard deviation" in told(
        normalization=(mean + 0.01, scale)
    )
    wide = data.Split(dataset.train.images.repeat(2, 2), dataset.train.labels)
    assert "image shape (8, 8, 1) then, (8, 16, 1) now" in told(
        dataclasses.replace(dataset, train=wide)
    )


def test_mistakes_are_sentences(run, tmp_path):
    directory, _ = run
    with pytest.raises(UserError, match="--workdir is missing"):
        trained.load(None)
    with pytest.raises(UserError, match="holds no run"):
        trained.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    for text in ("{", "[]", "{}", '{"normalization": 3}'):
        (copy / "inputs.json").write_text(text)
        with pytest.raises(UserError, match=r"inputs\.json is damaged"):
            trained.load(copy)
    (copy / "inputs.json").unlink()
    with pytest.raises(UserError, match=r"inputs\.json is missing"):
        trained.load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="no latest checkpoint: it has saved none"):
        trained.load(copy)
