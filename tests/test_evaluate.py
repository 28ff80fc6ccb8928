import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from resnet_jax import command_line, data, evaluate, models, train
from resnet_jax.augment import normalize, statistics
from resnet_jax.evaluate import Evaluator
from resnet_jax.parallel import Parallel


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    return data.load(digits.get_config().dataset)


@pytest.fixture(scope="module")
def network(dataset):
    """A network of 12 classes, so that the top five count, and a reference.

    Returns the network, its variables, the normalisation and all test logits.
    """
    net = models.resnet(1, 8, 12)
    variables = models.initialize(net, jax.random.key(3), dataset.image_shape)
    normalization = statistics("mean_std", dataset.train.images)
    images = normalize(jnp.asarray(dataset.eval.images), *normalization)
    return net, variables, normalization, np.asarray(net.apply(variables, images))


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
        expected = correct[labels == label].mean() if label < 10 else 0
        assert accuracy == pytest.approx(expected)


def test_ten_classes_have_no_top_five(dataset):
    net = models.resnet(1, 8, 10)
    variables = models.initialize(net, jax.random.key(0), dataset.image_shape)
    parallel = Parallel.over(jax.devices()[:1], "jit", 90)
    normalization = statistics("mean_std", dataset.train.images)
    evaluator = Evaluator(net, dataset.eval, normalization, 90, parallel)
    evaluator.compile(parallel.replicate(variables))
    metrics = evaluator(parallel.replicate(variables))
    assert set(metrics) == {"accuracy", "loss", "examples", "class_accuracy"}


@pytest.mark.slow
def test_command_repeats_what_the_run_reported(tmp_path, capsys, monkeypatch):
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


@pytest.mark.slow
def test_command_without_a_run_is_a_sentence(tmp_path, capsys):
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
    assert "no validation split" in error(
        f"--workdir={tmp_path}/run", "--checkpoint=best"
    )
