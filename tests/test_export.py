"""What is exported runs without this package, and says what it is."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import command_line, data, export, train, trained, weights
from resnet_jax.augment import normalize
from tests.test_train import digits_config

pytestmark = pytest.mark.slow  # the network is trained and exported first

# Everything but JAX, flatbuffers and what these require.
BARE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"resnet_jax", "configs", "flax", "orbax", "optax",
            "ml_collections", "absl", "safetensors", "tensorstore", "PIL", "torch"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import numpy
images = numpy.load("images.npy")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_trainings):
    """A run's directory, its summary, and the test images and labels."""
    config = digits_config(steps=60, **{"optimizer.learning_rate": 0.05})
    directory = tmp_path_factory.mktemp("export") / "run"
    summary = train.train_and_evaluate(config, directory)
    return directory, summary, data.load(config.dataset).eval


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The directory that the command wrote, and what it printed."""
    directory, _, _ = run
    out = tmp_path_factory.mktemp("exported") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *text, **_: lines.extend(text))
        argv = ["export", f"--workdir={directory}", f"--out={out}"]
        assert command_line.call(export.main, argv) == 0
    return out, "\n".join(lines)


def test_runs_with_jax_alone_for_any_batch(run, exported, tmp_path):
    _, summary, test = run
    _, printed = exported
    example = [line[4:] for line in printed.splitlines() if line.startswith("    ")]
    assert len(example) == 5
    np.save(tmp_path / "images.npy", test.images)
    script = [
        BARE,
        *example,
        'numpy.save("found.npy", probabilities)',
        'numpy.save("one.npy", program.call(images[:1]))',
        "print(classes)",
    ]
    (tmp_path / "script.py").write_text("\n".join(script))
    found = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == str(list("0123456789"))
    probabilities = np.load(tmp_path / "found.npy")
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    accuracy = (probabilities.argmax(1) == test.labels).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"], abs=1e-6)
    one = np.load(tmp_path / "one.npy")
    np.testing.assert_allclose(one, probabilities[:1], atol=1e-5)


def test_the_printed_difference_is_one_of_rounding(exported):
    (line,) = [x for x in exported[1].splitlines() if x.startswith("compared")]
    assert float(line.split()[-1]) < 1e-5


def always(run: trained.Trained, share: float) -> trained.Trained:
    """The run with a network that gives the first class this share of any image."""
    variables = jax.tree.map(np.asarray, run.variables)
    kernel = np.zeros_like(variables["params"]["classifier"]["kernel"])
    bias = np.log(np.float32([share, *[(1 - share) / 9] * 9]))
    params = {**variables["params"], "classifier": {"kernel": kernel, "bias": bias}}
    return dataclasses.replace(run, variables={**variables, "params": params})


def test_another_networks_program_is_told_and_not_written(
    run, tmp_path, capsys, monkeypatch
):
    restored = trained.load(run[0])
    right = export.program
    for share, apart in ((0.5, 0.4), (0.01, 0.09), (np.nan, np.nan)):
        other = right(always(restored, share))
        content = export.archive(restored, other)
        found = export.max_difference(always(restored, 0.1), content)
        assert found == pytest.approx(apart, abs=1e-6, nan_ok=True)
        monkeypatch.setattr(export, "program", lambda run, other=other: other)
        argv = ["export", f"--workdir={run[0]}", f"--out={tmp_path / 'out'}"]
        assert command_line.call(export.main, argv) == 1
        assert "nothing was written" in capsys.readouterr().err
        assert not list((tmp_path / "out").iterdir())


def test_weights_give_the_same_network(run, exported):
    directory, _, test = run
    restored = trained.load(directory)
    found = weights.read(exported[0] / "model.safetensors")
    assert found.inputs.class_names == tuple("0123456789")
    assert found.inputs.dataset == "digits"
    images = normalize(jnp.asarray(test.images), *found.inputs.normalization)
    expected = jax.jit(restored.net.apply)(restored.variables, images)
    np.testing.assert_allclose(
        weights.logits(found, np.asarray(images)), expected, atol=1e-5
    )


def test_card_says_what_was_measured(run, exported):
    _, summary, _ = run
    card = (exported[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: jax\n")
    assert "# v1-8 trained on digits" in card
    assert f"| {summary['test_accuracy']:.2%} of 360 images" in card
    assert f"| parameters | {summary['params']:,} |" in card
    assert "optimizer.learning_rate 0.1 -> 0.05" in card
    assert "zipfile.ZipFile('model.zip')" in card
    assert "resnet_jax.convert --source=model.safetensors --out=model.pt\n" in card


@pytest.mark.parametrize("fields", [{"keras": True}, {"shortcut": ""}])
def test_card_of_a_network_that_pytorch_has_not(run, fields):
    done = trained.load(run[0])
    card = export.model_card(dataclasses.replace(done, net=done.net.clone(**fields)))
    assert "--config.init_from=model.safetensors\n```" in card
    assert "PyTorch" not in card


def test_card_of_another_step_claims_no_accuracy(run):
    earlier = dataclasses.replace(trained.load(run[0]), step=1)
    assert "| test accuracy | not measured at step 1 |" in export.model_card(earlier)


def test_a_readme_that_is_no_card_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# A project\n")
    argv = ["export", f"--workdir={run[0]}", f"--out={tmp_path}"]
    assert command_line.call(export.main, argv) == 2
    assert "has a README.md that is not a model card" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_bad_use_is_a_sentence(run, tmp_path, capsys):
    directory, _, _ = run

    def error(status: int, *arguments: str) -> str:
        assert command_line.call(export.main, ["export", *arguments]) == status
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    (tmp_path / "file").write_text("mine")
    assert "--workdir is missing" in error(2)
    assert "holds no run" in error(2, f"--workdir={tmp_path}/none")
    workdir = f"--workdir={directory}"
    assert "no best checkpoint" in error(2, workdir, "--checkpoint=best")
    assert "is a file: give a directory" in error(2, workdir, f"--out={tmp_path}/file")
    assert "cannot be created (Not a directory)" in error(
        2, workdir, f"--out={tmp_path}/file/out"
    )
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "model.zip").mkdir(parents=True)
    assert "model.zip cannot be written (Is a directory)" in error(
        1, workdir, f"--out={tmp_path}/out"
    )
    assert not list((tmp_path / "out").glob(".*"))
