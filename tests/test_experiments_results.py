from pathlib import Path

import pytest

from experiments import results
from resnet_jax import command_line

ROOT = Path(__file__).parents[1]


def call(directory: Path) -> int:
    given = [f"--results={directory / 'results'}", f"--readme={directory / 'page.md'}"]
    return command_line.call(results.main, ["results", *given])


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{results._BEGIN}\nold\n{results._END}\nafter\n")
    return path


def test_the_section_is_what_experiments_wrote_and_nothing_else_changes(page):
    for name in ("b/he2015.md", "a/smoke.md", "a/smoke.json"):
        path = page.parent / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"### {name}\n")
    assert call(page.parent) == 0
    text = page.read_text()
    assert "### a/smoke.md\n\n### b/he2015.md" in text
    assert "json" not in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert call(page.parent) == 0
    assert page.read_text() == text


def test_without_results_it_says_so(page, capsys):
    assert call(page.parent) == 2
    assert "results is not a directory" in capsys.readouterr().err
    (page.parent / "results").mkdir()
    assert call(page.parent) == 0
    assert "None are stored yet." in page.read_text()


def test_a_page_without_a_place_is_left_alone(page, capsys):
    (page.parent / "results").mkdir()
    page.write_text("mine")
    assert call(page.parent) == 2
    assert "put them back" in capsys.readouterr().err
    assert page.read_text() == "mine"
    page.unlink()
    assert call(page.parent) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_the_readme_has_the_results_that_are_stored():
    text = (ROOT / "README.md").read_text()
    stored = results.section(ROOT / "experiments" / "results")
    assert text == results.replaced(text, stored)
