import json
import math

import pytest
from ml_collections import ConfigDict

from configs import common
from experiments import curves, reproduce
from experiments.reproduce import TABLES, Published
from resnet_jax import command_line, config


def call(*arguments: str) -> int:
    return command_line.call(reproduce.main, ["reproduce", *arguments])


def result(last: float, best: float = 0.95) -> dict:
    return {
        "test_accuracy": last,
        "best_test_accuracy": best,
        "params": 269_722,
        "epochs": 164.0,
        "dataset": "CIFAR-10",
        "seconds": 61.0,
    }


def test_difference_in_standard_errors():
    """Of means of 2 and 5 runs: 0.2 sqrt(1/2 + 1/5) with a deviation of 0.2."""
    ours = [result(0.9300), result(0.9300 + 0.002 * math.sqrt(2))]
    row = reproduce.compare(Published(93.0, runs=5), ours)
    difference = 0.1 * math.sqrt(2)
    assert row["difference"] == pytest.approx(difference)
    assert row["standard_deviation"] == pytest.approx(0.2)
    expected = difference / (0.2 * math.sqrt(0.7))
    assert row["standard_errors"] == pytest.approx(expected)
    assert row["best_epoch"] == pytest.approx(95)


def test_one_seed_and_one_that_diverged_have_no_standard_error():
    row = reproduce.compare(Published(93.0), [result(0.9), {"diverged": "it did"}])
    assert row["standard_errors"] is None
    assert row["difference"] == pytest.approx(-3)
    text = reproduce.markdown(TABLES["he2015"], {"v1-20": row}, "cpu, jax 1")
    shown = "| 93.00 | 90.00 | - | 1, 1 diverged | 95.00 | -3.00 | - | 61 |"
    assert f"| v1-20 | 269,722 {shown}" in text
    assert "Ours: recipe `paper`, CIFAR-10, test accuracy" in text
    assert text.endswith("the last of 164 epochs; float32, cpu, jax 1.")
    nothing = reproduce.compare(Published(93.0), [{"diverged": "it did"}])
    assert "| 0, 1 diverged |" in reproduce.markdown(
        TABLES["he2015"], {"v1-20": nothing}, ""
    )


def test_of_other_pixels_no_difference_is_told():
    copy = {"dataset": "CIFAR-10, pixels not the original (as of a JPEG copy)"}
    row = reproduce.compare(Published(93.0), [result(0.88) | copy, result(0.89) | copy])
    assert row["mean"] == pytest.approx(88.5)
    assert row["difference"] is row["standard_errors"] is None
    text = reproduce.markdown(TABLES["he2015"], {"v1-20": row}, "cpu, jax 1")
    assert "No difference is given" in text
    original = reproduce.compare(Published(93.0), [result(0.93)])
    figure = reproduce.draw({"v1-20": row, "v1-32": row, "v1-44": original})
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {
        "published (original CIFAR-10)",
        "published",
        "ours, 95% interval",
        "ours, one seed",
    }


@pytest.mark.parametrize("name", TABLES)
def test_tables_train_valid_configs_of_the_networks(name):
    for network in TABLES[name].networks:
        made = ConfigDict(reproduce.run_config(TABLES[name], network, 2, 0))
        settings = common.default()
        settings.update(made)
        config.validate(settings)
        assert network.startswith(f"v{made.model.version}-{made.model.depth}")
        assert made.seed == 2
        assert made.dataset.name == "cifar10"
        assert made.epochs >= 164
        assert 80 < TABLES[name].networks[network].percent < 98
    short = reproduce.run_config(TABLES[name], network, 2, 15, "bfloat16")
    assert (short["epochs"], short["model"]["dtype"]) == (15, "bfloat16")
    assert short["augment"]["plain_epochs"] < 2
    if short["schedule"]["warmup"] == "constant":  # the paper's 400 updates
        assert short["schedule"]["warmup_epochs"] == 400 * 128 / 50_000
    else:
        assert short["schedule"]["warmup_epochs"] < 1


def test_other_pixels_are_told():
    settings = common.default().dataset
    settings.name = "digits"
    assert "digits" in reproduce.dataset_name(settings.to_json())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "--table is missing: give one of he2015"),
        (["--table=he2017"], "--table='he2017'"),
        (["--table=keras", "--networks=v1-21"], "--networks=v1-21: --table=keras has"),
        (["--table=keras", "--seeds=0"], "--seeds=0: give at least 1"),
        (["--table=keras", "--epochs=-1"], "--epochs=-1: give at least 0"),
        (["--table=keras", "--redraw", "--out=new"], "new has no results of keras"),
        (["--table=he2016", "--recipe=keras"], "its own, not v1-110-pre of"),
    ],
)
def test_mistakes_are_sentences(given, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*given) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_end_to_end(tmp_path, monkeypatch, capsys, quick_training):
    monkeypatch.chdir(tmp_path)
    tiny = {"v1-8": Published(91.0), "v1-14": Published(92.0)}
    monkeypatch.setitem(TABLES, "he2015", reproduce.Table("elsewhere", "paper", tiny))

    def keras(config):
        config.update(steps=2)
        config.dataset.name = "digits"
        config.model.width = 2
        config.augment.flip = False

    monkeypatch.setitem(common.RECIPES, "keras", keras)
    out = tmp_path / "out"
    shared = ["--table=he2015", "--recipe=keras", "--epochs=5", "--dtype=bfloat16"]
    shared.append(f"--out={out}")
    assert call(*shared, "--networks=v1-8,v1-8", "--seeds=2") == 0
    file = out / "he2015-keras-5epochs-bfloat16.json"
    stored = json.loads(file.read_text())
    row = stored["networks"]["v1-8"]
    assert len(row["accuracies"]) == 2
    assert row["interval"][0] < row["mean"] < row["interval"][1]
    assert stored["command"] == (
        "python -m experiments.reproduce --table=he2015 --networks=v1-8 --recipe=keras "
        "--epochs=5 --dtype=bfloat16 --seeds=2"
    )
    page = file.with_suffix(".md").read_text()
    assert page.startswith(
        "### Networks of table he2015, recipe keras, 5 epochs, bfloat16\n"
    )
    assert "Published: elsewhere." in page
    assert "cpu, jax" in page
    assert file.with_suffix(".png").exists()
    # What is stored alone: one network, although the table has two.
    before = page
    with monkeypatch.context() as patch:
        patch.setattr(curves, "run", pytest.fail)
        assert call(*shared, "--redraw") == 0
    assert file.with_suffix(".md").read_text() == before
    assert "v1-14" not in before
    # Of all that is stored, whatever was asked for last.
    assert call(*shared, "--networks=v1-14", "--seeds=1") == 0
    rows = json.loads(file.read_text())["networks"]
    assert [len(row["accuracies"]) for row in rows.values()] == [2, 1]
    assert call(*shared, "--seeds=1", "--redraw") == 0
    assert json.loads(file.read_text())["networks"] == rows
