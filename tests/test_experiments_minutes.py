import importlib.util

import pytest

from experiments import minutes
from resnet_jax import command_line
from tests.quick import ENVIRONMENT

# v1-8 of four channels on random images of CIFAR-10's shape.
SMALL = {
    "dataset.name": "fake",
    "dataset.train_split": "train[:2000]",
    "dataset.eval_split": "test[:160]",
    "model.depth": 8,
    "model.width": 4,
    "batch_size": 16,
    "augment.sizes": (8,),
    "augment.size_ends": (0.5,),
}


@pytest.mark.slow
def test_fast_takes_as_many_steps_as_fit(monkeypatch):
    """The time of a command, by a stand-in: 5 seconds, and a hundredth a step."""
    told = []

    def trained(seed, settings, steps, directory):
        told.append(steps)
        return {
            "accuracy": 0.5,
            "seconds": 5 + steps / 100,
            "images": 16 * steps,
            "training": steps / 100,
            "overhead": 5.0,
        }

    monkeypatch.setattr(minutes, "_trained", trained)
    found = minutes.measure("fast", 0.5, 0, **SMALL)
    assert told == [200, int((30 * 0.95 - 5) * 100)]
    assert found["seconds"] <= 30


@pytest.mark.slow
def test_command_of_fast_tells_its_times(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    found = minutes._trained(0, SMALL, 12, tmp_path / "run")
    assert found["images"] == 12 * 16
    assert 0 < found["training"] < found["seconds"]
    assert 0 <= found["accuracy"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("contender", ["torch", "keras"])
def test_peers_stop_when_their_time_is_over(contender):
    for package in ("torch",) if contender == "torch" else ("keras", "tensorflow"):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed")
    given = ("dataset.name", "dataset.train_split", "dataset.eval_split")
    settings = {name: SMALL[name] for name in (*given, "model.depth", "batch_size")}
    found = minutes.measure(contender, 0.1, 0, **settings)
    assert 6 <= found["seconds"] < 60
    assert found["images"] % 16 == 0
    assert 0 <= found["accuracy"] <= 1


def test_figure_and_table():
    result = {"accuracy": 0.7, "images": 1000, "seconds": 590.0}
    cells = {name: [result, result | {"accuracy": 0.8}] for name in minutes.CONTENDERS}
    assert "75.00%" in minutes.table(cells)
    axes = minutes.draw(cells, 10.0).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [75.0] * 3
    assert len(axes.lines) == 3
    single = {name: [result] for name in minutes.CONTENDERS}
    assert not minutes.draw(single, 10.0).axes[0].lines


def test_without_the_peers_nothing_is_measured(monkeypatch, tmp_path, capsys):
    def missing(name):
        return None if name == "torch" else True

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    argv = ["minutes", f"--out={tmp_path / 'out'}"]
    assert command_line.call(minutes.main, argv) == 2
    assert "torch is not installed" in capsys.readouterr().err
