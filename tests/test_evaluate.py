import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from configs import digits, image_folder
from resnet_jax import command_line, data, evaluate, models, train
from resnet_jax.augment import normalize, statistics
from resnet_jax.evaluator import Evaluator
from resnet_jax.parallel import Parallel
from resnet_jax.report import __main__ as report
from tests.quick import quick_jit, random_variables


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load(digits.get_config().dataset)


@pytest.fixture(scope="module")
def network(dataset):
    """A network of 12 classes, so that the top five count, and a reference.

    Returns the network, its variables, the normalisation and all test logits.
    """
    net = models.resnet(1, 8, 12)
    variables = random_variables(net, dataset.image_shape)
    normalization = statistics("mean_std", dataset.train.images)
    images = normalize(jnp.asarray(dataset.eval.images), *normalization)
    logits = np.asarray(quick_jit(net.apply)(variables, images))
    return net, variables, normalization, logits


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize(
    ("batch_size", "devices"), [(64, 8), (360, 1), (7, 1), (1000, 2), (24, 4)]
)
def test_every_example_counts_once(dataset, network, batch_size, devices, mode):
    net, variables, normalization, logits = network
    parallel = Parallel.over(jax.devices()[:devices], mode, batch_size)
    evaluator = Evaluator(net, dataset.eval, normalization, batch_size, parallel)
    placed = parallel.replicate(variables)
    evaluator.compile(placed)
    metrics = evaluator(placed)

    labels = dataset.eval.labels
    scores = logits[np.arange(360), labels]
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(360), labels]
    correct = logits.argmax(1) == labels
    assert metrics["examples"] == 360
    assert metrics["accuracy"] == correct.mean()
    assert metrics["top5_accuracy"] == ((logits > scores[:, None]).sum(1) < 5).mean()
    assert metrics["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    for label, accuracy in enumerate(metrics["class_accuracy"]):
        expected = correct[labels == label].mean() if label < 10 else None
        assert accuracy == pytest.approx(expected)


def test_logits_that_are_no_numbers_are_never_correct(dataset, network):
    net, variables, normalization, _ = network
    variables = jax.tree.map(np.copy, variables)
    variables["params"]["classifier"]["bias"][:] = np.nan
    parallel = Parallel.over(jax.devices()[:1], "jit", 90)
    evaluator = Evaluator(net, dataset.eval, normalization, 90, parallel)
    placed = parallel.replicate(variables)
    evaluator.compile(placed)
    metrics = evaluator(placed)
    assert metrics["accuracy"] == metrics["top5_accuracy"] == 0


def test_flipping_averages_the_logits_of_images_and_their_mirror_images(
    dataset, network
):
    net, variables, normalization, logits = network
    mirrored = normalize(jnp.asarray(dataset.eval.images[:, :, ::-1]), *normalization)
    mean = (logits + np.asarray(quick_jit(net.apply)(variables, mirrored))) / 2
    parallel = Parallel.over(jax.devices()[:1], "jit", 90)
    evaluator = Evaluator(
        net, dataset.eval, normalization, 90, parallel, test_time_flip=True
    )
    placed = parallel.replicate(variables)
    evaluator.compile(placed)
    labels = dataset.eval.labels
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean().item()
        for scores in (mean, logits)
    ]
    found = evaluator(placed)["loss"]
    assert found == pytest.approx(losses[0], rel=1e-5)
    assert found != pytest.approx(losses[1], rel=1e-4)


def test_evaluation_ends_between_two_calls_where_it_is_asked_to(dataset, network):
    net, variables, normalization, _ = network
    parallel = Parallel.over(jax.devices()[:1], "jit", 90)
    evaluator = Evaluator(
        net, dataset.eval, normalization, 90, parallel, batches_per_call=2
    )
    placed = parallel.replicate(variables)
    evaluator.compile(placed)
    answers = [False, True]
    assert evaluator(placed, lambda: answers.pop(0)) is None
    assert not answers


def test_ten_classes_have_no_top_five(dataset):
    net = models.resnet(1, 8, 10)
    variables = random_variables(net, dataset.image_shape)
    parallel = Parallel.over(jax.devices()[:1], "jit", 90)
    normalization = statistics("mean_std", dataset.train.images)
    evaluator = Evaluator(net, dataset.eval, normalization, 90, parallel)
    evaluator.compile(parallel.replicate(variables))
    metrics = evaluator(parallel.replicate(variables))
    assert set(metrics) == {"accuracy", "loss", "examples", "class_accuracy"}


@pytest.mark.slow
def test_command_repeats_what_the_run_reported(
    tmp_path, capsys, monkeypatch, quick_compilation
):
    config = digits.get_config()
    config.model.update(version=1, depth=14, scan=True)
    config.update(steps=30)
    config.dataset.update(train_split="train[:1200]", validation_split="train[1200:]")
    summary = train.train_and_evaluate(config, tmp_path / "run")
    capsys.readouterr()
    for checkpoint in ("latest", "best"):
        argv = ["evaluate", f"--workdir={tmp_path}/run", f"--checkpoint={checkpoint}"]
        assert command_line.call(evaluate.main, argv) == 0
    # 64 images a batch do not divide among three devices.
    three = jax.devices()[:3]
    monkeypatch.setattr(jax, "devices", lambda *_: three)
    assert command_line.call(evaluate.main, argv[:2]) == 0
    _, latest, best, again = capsys.readouterr().out.split("step")
    assert "accuracy" in best
    assert f"{summary['test_accuracy']:.2%}" in again
    assert f"{summary['test_accuracy']:.2%}" in latest
    assert f"{summary['test_loss']:.4f}" in latest
    assert f"{summary['test_class_accuracy']['7']:.2%}" in latest
    assert command_line.call(evaluate.main, [*argv[:2], "--format=json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert read["accuracy"] == pytest.approx(summary["test_accuracy"])
    assert read["class_accuracy"]["7"] == pytest.approx(
        summary["test_class_accuracy"]["7"], abs=1e-6
    )
    assert (read["step"], read["split"], read["examples"]) == (30, "test", 360)
    own = [*argv[:2], "--format=json", "--split=validation"]
    assert command_line.call(evaluate.main, own) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["accuracy"] == pytest.approx(
        summary["validation_accuracy"]
    )
    assert json.loads(told.out)["split"] == "train[1200:]"
    assert told.err == ""
    assert command_line.call(evaluate.main, [*own[:3], "--split=train[1200:]"]) == 0
    told = capsys.readouterr().err
    assert "--split shares 237 examples with config.dataset.valid" in told


@pytest.mark.slow
def test_data_that_have_changed_since_are_told(tmp_path, capsys, quick_training):
    pictures = tmp_path / "pictures"
    for number in range(32):
        for split, counts in (("train", 32), ("test", 2)):
            folder = pictures / split / "ab"[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            if number < counts:
                noise = np.full((8, 8, 3), 8 * number, np.uint8)
                Image.fromarray(noise).save(folder / f"{number}.png")
    config = image_folder.get_config()
    config.model.depth = 8
    config.update(steps=1, batch_size=8)
    config.dataset.update(path=str(pictures), image_size=8)
    run = tmp_path / "run"
    train.train_and_evaluate(config, run)
    note = "classes   2, of 16 pictures each in train\n"
    assert note in capsys.readouterr().out

    def call(command, *given) -> tuple[int, str]:
        capsys.readouterr()
        argv = [*command[1:], f"--workdir={run}", *given]
        status = command_line.call(command[0], argv)
        return status, "".join(capsys.readouterr())

    evaluation = (evaluate.main, "evaluate")
    status, told = call(evaluation)
    assert status == 0
    assert note in told
    status, told = call((report.main, "report"))
    assert status == 0
    assert note not in told  # a run's report follows its training, which told it
    config.dataset.eval_split = "test[:1]"
    summary = train.train_and_evaluate(config, tmp_path / "another")
    assert summary["test_class_accuracy"] == {"a": summary["test_accuracy"], "b": None}
    status, told = call(evaluation, "--split=test[:1]")
    assert status == 0
    assert re.search(r"  examples +1\n", told)
    assert re.search(r"  b +none\n", told)
    assert (
        "error: --split='tset': there is no split"
        in call(evaluation, "--split=tset")[1]
    )
    # More to train on, and then other classes.
    shutil.copy(pictures / "train" / "a" / "0.png", pictures / "train" / "a" / "x.png")
    status, told = call(evaluation)
    assert status == 0
    assert "warning   32 training examples then, 33 now" in told
    for split in ("train", "test"):
        (pictures / split / "a").rename(pictures / split / "z")
    for command in (evaluation, (report.main, "report")):
        status, told = call(command)
        assert status == 2
        assert "holds a run on other data (class 'a' then, 'b' now)" in told


LONG_CALL = """
import jax
import numpy as np
from resnet_jax import data, models
from resnet_jax.evaluator import Evaluator
from resnet_jax.parallel import Parallel

rng, batches, size = np.random.default_rng(0), 36, 128
shape = (batches * size, 32, 32, 3)
images = rng.random((shape[0], 1, 1, 3)) * rng.integers(0, 256, shape)
labels = rng.integers(0, 10, shape[0]).astype(np.int32)
split = data.Split(images.astype(np.uint8), labels)
net = models.resnet(2, 29, 10, scan=True)
variables = models.initialize(net, jax.random.key(1), shape[1:])
normalization = np.float32([0.5] * 3), np.float32([0.02] * 3)
parallel = Parallel.over(jax.devices(), "jit", size, shape[1:])
placed = parallel.replicate(variables)
losses = []
for length in (4, batches):
    evaluator = Evaluator(
        net, split, normalization, size, parallel, batches_per_call=length
    )
    evaluator.compile(placed)
    losses.append(evaluator(placed)["loss"])
np.testing.assert_allclose(*losses, rtol=1e-5)
"""


@pytest.mark.slow
def test_long_call_over_two_devices_sums_what_short_ones_do():
    """On jaxlib 0.10.2 compiler options make it wrong from the 25th batch on."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    subprocess.run([sys.executable, "-c", LONG_CALL], check=True, env=environment)


@pytest.mark.slow
def test_command_without_a_run_is_a_sentence(tmp_path, capsys, quick_training):
    def error(*arguments: str) -> str:
        assert command_line.call(evaluate.main, ["evaluate", *arguments]) == 2
        return capsys.readouterr().err

    assert "--workdir is missing" in error()
    assert "holds no run" in error(f"--workdir={tmp_path}/none")
    config = digits.get_config()
    config.model.update(version=1, depth=8)
    config.steps = 2
    train.train_and_evaluate(config, tmp_path / "run")
    capsys.readouterr()
    assert f"as {tmp_path}/run" in error(f"--workdir={tmp_path}/rum")
    best = f"--workdir={tmp_path}/run", "--checkpoint=best"
    assert "no validation split" in error(*best)
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    content["dataset"]["validation_split"] = "train[90%:]"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    assert "none of those it saved has been evaluated" in error(*best)
