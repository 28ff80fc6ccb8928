"""The experiments that train networks: each end to end, and what `full` would train."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from configs import common
from experiments import (
    activation_order,
    curves,
    depth_and_version,
    fixup,
    optimizers,
    plain_vs_residual,
    shortcut_kinds,
    stochastic_depth,
    study,
    thousand_layers,
)
from resnet_jax import UserError, config

BOTTLENECK = activation_order.BOTTLENECK
TINY = {
    activation_order: {"networks": ((11, BOTTLENECK),), "epochs": 1},
    depth_and_version: {"depths": (8,), "epochs": 1, "batch_size": 8},
    fixup: {"depths": (8,), "learning_rates": (0.1, 0.01), "epochs": 1},
    optimizers: {
        "names": ("sgd", "adam"),
        "factors": (1.0,),
        "networks": ((1, 8),),
        "epochs": 1,
    },
    plain_vs_residual: {"depths": (8,), "epochs": 1},
    shortcut_kinds: {"depth": 8, "epochs": 1},
    stochastic_depth: {"trainings": ((8, 2, 2, {}),), "chances": (0.0, 0.5)},
    thousand_layers: {
        "updates": {"batch_size": 32, "steps": 4, "steps_per_call": 2},
        "learning_rate": 0.1,
        "depth": 0,
        "epochs": 1,
        "model": {},
    },
}
# Experiments with fewer cells, by constant of the module.
CASES = (
    (activation_order, {"ORDERS": ("original",)}),
    (activation_order, {"ORDERS": ("ReLU-only pre-activation",)}),
    (depth_and_version, {"VERSIONS": (1,), "IMAGE_SHAPE": (8, 8, 3)}),
    (fixup, {"KINDS": ("Fixup",)}),
    (optimizers, {}),
    (plain_vs_residual, {}),
    (shortcut_kinds, {"SHORTCUTS": ("shortcut gate, bias 0",)}),
    (shortcut_kinds, {"SHORTCUTS": ("dropout 0.5",)}),
    (stochastic_depth, {}),
    (thousand_layers, {"NETWORKS": {"v2": (2, 11, {})}}),
)


def test_means_by_epoch_weigh_each_call_by_its_updates():
    """Epochs of 2.5 batches: the third update begins in the first epoch."""
    rows = [
        {"step": 2, "epoch": 0.8, "train_loss": 3.0},
        {"step": 3, "epoch": 1.2, "train_loss": 6.0},
        {"step": 3, "epoch": 1.2, "test_loss": 9.0},
        {"step": 4, "epoch": 1.6, "train_loss": 1.0},
        {"step": 5, "epoch": 2.0, "train_loss": 2.0},
    ]
    means = curves._by_epoch(rows, "train_loss")
    np.testing.assert_allclose(means, [(2 * 3.0 + 6.0) / 3, 1.5])


def test_a_run_that_diverged_counts_as_a_guess():
    results = [
        {"test_error": [0.5, 0.1]},
        {"test_error": [0.5], "diverged": "training diverged: loss"},
    ]
    np.testing.assert_allclose(curves.last(results, "test_error"), [0.1, 0.9])
    assert "1 of 2 diverged" in curves.table({"net": results}, ("test_error",))


def test_a_run_that_diverged_at_once_is_drawn_as_a_guess():
    axes = Figure().subplots()
    results = [{"test_error": [0.5, 0.1]}, {"diverged": "training diverged: loss"}]
    curves.plot(axes, results, "test_error", **study.STYLES[0])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [70, 50])
    curves.plot(axes, results[1:], "test_error", **study.STYLES[0])
    np.testing.assert_allclose(axes.lines[1].get_ydata(), [90])
    curves.plot(axes, results[1:], "test_error", 5, 15, **study.STYLES[0])
    np.testing.assert_allclose(axes.lines[2].get_xdata(), [5, 10, 15])
    np.testing.assert_allclose(axes.lines[2].get_ydata(), [90, 90, 90])
    assert "diverged" in thousand_layers.table({"net": [{"loss": []}]})


def test_points_of_equal_seeds_do_not_cover_each_other():
    axes = Figure().subplots()
    study.plot_points(axes, 2, [0.1, 0.1, 0.1], **study.STYLES[0])
    places = axes.lines[0].get_ydata()
    np.testing.assert_allclose(np.diff(places), 0.1)
    assert np.mean(places) == pytest.approx(2)


def test_a_config_is_measured_with_every_seed(tmp_path):
    config = curves.run_config("smoke", 1, 8, 1)
    experiment = study.Study("smoke", tmp_path)
    results = experiment.seeds(
        lambda config, more: {"seed": config["seed"], "more": more}, config, more=7
    )
    assert results == [{"seed": seed, "more": 7} for seed in study.SEEDS]
    assert experiment.has(config=config | {"seed": study.SEEDS[-1]}, more=7)


def test_processes_of_one_study_keep_each_others_cells(tmp_path):
    first, second = (study.Study("smoke", tmp_path) for _ in range(2))
    first.cell(lambda seed: {"error": 0.1}, seed=0)
    second.cell(lambda seed: {"error": 0.2}, seed=1)
    first.cell(lambda seed: {"error": 0.3}, seed=2)
    stored = study.Study("smoke", tmp_path, redraw=True)
    assert stored.settings() == [{"seed": seed} for seed in range(3)]


@pytest.mark.parametrize("line", ["{", "3", "{}"])
def test_a_line_that_is_no_cell_is_told(tmp_path, line):
    study.Study("smoke", tmp_path).cell(lambda seed: {"error": 0.1}, seed=0)
    file = tmp_path / "smoke.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"smoke\.jsonl, line 2, .* delete the line"):
        study.Study("smoke", tmp_path)


def test_a_command_that_fails_is_told():
    with pytest.raises(UserError, match=r"-c raise.* ended with status 3"):
        study.run_process([sys.executable, "-c", "raise SystemExit(3)"])
    assert study.run_process([sys.executable, "-c", "print(1)"]) == "1\n"


def test_a_cell_names_what_computed_it(tmp_path):
    """Also where its run had been made before."""
    run = {"device": "card", "versions": {}, "git_commit": "f00", "seconds": 3.0}
    own = study.Study("smoke", tmp_path / "out")
    assert own.cell(lambda seed: {"error": 0.1, "made_by": run}, seed=0) == {
        "error": 0.1
    }
    stored = json.loads((tmp_path / "out" / "smoke.jsonl").read_text())
    assert stored == {"settings": {"seed": 0}, "result": {"error": 0.1}, **run}


def test_a_study_names_the_commits_that_computed_it(tmp_path):
    experiment = study.Study("smoke", tmp_path)
    run = {"device": "card", "versions": {"jax": "1.0"}}
    for seed, commit in enumerate(["a" * 40, "b" * 40 + "-dirty-12345678"]):
        made_by = run | {"git_commit": commit}
        experiment.cell(lambda seed, by=made_by: {"made_by": by}, seed=seed)
        if seed == 0:
            assert experiment.made_by() == "card, jax 1.0, commit aaaaaaaa"
    assert experiment.made_by() == "card, jax 1.0, commits aaaaaaaa, bbbbbbbb-dirty"


@pytest.mark.slow
def test_divergence_is_a_result(tmp_path, monkeypatch, quick_training):
    monkeypatch.chdir(tmp_path)
    made = curves.run_config("smoke", 1, 8, 2, width=4)
    made["optimizer"]["learning_rate"] = 1e6
    made["schedule"]["warmup_epochs"] = 0.0
    result = curves.curves(made)
    assert "no longer finite" in result["diverged"]
    assert json.dumps(result, allow_nan=False)


@pytest.fixture
def shallow(monkeypatch, quick_training):
    """Networks of width 2, on images as they are, which compiles sooner."""
    run_config = curves.run_config

    def narrow(*args, **settings):
        config = run_config(*args, **settings | {"width": 2})
        config["augment"]["crop"] = 0.0
        return config | {"steps": config["steps"] or 2}

    monkeypatch.setattr(curves, "run_config", narrow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "fewer"),
    [pytest.param(*case, id=case[0].__name__[12:]) for case in CASES],
)
def test_end_to_end(experiment, fewer, tmp_path, monkeypatch, shallow, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(experiment.SCALES, "smoke", TINY[experiment])
    monkeypatch.setattr(study, "SEEDS", (0,))
    for name, cells in fewer.items():
        monkeypatch.setattr(experiment, name, cells)
    command = [experiment.__name__, f"--out={tmp_path / 'results'}"]
    experiment.main(command)
    first = capsys.readouterr().out
    assert "finished" in first
    assert (tmp_path / "results" / "smoke.png").stat().st_size < 200_000
    monkeypatch.setattr(study, "save", lambda *_: None)  # the same figure
    experiment.main(command)
    again = capsys.readouterr().out
    assert "measuring" not in again
    assert again.rstrip("\n") in first  # the same table, from the stored numbers


class Recording(study.Study):
    """Measures nothing, and knows which configs it was asked for."""

    def __init__(self):
        super().__init__("full", Path("nowhere"), redraw=True)
        self.configs = []

    def cell(self, measure, **settings):
        self.configs.append(settings.get("config"))
        error = {"validation_error": [0.1], "validation_loss": [0.1], "params": 1}
        return error


@pytest.mark.parametrize("experiment", TINY, ids=lambda module: module.__name__[12:])
def test_full_asks_for_valid_configs_of_the_papers_networks(experiment):
    asked = Recording()
    experiment.run(asked)
    configs = [made for made in asked.configs if made]
    assert len(configs) >= 9
    for made in configs:
        settings = common.default()
        settings.update(made)
        config.validate(settings)
        assert settings.dataset.name == "cifar10"
        assert settings.model.width in (0, 16)
        assert settings.epochs >= 164
