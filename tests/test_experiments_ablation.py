import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy import stats

from configs import common
from experiments import ablation, curves, study
from resnet_jax import command_line, config

DEPTH = 8


def test_every_difference_of_strong_is_an_ingredient():
    """So that taking them all away leaves the paper's recipe."""
    paper, strong = (
        flatten_dict(common.get_config(recipe, 1, DEPTH).to_dict(), sep=".")
        for recipe in ("paper", "strong")
    )
    differs = {field for field in paper if paper[field] != strong[field]} - {"epochs"}
    named = {field for fields in ablation.INGREDIENTS.values() for field in fields}
    assert differs <= named


def test_ingredients_are_added_with_the_values_of_strong_and_taken_away_whole():
    found = ablation.recipes(DEPTH)
    strong = common.get_config("strong", 1, DEPTH)
    for name in ablation.INGREDIENTS:
        assert ("paper", name) in found
        if ("strong", name) in found:
            changed = strong.copy_and_resolve_references()
            changed.update_from_flattened_dict(found["strong", name])
            assert changed != strong
            for field, value in found["paper", name].items():
                assert config.get(strong, field) == value
    assert len([name for recipe, name in found if recipe == "strong"]) > 3


@pytest.mark.parametrize("scale", ablation.SCALES)
def test_configs_are_valid(scale):
    for (recipe, _), changes in ablation.recipes(DEPTH).items():
        made = ablation.run_config(scale, recipe, changes)
        settings = common.default()
        settings.update(made)
        config.validate(settings)
        assert settings.dataset.validation_split == "train[45000:]"
        assert settings.augment.plain_epochs < settings.epochs


def cells(paper, added, strong, without):
    def results(accuracies, seconds):
        return [{"accuracy": value, "seconds": seconds} for value in accuracies]

    return {
        ("paper", ""): results(paper, 10.0),
        ("paper", "cutout"): results(added, 11.0),
        ("strong", ""): results(strong, 22.0),
        ("strong", "cutout"): results(without, 20.0),
    }


def test_worth_is_with_less_without_seed_by_seed():
    found = ablation.worths(
        cells([0.5, 0.6, 0.7], [0.51, 0.61, 0.71], [0.8, 0.9], [0.9, 0.8])
    )
    assert found["paper", "cutout"]["mean"] == pytest.approx(1)
    assert found["paper", "cutout"]["interval"] == pytest.approx([1, 1])
    assert found["paper", "cutout"]["seconds"] == pytest.approx(1.1)
    assert found["strong", "cutout"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["strong", "cutout"]["interval"][1] == pytest.approx(127.0620474)
    assert found["strong", "cutout"]["seconds"] == pytest.approx(1.1)


def test_intervals_hold_the_difference_as_often_as_they_say():
    """Also where all differ from one sample, and equal seeds move all alike."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(1000):
        samples = rng.normal(1.0, 2.0, (6, 3)) + rng.normal(0, 5.0, 3)
        half = ablation.half_interval(samples.tolist())
        gains = samples[1:].mean(1) - samples[0].mean()
        hits += (np.abs(gains) <= half).tolist()
    assert np.mean(hits) == pytest.approx(0.95, abs=0.01)


def test_interval_of_one_difference_is_that_of_pairs():
    one, other = np.random.default_rng(0).normal(size=(2, 5))
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    half = ablation.half_interval([one.tolist(), other.tolist()])
    assert half == pytest.approx((expected.high - expected.low) / 2)
    assert ablation.half_interval([[1.0]]) is None
    assert ablation.half_interval([[1.0], [2.0]]) is None
    assert ablation.half_interval([[1.0, 2.0]]) is None


def test_a_run_that_diverged_counts_as_a_guess(monkeypatch):
    monkeypatch.setattr(curves, "run", lambda _: curves.Run([], {}, "it diverged"))
    assert curves.last_accuracy({})["accuracy"] == pytest.approx(0.1)
    found = cells([0.5, 0.5], [0.1, 0.1], [0.5, 0.5], [0.5, 0.5])
    found["paper", "cutout"] = [curves.last_accuracy({})] * 2
    assert "| cutout | -40.00 (-40.00 to -40.00) | xnan |" in ablation.table(
        found, "smoke", "cpu"
    )


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = {"name": "digits", "train_split": "train[:128]"}
    dataset["validation_split"] = "train[128:200]"
    scale = {"depth": DEPTH, "epochs": 1, "dataset": dataset}
    monkeypatch.setitem(ablation.SCALES, "smoke", scale)


@pytest.mark.slow
def test_a_run_is_measured(tiny, quick_training):
    made = ablation.run_config("smoke", "strong", {})
    made["model"]["width"] = 2
    found = curves.last_accuracy(made)
    assert 0 <= found["accuracy"] <= 1
    assert found["seconds"] > 0
    assert "diverged" not in found


@pytest.mark.slow
def test_the_table_and_the_figure_come_from_stored_cells(tiny, tmp_path, monkeypatch):
    measured = []

    def measure(config):
        measured.append(config)
        return {"accuracy": 0.5 + config["optimizer"]["ema"] / 10, "seconds": 2.0}

    monkeypatch.setattr(curves, "last_accuracy", measure)
    out = tmp_path / "results"
    assert command_line.call(ablation.main, ["ablation", f"--out={out}"]) == 0
    assert len(measured) == len(study.SEEDS) * len(ablation.recipes(DEPTH))
    page = (out / "smoke.md").read_text()
    assert "### What each ingredient is worth (smoke)" in page
    worth = "+9.99 (+9.99 to +9.99) | x1.00"
    assert f"| EMA of weights | {worth} | {worth} |" in page
    assert "`python -m experiments.ablation --scale=smoke`" in page
    assert (out / "smoke.png").exists()
    monkeypatch.setattr(curves, "last_accuracy", pytest.fail)
    assert command_line.call(ablation.main, ["ablation", f"--out={out}"]) == 0
    assert (out / "smoke.md").read_text() == page
