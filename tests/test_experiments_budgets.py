import numpy as np
import pytest

from configs import common
from experiments import budgets, curves, study
from resnet_jax import command_line, config


@pytest.mark.parametrize("recipe", budgets.RECIPES)
@pytest.mark.parametrize("scale", budgets.SCALES)
def test_configs_are_valid_and_never_train_on_what_compares_them(scale, recipe):
    settings = common.default()
    settings.update(budgets.run_config(scale, recipe, 5))
    config.validate(settings)
    assert settings.epochs == 5
    assert settings.dataset.validation_split == "train[45000:]"
    assert settings.dataset.train_split in ("train[:2000]", "train[:45000]")


def test_what_is_counted_in_epochs_shrinks_with_them():
    made = common.get_config("strong", 1, 20)
    assert (made.epochs, made.augment.plain_epochs) == (200, 15)
    curves.shorten(made, 10)
    assert made.epochs == 10
    assert made.augment.plain_epochs == pytest.approx(0.75)
    assert made.schedule.warmup_epochs == pytest.approx(0.25)


def test_the_table_and_the_figure_come_from_stored_cells(tmp_path, monkeypatch):
    measured = []

    def measure(config):
        measured.append(config)
        accuracy = 0.5 + config["seed"] / 100 + config["epochs"] / 1000
        return {"accuracy": accuracy, "seconds": 1.0 + config["seed"]}

    monkeypatch.setattr(curves, "last_accuracy", measure)
    out = tmp_path / "results"
    assert command_line.call(budgets.main, ["budgets", f"--out={out}"]) == 0
    assert len(measured) == 2 * len(study.SEEDS) * len(budgets.RECIPES)
    page = (out / "smoke.md").read_text()
    assert "### Recipes on short budgets (smoke)" in page
    assert "| `fast` | 51.50 ± 1.00 | 2 | 52.50 ± 1.00 | 2 |" in page
    assert "`python -m experiments.budgets --scale=smoke`" in page
    assert (out / "smoke.png").exists()
    monkeypatch.setattr(curves, "last_accuracy", pytest.fail)
    assert command_line.call(budgets.main, ["budgets", f"--out={out}"]) == 0
    assert (out / "smoke.md").read_text() == page


def test_a_recipe_that_diverged_counts_as_a_guess(monkeypatch):
    monkeypatch.setattr(curves, "run", lambda _: curves.Run([], {}, "it diverged"))
    found = [curves.last_accuracy({})] * 3
    cells = {(5, recipe): found for recipe in budgets.RECIPES}
    assert "| `paper` | 10.00 ± 0.00 | - |" in budgets.table(cells, "smoke", "cpu")
    assert np.isclose(found[0]["accuracy"], 0.1)
