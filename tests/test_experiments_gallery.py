import importlib
import shutil

import pytest

from experiments import gallery, study
from resnet_jax import command_line

RESULTS = gallery.RESULTS


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The stored results of one experiment, without its figures."""
    monkeypatch.setattr(gallery, "RESULTS", tmp_path / "results")
    directory = tmp_path / "results" / "shattered_gradients"
    directory.mkdir(parents=True)
    shutil.copy(RESULTS / "shattered_gradients" / "smoke.jsonl", directory)
    return directory


def call() -> int:
    return command_line.call(gallery.main, ["gallery"])


@pytest.mark.slow
def test_the_page_and_its_figures_come_from_stored_results(copied, capsys):
    assert call() == 0
    assert "measuring" not in capsys.readouterr().out
    page = (copied.parents[1] / "README.md").read_text()
    assert "python -m experiments.shattered_gradients --scale=smoke" in page
    assert "\n\n**Found**. In a plain network each layer halves" in page
    for kind in ("png", "svg", "jsonl"):
        assert f"(results/shattered_gradients/smoke.{kind})" in page
        assert (copied / f"smoke.{kind}").exists()


def test_a_missing_measurement_is_told_and_not_made(copied, capsys):
    file = copied / "smoke.jsonl"
    before = file.read_text().splitlines(keepends=True)[:-1]
    file.write_text("".join(before))
    assert call() == 2
    assert "lacks residual=True" in capsys.readouterr().err
    assert file.read_text() == "".join(before)
    assert not (copied.parents[1] / "README.md").exists()


def test_results_of_no_experiment_are_left_out(copied, capsys):
    copied.rename(copied.with_name("mine"))
    assert call() == 0
    assert "mine: there is no experiment of that name" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("*/smoke.jsonl")), ids=lambda file: file.parent.name
)
def test_the_page_is_of_what_is_stored_and_that_is_all_of_a_study(file):
    name = file.parent.name
    module = importlib.import_module(f"experiments.{name}")
    if hasattr(module, "run"):
        module.run(study.Study("smoke", file.parent, redraw=True))  # lacks nothing
    page = (RESULTS.parent / "README.md").read_text()
    assert gallery.section(module, name, [file]) in page


def test_every_stored_experiment_says_what_was_found():
    for file in RESULTS.glob("*/smoke.jsonl"):
        directory = file.parent
        doc = (RESULTS.parent / f"{directory.name}.py").read_text()
        for label in ("Claim", "Cost", "Found"):
            assert gallery.paragraph(doc, label), f"{directory.name}: {label}"
