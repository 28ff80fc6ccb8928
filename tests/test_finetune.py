"""A run that begins with another's weights, some of them frozen."""

import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from resnet_jax import (
    UserError,
    compilation,
    config,
    data,
    finetune,
    models,
    optimizers,
    train,
    trained,
    weights,
)
from resnet_jax.augment import normalize
from resnet_jax.step import Batch, TrainState, make_train_step
from tests.quick import quick_jit, random_variables

pytestmark = pytest.mark.usefixtures("quick_trainings")

NORMALIZATION = np.full(1, 0.5, np.float32), np.ones(1, np.float32)
FROZEN = "^stem|^stage1|^stage2_block1/(conv1|bn1)"


def small(**changes):
    """A config of v1-8 on digits; for 40 steps."""
    chosen = digits.get_config()
    chosen.model.update(version=1, depth=8, width=4)
    chosen.update(steps=40, **changes)
    chosen.checkpoint.every = 1
    return chosen


@pytest.fixture
def five(monkeypatch):
    """Makes the data set digits `five.first` to `five.first + 4` alone."""
    everything = data.load(digits.get_config().dataset)

    class Five:
        first = 0

        def load(self, _):
            def part(split):
                kept = split.labels // 5 == self.first // 5
                return data.Split(split.images[kept], split.labels[kept] - self.first)

            names = everything.class_names[self.first : self.first + 5]
            sets = part(everything.train), None, part(everything.eval)
            return data.Dataset("five digits", names, *sets)

    chosen = Five()
    monkeypatch.setattr(data, "load", chosen.load)
    return chosen


def flat(directory) -> dict[str, np.ndarray]:
    return weights.flatten(weights.from_run(trained.load(directory)).variables)


@pytest.mark.slow
def test_other_classes_with_frozen_layers(five, tmp_path, capsys):
    train.train_and_evaluate(small(), tmp_path / "a")
    before = flat(tmp_path / "a")
    five.first = 5
    chosen = small(init_from=str(tmp_path / "a"))
    chosen.optimizer.update(freeze=FROZEN, backbone_factor=0.1)
    chosen.steps = 20
    train.train_and_evaluate(chosen, tmp_path / "b")
    assert f"weights   of {tmp_path}/a, with a new classifier of 5 classes" in (
        capsys.readouterr().out
    )
    # The weights are in the run by now: what it began with may go.
    shutil.rmtree(tmp_path / "a")
    chosen.steps = 60
    summary = train.train_and_evaluate(chosen, tmp_path / "b")
    assert "resumed   at step 20" in capsys.readouterr().out
    after = flat(tmp_path / "b")
    frozen = [path for path in before if "stem" in path or "stage1" in path]
    frozen += [path for path in before if "stage2_block1/conv1" in path]
    frozen += [path for path in before if "stage2_block1/bn1" in path]
    assert sum(path.startswith("batch_stats") for path in frozen) == 8
    for path, array in before.items():
        if path in frozen:
            assert array.tobytes() == after[path].tobytes(), path
        else:
            assert not np.array_equal(array, after[path]), path
    assert summary["test_accuracy"] > 0.8


@pytest.mark.slow
def test_own_safetensors_and_a_kept_classifier(tmp_path, capsys):
    train.train_and_evaluate(small(), tmp_path / "a")
    found = weights.from_run(trained.load(tmp_path / "a"))
    (tmp_path / "a.safetensors").write_bytes(weights.to_bytes(found))
    chosen = small(init_from=str(tmp_path / "a.safetensors"))
    chosen.steps = 2
    chosen.optimizer.learning_rate = 1e-30
    train.train_and_evaluate(chosen, tmp_path / "b")
    told = capsys.readouterr().out
    assert "with its classifier" in told
    assert "expects images divided by" not in told
    state = TrainState(np.int32(0), **found.variables, opt_state=optax.EmptyState())
    source, names = str(tmp_path / "a.safetensors"), tuple("0123456789")
    read = finetune.read(source)
    finetune.begin_with(read, source, state, names, chosen.model, scale=np.ones(1))
    assert f"{source} expects images divided by 0." in capsys.readouterr().out
    after = flat(tmp_path / "b")
    for path, array in flat(tmp_path / "a").items():
        if path.startswith("params"):
            np.testing.assert_array_equal(array, after[path])


@pytest.fixture(scope="module")
def network():
    """v1-8, its variables and 32 digits, normalised as `step` does."""
    net = models.resnet(1, 8, 10, width=4)
    variables = random_variables(net, (8, 8, 1))
    split = data.load(digits.get_config().dataset).eval
    return net, variables, data.Split(split.images[:32], split.labels[:32])


def begun_from(
    network, tmp_path, names="0123456789", scale=1.0, inputs=None, **changes
):
    """What a state of zeros becomes by a file of the network, and the sentence."""
    model = {"version": 1, "depth": 8, "width": 4}
    path = tmp_path / "a.safetensors"
    path.write_bytes(weights.to_bytes(weights.Weights(model, network[1], inputs)))
    zeros = models.zeros(models.resnet(num_classes=len(names), **model), (8, 8, 1))
    state = TrainState(np.int32(0), **zeros, opt_state=optax.EmptyState(), ema=zeros)
    given = tuple(names), small().model, np.full(1, scale)
    read = pickle.loads(pickle.dumps(finetune.read(str(path))))  # as others get it
    return finetune.begin_with(read, str(path), state, *given, **changes)


def test_averaged_weights_begin_with_them_too(network, tmp_path):
    begun, told = begun_from(network, tmp_path)
    assert told.endswith(", with its classifier")
    for found in (begun.trained, begun.ema):
        jax.tree.map(np.testing.assert_array_equal, found, network[1])


def test_classifier_is_new_where_a_file_without_names_has_another_number(
    network, tmp_path
):
    begun, told = begun_from(network, tmp_path, names="01234")
    assert told.endswith(", with a new classifier of 5 classes")
    assert not begun.params["classifier"]["kernel"].any()
    kernel = network[1]["params"]["stem_conv"]["kernel"]
    np.testing.assert_array_equal(begun.params["stem_conv"]["kernel"], kernel)
    sentence = "has other classes than the data, and config.epochs=0 trains no"
    with pytest.raises(UserError, match=sentence):
        begun_from(network, tmp_path, names="01234", trains=False)
    begun_from(network, tmp_path, trains=False)


@pytest.mark.parametrize(
    ("scale", "differs"), [(0.1, True), (0.3, False), (0.9, False), (1.1, True)]
)
def test_images_divided_by_twice_as_much_or_half_are_told(
    network, tmp_path, capsys, scale, differs
):
    names = tuple("0123456789")
    normalization = np.zeros(1, np.float32), np.full(1, 0.5, np.float32)
    inputs = trained.Inputs("digits", names, (8, 8, 1), normalization)
    begun_from(network, tmp_path, scale=scale, inputs=inputs)
    told = f"expects images divided by 0.5, but this run divides by {scale}: give"
    assert (told in capsys.readouterr().out) == differs


def one_update(network, chosen) -> tuple[dict, dict]:
    """The changes of the parameters in an update at rate 1, and its metrics."""
    net, variables, split = network
    chosen.augment.update(crop=0.0, flip=False)
    tx = optimizers.optimizer(chosen.optimizer, lambda _: 1.0)
    step = make_train_step(net, tx, chosen, NORMALIZATION)
    state = TrainState(
        jnp.int32(0), **variables, opt_state=tx.init(variables["params"])
    )
    batch = Batch(split.images, split.labels, np.arange(32, dtype=np.int32))
    new, metrics = quick_jit(step)(state, batch, jax.random.key(1))
    change = jax.tree.map(lambda a, b: a - b, new.params, variables["params"])
    return weights.flatten(change), metrics


@pytest.mark.slow
def test_backbone_learns_at_a_lower_rate(network):
    plain, _ = one_update(network, small())
    chosen = small()
    chosen.optimizer.backbone_factor = 0.25
    changed, _ = one_update(network, chosen)
    for path, expected in plain.items():
        factor = 1 if path.startswith("classifier") else 0.25
        np.testing.assert_allclose(
            changed[path], factor * expected, rtol=1e-3, atol=1e-6
        )


@pytest.mark.slow
def test_frozen_layers_compute_as_in_evaluation(network):
    net, variables, split = network
    chosen = small()
    chosen.optimizer.freeze = "^(stem|stage)"
    changed, metrics = one_update(network, chosen)
    images = normalize(jnp.asarray(split.images), *NORMALIZATION)
    logits = net.apply(variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels)
    assert float(metrics["loss"]) == pytest.approx(float(losses.mean()), rel=1e-5)
    moved = {path for path, change in changed.items() if np.abs(change).max() > 0}
    assert moved == {"classifier/kernel", "classifier/bias"}
    # The norm is of the trained gradients alone: the update at rate 1 without momentum
    # and decay.
    plain = small()
    plain.optimizer.update(chosen.optimizer)
    plain.optimizer.update(momentum=0.0, nesterov=False, weight_decay=0.0)
    changed, metrics = one_update(network, plain)
    squares = sum(np.square(change).sum() for change in changed.values())
    assert float(metrics["gradient_norm"]) == pytest.approx(np.sqrt(squares), rel=1e-4)


def test_off_leaves_checkpoints_as_they_were(network):
    _, variables, _ = network
    chosen = small()
    tx = optimizers.optimizer(chosen.optimizer, lambda _: 0.1)
    by_hand = optax.chain(
        optax.add_decayed_weights(
            1e-4, lambda params: jax.tree.map(lambda _: True, params)
        ),
        optax.trace(0.9, nesterov=True),
        optax.scale_by_learning_rate(lambda _: 0.1),
    )
    params = jax.tree.map(np.ones_like, variables["params"])
    found, expected = tx.init(params), by_hand.init(params)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("layer1", "matches no parameter: they have names such as stem_bn/bias"),
        ("kernel|scale|bias", "matches every parameter"),
    ],
)
def test_a_pattern_fits_some_parameters(pattern, named, tmp_path):
    chosen = small()
    chosen.optimizer.freeze = pattern
    with pytest.raises(UserError) as error:
        train.train_and_evaluate(chosen, tmp_path / "run")
    assert f"config.optimizer.freeze={pattern!r} {named}" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", [{"init_from": "nowhere"}, {"optimizer": {"freeze": "layer1"}}]
)
def test_what_cannot_be_started_with_is_told_before_compiling(
    change, tmp_path, monkeypatch
):
    """So that nobody waits for a sentence, with all cores busy."""
    programs = []
    monkeypatch.setattr(compilation, "compile_program", programs.append)
    chosen = small()
    chosen.update(change)
    with pytest.raises(UserError, match=r"no such file|matches no parameter"):
        train.train_and_evaluate(chosen, tmp_path / "run")
    assert not programs


def test_frozen_layers_need_unrolled_blocks():
    chosen = small()
    chosen.optimizer.freeze = "^stage1"
    chosen.model.scan = True
    with pytest.raises(UserError, match=r"set model\.scan to False"):
        config.validate(chosen)


@pytest.mark.slow
def test_what_cannot_be_begun_with_is_a_sentence(network, tmp_path, monkeypatch):
    net, variables, _ = network
    opt_state = optax.EmptyState()
    state = TrainState(np.int32(0), **variables, opt_state=opt_state)

    def begin_with(origin: str) -> None:
        names, model = tuple("0123456789"), small().model
        read = finetune.read(origin)
        finetune.begin_with(read, origin, state, names, model, scale=np.ones(1))

    def sentence(name: str, content: bytes | None = None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            begin_with(str(tmp_path / name))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no such file or directory" in sentence("none")
    (tmp_path / "empty").mkdir()
    empty = sentence("empty")
    assert empty.startswith(f"config.init_from={tmp_path}/empty holds no run")
    assert "convert --source" in sentence("x.pt", b"")
    assert "convert --source" in sentence("x.h5", b"")
    assert "cannot be read as safetensors" in sentence("x.safetensors", b"text")
    about = b'{"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
    float8 = len(about).to_bytes(8, "little") + about + b"0"
    assert "cannot be read as safetensors" in sentence("x.safetensors", float8)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        begin_with("~/x.safetensors")
    for model, shape, named in (
        (
            {"version": 1, "depth": 8, "width": 8},
            (8, 8, 1),
            "(8,) there and (4,) here",
        ),
        ({"version": 1, "depth": 14, "width": 4}, (8, 8, 1), "none here"),
        ({"version": 1, "depth": 8, "width": 4}, (8, 8, 3), "stem_conv/kernel"),
    ):
        other = models.resnet(num_classes=10, **model)
        drawn = random_variables(other, shape)
        content = weights.to_bytes(weights.Weights(model, drawn))
        error = sentence("x.safetensors", content)
        theirs = f"v1-{model['depth']}"
        assert f"another network ({theirs}) than config.model (v1-8)" in error
        assert named in error
    model = {"version": 1, "depth": 8, "width": 4, "residual": False}
    plain = weights.Weights(model, variables)
    error = sentence("x.safetensors", weights.to_bytes(plain))
    assert "without shortcuts: set config.model.residual to False" in error
    assert net.num_classes == 10
