"""Converted weights compute what they did, in PyTorch's and Keras's own networks."""

import json
import re
import sys

import h5py
import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import digits
from resnet_jax import (
    UserError,
    command_line,
    convert,
    data,
    evaluate,
    export,
    main,
    models,
    train,
    trained,
    weights,
)
from resnet_jax.weights import Weights
from tests.quick import random_variables

torch = pytest.importorskip("torch")

from experiments.peers import torch_peer  # noqa: E402
from tests import torch_networks as nets  # noqa: E402

torch.set_num_threads(1)

NETWORKS = {
    "basic-A": (lambda: nets.ResNet(nets.BasicBlock, 2, "A"), "akamaster", (1, 14)),
    "basic-B": (lambda: nets.ResNet(nets.BasicBlock, 1, "B"), "akamaster", (1, 8)),
    "basic-100": (
        lambda: nets.ResNet(nets.BasicBlock, 1, "B", 100),
        "chenyaofo",
        (1, 8),
    ),
    "bottleneck": (lambda: nets.ResNet(nets.Bottleneck, 1, "B"), "chenyaofo", (1, 11)),
    "pre-basic": (lambda: nets.ResNet(nets.PreActBlock, 2, "A"), "akamaster", (1, 14)),
    "pre-bottleneck": (
        lambda: nets.ResNet(nets.PreActBottleneck, 2, "B"),
        "chenyaofo",
        (2, 20),
    ),
    "torchvision-18": (
        lambda: nets.ImageNetResNet(nets.BasicBlock, (2, 2, 2, 2), 8),
        "chenyaofo",
        (1, 18),
    ),
    "torchvision-50": (
        lambda: nets.ImageNetResNet(nets.StridedIn3x3, (3, 4, 6, 3), 4),
        "chenyaofo",
        (1, 50),
    ),
}
SLOW = pytest.param("torchvision-50", marks=pytest.mark.slow)


@pytest.fixture(params=[*list(NETWORKS)[:-1], SLOW])
def network(request):
    """A torch network with drawn statistics, its naming, and our version and depth."""
    build, naming, ours = NETWORKS[request.param]
    torch.manual_seed(0)
    net = build().eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    return net, naming, ours


def their_names(net, naming: str) -> dict[str, str]:
    """Names in a repository's state dict, by those of the test's own network."""
    shortcut, head = {
        "akamaster": ("shortcut", "linear"),
        "chenyaofo": ("downsample", "fc"),
    }[naming]
    names = {}
    for name in net.state_dict():
        theirs = name if net.pre else re.sub(r"^bn\.", "bn1.", name)
        theirs = theirs.replace(".shortcut.", f".{shortcut}.")
        theirs = theirs.replace(".project.", f".{shortcut}.0.")
        names[name] = re.sub(r"^fc\.", f"{head}.", theirs)
    return names


def images(channels: int = 3) -> np.ndarray:
    shape = (8, 32, 32, channels)  # as `convert` compares
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def torch_logits(net) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor(images()).permute(0, 3, 1, 2)).numpy()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_training")
def test_converted_weights_score_as_in_pytorch(tmp_path, monkeypatch, capsys):
    """With --config.epochs=0, and the constants that PyTorch's users normalise by."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (96, 16, 16, 3), np.uint8)
    labels = rng.integers(0, 10, 96).astype(np.int32)
    names = tuple("0123456789")
    split = data.Split(pixels, labels)
    test = data.Split(pixels[:90], labels[:90])
    dataset = data.Dataset("noise", names, split, None, test)
    monkeypatch.setattr(data, "load", lambda _: dataset)
    torch.manual_seed(0)
    net = nets.ResNet(nets.BasicBlock, 1, "A").train()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.tensor((pixels / 255 - mean) / std, dtype=torch.float32)
    images, targets = images.permute(0, 3, 1, 2), torch.tensor(labels).long()
    tx = torch.optim.SGD(net.parameters(), 0.05)
    for _ in range(5):  # statistics of its own, and logits that differ
        loss = torch.nn.functional.cross_entropy(net(images), targets)
        tx.zero_grad()
        loss.backward()
        tx.step()
    net.eval()
    with torch.no_grad():
        logits = net(images[:90])
    loss = torch.nn.functional.cross_entropy(logits, targets[:90]).item()
    correct = logits.argmax(1).numpy() == labels[:90]
    assert 0.1 < correct.mean() < 0.9
    state = {
        theirs: net.state_dict()[name]
        for name, theirs in their_names(net, "akamaster").items()
    }
    torch.save(state, tmp_path / "net.th")
    file = tmp_path / "net.safetensors"
    assert run(f"--source={tmp_path / 'net.th'}", f"--out={file}") == 0
    config = digits.get_config()
    config.model.update(version=1, depth=8)
    config.update(epochs=0, init_from=str(file), batch_size=32)
    config.augment.update(mean=mean, std=std)
    directory = tmp_path / "run"
    summary = main.run(config, directory)
    told = capsys.readouterr().out
    assert "training  none: the weights are evaluated as they are" in told
    assert summary["steps"] == 0
    assert summary["test_accuracy"] == correct.mean()
    assert summary["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert "images_per_second" not in summary
    assert not (directory / "curves.png").exists()
    page = (directory / "report.html").read_text()
    assert "Confusion matrix" in page
    assert "Curves" not in page
    loaded = trained.load(directory)
    again = evaluate.evaluate(loaded, dataset)
    assert again["accuracy"] == summary["test_accuracy"]
    assert train.train_and_evaluate(config, directory) == summary
    assert "finished  at step 0 of 0" in capsys.readouterr().out
    card = export.model_card(loaded)
    assert "# v1-8 evaluated on noise" in card
    assert f"It has the weights of `{file}`, without any further training." in card
    # Nothing would train a new classifier.
    fewer = data.Dataset("noise", names[:5], split, None, test)
    monkeypatch.setattr(data, "load", lambda _: fewer)
    with pytest.raises(UserError, match="has other classes than the data"):
        train.train_and_evaluate(config, tmp_path / "other")
    # More epochs continue from these weights.
    monkeypatch.setattr(data, "load", lambda _: dataset)
    config.epochs = 1
    assert train.train_and_evaluate(config, directory)["steps"] == 3
    told = capsys.readouterr().out
    assert "resumed   at step 0 of 3" in told
    assert "schedule now spans" not in told
    assert trained.load(directory, 0).step == 0


def run(*arguments) -> int:
    return command_line.call(convert.main, ["convert", *map(str, arguments)])


@pytest.mark.slow
def test_from_pytorch(network, tmp_path, capsys):
    net, naming, (version, depth) = network
    names = their_names(net, naming)
    state = {names[name]: tensor for name, tensor in net.state_dict().items()}
    source = tmp_path / "theirs.th"
    torch.save(state, source)
    assert run(f"--source={source}", f"--out={tmp_path}/ours.safetensors") == 0
    output = capsys.readouterr().out
    assert f"v{version}-{depth}," in output
    assert "with PyTorch: logits of 8 random images differ by at most" in output
    found = weights.read(tmp_path / "ours.safetensors")
    expected = torch_logits(net)
    np.testing.assert_allclose(
        weights.logits(found, images()), expected, atol=1e-5 * np.abs(expected).max()
    )
    # The same tensors in safetensors, which need no PyTorch.
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    again, _ = convert.read(tmp_path / "theirs.safetensors")
    assert weights.to_bytes(again) == (tmp_path / "ours.safetensors").read_bytes()
    halves = {name: array.astype(np.float16) for name, array in arrays.items()}
    safetensors.numpy.save_file(halves, tmp_path / "halves.safetensors")
    argv = f"--source={tmp_path}/halves.safetensors", f"--out={tmp_path}/h.safetensors"
    assert run(*argv) == 0
    assert "with PyTorch: logits" in capsys.readouterr().out


def test_to_pytorch(network, tmp_path):
    net, naming, _ = network
    names = their_names(net, naming)
    state = {names[name]: tensor for name, tensor in net.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pt")
    argv = f"--source={tmp_path}/theirs.pt", f"--out={tmp_path}/again.pt"
    assert run(*argv, f"--naming={naming}") == 0
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == state.keys()
    back = {name: again[theirs] for name, theirs in names.items()}
    expected = torch_logits(net)
    for tensor in net.parameters():
        torch.nn.init.zeros_(tensor.data)
    net.load_state_dict(back, strict=True)
    np.testing.assert_array_equal(torch_logits(net), expected)


@pytest.mark.parametrize(("version", "depth"), [(1, 8), (2, 11)])
def test_files_fit_the_class_that_the_docs_name(version, depth, tmp_path):
    net = models.resnet(version, depth, 10)
    variables = random_variables(net, (32, 32, 3))
    ours = Weights({"version": version, "depth": depth}, variables)
    (tmp_path / "ours.safetensors").write_bytes(weights.to_bytes(ours))
    argv = f"--source={tmp_path}/ours.safetensors", f"--out={tmp_path}/theirs.pt"
    assert run(*argv, "--naming=akamaster") == 0
    theirs = torch_peer.ResNet(version, depth)
    theirs.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    expected = jax.jit(net.apply)(variables, images())
    np.testing.assert_allclose(torch_logits(theirs.eval()), expected, atol=1e-4)


def test_names_are_the_repositories(tmp_path):
    """Of depth 8, as `torch.save` of the repositories' own networks lists them."""
    leaves = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    norms = [f"{bn}.{leaf}" for bn in ("bn1", "bn2") for leaf in leaves]
    block = ["conv1.weight", "conv2.weight", *norms]
    stem = [name for name in block if "2." not in name]
    shared = {*stem, *(f"layer{s}.0.{name}" for s in (1, 2, 3) for name in block)}
    projection = {
        f"layer{s}.0.{{}}.{name}"
        for s in (2, 3)
        for name in ("0.weight", *(n.replace("bn1", "1") for n in stem[1:]))
    }
    heads = {
        "akamaster": {"linear.weight", "linear.bias"},
        "chenyaofo": {"fc.weight", "fc.bias"},
    }
    kinds = {"akamaster": "shortcut", "chenyaofo": "downsample"}
    for shortcut in "AB":
        variables = random_variables(
            models.resnet(1, 8, 10, shortcut=shortcut), (8, 8, 3)
        )
        model = {"version": 1, "depth": 8, "shortcut": shortcut}
        content = weights.to_bytes(Weights(model, variables))
        (tmp_path / "ours.safetensors").write_bytes(content)
        for naming in heads:
            out = tmp_path / f"{shortcut}-{naming}.pt"
            argv = f"--source={tmp_path}/ours.safetensors", f"--out={out}"
            if (shortcut, naming) == ("A", "chenyaofo"):
                assert run(*argv, f"--naming={naming}") == 2
                assert not out.exists()
                continue
            assert run(*argv, f"--naming={naming}") == 0
            expected = shared | heads[naming]
            if shortcut == "B":
                expected |= {name.format(kinds[naming]) for name in projection}
            assert torch.load(out, weights_only=True).keys() == expected


def test_training_checkpoints_of_data_parallel(tmp_path, monkeypatch):
    torch.manual_seed(1)
    net = nets.ResNet(nets.BasicBlock, 1, "A").eval()
    names = their_names(net, "akamaster")
    state = {f"module.{names[name]}": value for name, value in net.state_dict().items()}
    state["module.linear.bias"] = torch.nn.Parameter(net.fc.bias.detach())
    torch.save({"state_dict": state, "best_prec1": 91.7}, tmp_path / "model.th")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("--source=~/model.th", f"--out={tmp_path}/ours.safetensors") == 0
    found = weights.read(tmp_path / "ours.safetensors")
    np.testing.assert_allclose(
        weights.logits(found, images()), torch_logits(net), atol=1e-5
    )


def test_a_wrong_conversion_is_told_and_not_written(tmp_path, capsys, monkeypatch):
    net = nets.ResNet(nets.BasicBlock, 1, "A").eval()
    names = their_names(net, "akamaster")
    state = {names[name]: value for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pt")
    right = convert.pytorch.logits
    monkeypatch.setattr(
        convert.pytorch, "logits", lambda state, images: right(state, images) + 0.01
    )
    out = tmp_path / "ours.safetensors"
    assert run(f"--source={tmp_path}/theirs.pt", f"--out={out}") == 1
    assert "differ by at most 1.0e-02" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("largest", [0.5, 20.0])
def test_the_tolerance_is_a_ten_thousandth_of_the_largest_logit_above_one(largest):
    net = models.resnet(1, 8, 10, width=1)
    variables = random_variables(net, (8, 8, 3))
    logits = np.linspace(-largest / 2, largest, 10, dtype=np.float32)
    classifier = variables["params"]["classifier"]
    classifier.update(kernel=0 * classifier["kernel"], bias=logits)
    loaded = Weights({"version": 1, "depth": 8, "width": 1}, variables)

    def compare(change: float) -> None:
        theirs = np.tile(logits, (8, 1))
        theirs[3, 2] += change
        convert.compare(loaded, [convert.Peer("Other", lambda images: theirs)])

    tolerated = 1e-4 * max(1, largest)
    for sign in (1, -1):
        compare(0.9 * sign * tolerated)
        with pytest.raises(weights.MismatchError, match="with Other"):
            compare(1.1 * sign * tolerated)
    with pytest.raises(weights.MismatchError, match="nan"):
        compare(np.nan)


def keras_layer(x, features, size=3, stride=1, relu=True, norm=True, conv_first=True):
    """`resnet_layer` of the example."""
    from keras import layers

    zeros = {"kernel_initializer": "zeros"}  # other values are assigned later
    conv = layers.Conv2D(features, size, strides=stride, padding="same", **zeros)
    x = conv(x) if conv_first else x
    x = layers.BatchNormalization()(x) if norm else x
    x = layers.Activation("relu")(x) if relu else x
    return x if conv_first else conv(x)


def keras_network(version: int, n: int):
    """`resnet_v1` and `resnet_v2` of the example, for 32x32 pixels."""
    import keras
    from keras import layers

    start = keras.Input((32, 32, 3))
    x, inner = keras_layer(start, 16), 16
    for stage in range(3):
        outer = {1: inner, 2: inner * (2 if stage else 4)}[version]
        for i in range(n):
            stride = 2 if stage and not i else 1
            if version == 1:
                y = keras_layer(x, inner, stride=stride)
                y = keras_layer(y, inner, relu=False)
            else:
                first = not stage and not i
                y = keras_layer(x, inner, 1, stride, not first, not first, False)
                y = keras_layer(y, inner, conv_first=False)
                y = keras_layer(y, outer, 1, conv_first=False)
            if not i and (stage or version == 2):
                x = keras_layer(x, outer, 1, stride, relu=False, norm=False)
            x = layers.add([x, y])
            x = layers.Activation("relu")(x) if version == 1 else x
        inner = inner * 2 if version == 1 else outer
    if version == 2:
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
    x = layers.Flatten()(layers.AveragePooling2D(8)(x))
    dense = layers.Dense(10, activation="softmax", kernel_initializer="zeros")
    return keras.Model(start, dense(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:You are saving your model:UserWarning")
@pytest.mark.parametrize(("version", "n"), [(1, 1), (2, 2)])
def test_from_the_keras_example(version, n, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras")
    # Drawn names of layers must not matter: the second network's begin at a number.
    keras_network(version, n)
    model = keras_network(version, n)
    draws = np.random.default_rng(0)
    for variable in model.weights:
        scale = 0.5 / np.sqrt(np.prod(variable.shape[:-1]))
        low = 0.5 if "variance" in variable.name or "gamma" in variable.name else 0
        variable.assign(low + scale * draws.standard_normal(variable.shape) ** 2)
    expected = np.asarray(model(images()))
    files = {}
    for name in ("model.h5", "model.keras", "model.weights.h5"):
        out = tmp_path / f"{name}.safetensors"
        save = model.save_weights if "weights" in name else model.save
        save(tmp_path / name)
        capsys.readouterr()
        assert run(f"--source={tmp_path / name}", f"--out={out}") == 0
        output = capsys.readouterr().out
        whole = "weights" not in name
        assert ("with Keras: logits of 8 random" in output) == whole, output
        files[name] = out.read_bytes()
    assert len(set(files.values())) == 1
    found = weights.read(out)
    assert found.model_config["variant"] == "keras"
    probabilities = jax.nn.softmax(weights.logits(found, images()))
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_a_file_says_what_it_is_and_is_the_same_each_time(tmp_path):
    net = models.resnet(1, 8, 3, width=4)
    variables = random_variables(net, (8, 8, 1))
    found = Weights({"version": 1, "depth": 8, "width": 4}, variables)
    content = weights.to_bytes(found)
    assert all(weights.to_bytes(found) == content for _ in range(5))
    path = tmp_path / "ours.safetensors"
    path.write_bytes(content)
    again = weights.read(path)
    assert again.model_config == found.model_config
    jax.tree.map(np.testing.assert_array_equal, again.variables, variables)
    assert again.network().num_classes == 3


def refused(capsys, *arguments) -> str:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_bad_use_is_a_sentence(tmp_path, capsys):
    out = f"--out={tmp_path}/out.safetensors"
    net = nets.ResNet(nets.BasicBlock, 1, "A")
    names = their_names(net, "akamaster")
    state = {names[name]: value for name, value in net.state_dict().items()}

    def theirs(name: str = "", value=None) -> str:
        """The network saved with one entry changed, or left out."""
        changed = {**state, name: value} if name else state
        changed = {key: value for key, value in changed.items() if value is not None}
        torch.save(changed, tmp_path / "theirs.pt")
        return f"--source={tmp_path}/theirs.pt"

    def file(name: str) -> str:
        (tmp_path / name).write_text("text")
        return f"--source={tmp_path / name}"

    def check(named: str, *arguments: str) -> None:
        assert named in refused(capsys, *arguments)
        assert not (tmp_path / "out.safetensors").exists()

    check("either --workdir=DIR of a run or --source=FILE", out)
    check("either --workdir", theirs(), f"--workdir={tmp_path}", out)
    check("--out is missing", theirs())
    check("there is no such file", f"--source={tmp_path}/none.pt", out)
    check("give a run as --workdir", f"--source={tmp_path}", out)
    check("holds no run", f"--workdir={tmp_path}/none", out)
    check("the ending '.onnx' is not supported", file("x.onnx"), out)
    check(
        "conv1.weight has shape (4, 3, 3)",
        theirs("conv1.weight", torch.ones(4, 3, 3)),
        out,
    )
    torch.save({0: torch.ones(3)}, tmp_path / "list.pt")
    check("does not hold a state dict", f"--source={tmp_path}/list.pt", out)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["layers"] = np.zeros(3)
    check("cannot be read as a Keras model", f"--source={tmp_path}/other.h5", out)
    check("cannot be read as PyTorch weights", file("x.pt"), out)
    check("cannot be read as safetensors", file("x.safetensors"), out)
    check("end it in .safetensors", theirs(), f"--out={tmp_path}/x.onnx")
    check("/x.pt is a file", theirs(), f"--out={tmp_path}/x.pt/y.pt")
    check("the ending '' is not supported", theirs(), f"--out={tmp_path}/x")
    check("does not hold a state dict", theirs("epoch", 3), out)
    check("lacks conv1", theirs("conv1.weight"), out)
    check("no params/stage1_block1/bn2/bias", theirs("layer1.0.bn2.bias"), out)
    check("depth 7 does not fit", theirs("layer1.0.conv2.weight"), out)
    check(
        "layer5.0.x.weight is not a layer",
        theirs("layer5.0.x.weight", torch.ones(1)),
        out,
    )
    check(
        "params/stage2_block1/conv2/kernel of shape (3, 3, 16, 32), but v1-8 needs "
        "(3, 3, 32, 32)",
        theirs("layer2.0.conv2.weight", torch.zeros(32, 16, 3, 3)),
        out,
    )
    check("naming", theirs(), out, "--naming=keras")
    check("goes with .safetensors", theirs(), "--out=x.pt", "--naming=resnet_jax")
    check("only shortcuts B", theirs(), out, "--naming=chenyaofo")
    plain = {"version": 1, "depth": 8, "residual": False}
    variables = random_variables(models.resnet(1, 8, 10, residual=False), (8, 8, 3))
    content = weights.to_bytes(Weights(plain, variables))
    (tmp_path / "plain.safetensors").write_bytes(content)
    check("without shortcuts", f"--source={tmp_path}/plain.safetensors", "--out=x.pt")


def test_a_place_that_cannot_be_written(tmp_path, capsys):
    net = nets.ResNet(nets.BasicBlock, 1, "A")
    names = their_names(net, "akamaster")
    state = {names[name]: value for name, value in net.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pt")
    out = tmp_path / "none" / "out.safetensors"
    out.mkdir(parents=True)
    assert run(f"--source={tmp_path}/theirs.pt", f"--out={out}") == 1
    assert "cannot be written (Is a directory)" in capsys.readouterr().err


def test_without_pytorch_its_files_are_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "theirs.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    out = f"--out={tmp_path}/out.safetensors"
    error = refused(capsys, f"--source={tmp_path}/theirs.pt", out)
    assert "needs PyTorch, which is not installed: pip install torch" in error


def test_other_programs_and_damage(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    out = f"--out={tmp_path}/out.safetensors"
    tensors = {"weight": np.zeros(2, np.float32)}
    for metadata, named in (
        ({}, "weight is not a layer"),
        ({"resnet_jax": "{"}, "damaged"),
        ({"resnet_jax": json.dumps({"format": 9, "model": {}})}, "format 9"),
        (
            {"resnet_jax": json.dumps({"format": 1, "model": {"a": 1}})},
            "not hold a network",
        ),
    ):
        safetensors.numpy.save_file(tensors, path, metadata)
        assert named in refused(capsys, f"--source={path}", out)
        assert not (tmp_path / "out.safetensors").exists()
