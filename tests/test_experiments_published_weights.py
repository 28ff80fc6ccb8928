import json

import numpy as np
import pytest

from experiments import published_weights
from experiments.published import Published, Table
from experiments.study import Study
from resnet_jax import command_line, data

NETWORKS = {"v1-8": Published(91.0), "v1-14": Published(92.0)}


def call(*arguments) -> int:
    given = ["published_weights", *map(str, arguments)]
    return command_line.call(published_weights.main, given)


@pytest.fixture
def noise(monkeypatch):
    """Makes every data set 128 images of noise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (128, 16, 16, 3), np.uint8)
    split = data.Split(images, rng.integers(0, 10, 128).astype(np.int32))
    names = tuple("0123456789")
    dataset = data.Dataset("noise", names, split, None, split)
    monkeypatch.setattr(data, "load", lambda _: dataset)
    table = Table("elsewhere", "paper", NETWORKS)
    monkeypatch.setattr(published_weights, "_TABLE", table)
    return split


@pytest.mark.slow
def test_end_to_end(noise, tmp_path, capsys, quick_training):
    torch = pytest.importorskip("torch")
    from tests import torch_networks as nets

    torch.manual_seed(0)
    net = nets.ResNet(nets.BasicBlock, 1, "A")
    with torch.no_grad():
        for _ in range(20):  # for statistics of its own
            net.train()(torch.rand(64, 3, 16, 16) * 4 - 2)
    names = (("bn.", "bn1."), ("fc.", "linear."))
    state = {}
    for name, tensor in net.state_dict().items():
        for ours, theirs in names:
            if name.startswith(ours):
                name = name.replace(ours, theirs)
        state[f"module.{name}"] = tensor
    clone = tmp_path / "clone" / "pretrained_models"
    clone.mkdir(parents=True)
    torch.save({"state_dict": state}, clone / "resnet8-12345678.th")
    torch.save({"state_dict": {}}, clone / "resnet1202-87654321.th")
    pixels = (noise.images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = net.eval()(torch.tensor(np.float32(pixels)).permute(0, 3, 1, 2))
    expected = (logits.argmax(axis=1).numpy() == noise.labels).mean()
    out = tmp_path / "out"
    assert call(f"--weights={tmp_path / 'clone'}", f"--out={out}") == 0
    (line,) = (out / "akamaster.jsonl").read_text().splitlines()
    result = json.loads(line)["result"]
    assert json.loads(line)["settings"]["network"] == "v1-8"
    assert result["accuracy"] == result["pytorch_accuracy"] == expected
    assert result["examples"] == 128
    row = f"91.00 | {100 * expected:.2f} | {100 * expected:.2f}"
    page = (out / "akamaster.md").read_text()
    assert row in page
    assert "noise" in page
    assert "PyTorch shows the same" in page
    capsys.readouterr()
    assert call(f"--weights={clone}", f"--out={out}") == 0
    assert "measuring" not in capsys.readouterr().out
    more = ["--networks=v1-8", "--epochs=2"]
    assert call(f"--weights={clone}", f"--out={out}", *more) == 0
    adapted = json.loads((out / "akamaster.jsonl").read_text().splitlines()[1])
    assert adapted["settings"]["epochs"] == 2
    again = 100 * adapted["result"]["accuracy"]
    capsys.readouterr()
    assert call("--redraw", f"--out={out}") == 0
    told = capsys.readouterr().out
    assert "| after 2 epochs here |" in told
    assert row in told
    assert f"| {again:.2f} |" in told


def test_of_the_original_pixels_nothing_is_excused():
    result = {
        "adapted": {},
        "params": 269_722,
        "accuracy": 0.9173,
        "pytorch_accuracy": 0.9173,
        "examples": 10_000,
        "dataset": "CIFAR-10",
    }
    text = published_weights.markdown({"v1-20": result}, "cpu, jax 1, commit abc")
    assert "| v1-20 | 269,722 | 91.73 | 91.73 | 91.73 | +0.00 |" in text
    assert text.endswith(
        "test images of CIFAR-10; test accuracy (%), cpu, jax 1, commit abc."
    )
    result |= {"accuracy": 0.8, "pytorch_accuracy": 0.8, "dataset": "a copy"}
    assert "PyTorch shows the same" in published_weights.markdown({"v1-20": result}, "")
    result["pytorch_accuracy"] = 0.9
    assert "PyTorch shows the same" not in published_weights.markdown(
        {"v1-20": result}, ""
    )


def test_training_further_is_told_of_the_same_file_alone(tmp_path):
    cells = [
        ({"network": "v1-20", "sha256": "old", "epochs": 5}, {"accuracy": 0.9}),
        ({"network": "v1-20", "sha256": "new"}, {"accuracy": 0.8}),
        ({"network": "v1-20", "sha256": "new", "epochs": 2}, {"accuracy": 0.85}),
        ({"network": "v1-32", "sha256": "other", "epochs": 2}, {"accuracy": 0.7}),
    ]
    experiment = Study("akamaster", tmp_path)
    for settings, result in cells:
        experiment.cell(lambda result=result, **_: dict(result), **settings)
    rows = published_weights.stored(experiment)
    assert list(rows) == ["v1-20"]
    assert rows["v1-20"]["accuracy"] == 0.8
    assert rows["v1-20"]["adapted"] == {2: {"accuracy": 0.85}}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--weights is missing: give a clone of https://github.com/akamaster"),
        (["--weights=.", "--epochs=-1"], "--epochs=-1: give at least 0"),
        (["--weights=empty"], "--weights=empty has no resnet20*.th or other"),
        (["--redraw", "--out=new"], "new has no results: give --weights to evaluate"),
    ],
)
def test_mistakes_are_sentences(given, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*given) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_network_without_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "resnet20.th").touch()
    out = tmp_path / "out"
    assert call(f"--weights={tmp_path}", "--networks=v1-32", f"--out={out}") == 2
    assert "--networks=v1-32: --weights=" in capsys.readouterr().err
    assert not out.exists()


def test_every_network_s_file_is_found(tmp_path):
    for name in ("resnet20-12fca82f.th", "resnet110.th", "resnet1202-f3b1deed.th"):
        (tmp_path / name).touch()
    found = published_weights.find(tmp_path)
    assert {network: path.name for network, path in found.items()} == {
        "v1-20": "resnet20-12fca82f.th",
        "v1-110": "resnet110.th",
    }
