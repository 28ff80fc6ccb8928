import pytest

from experiments import results
from resnet_jax import command_line

README, RESULTS = results.README, results.RESULTS


def call() -> int:
    return command_line.call(results.main, ["results"])


@pytest.fixture
def page(tmp_path, monkeypatch):
    path = tmp_path / "page.md"
    monkeypatch.setattr(results, "README", path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    path.write_text(f"before\n{results._BEGIN}\nold\n{results._END}\nafter\n")
    return path


def test_the_section_is_what_experiments_wrote_and_nothing_else_changes(page):
    for name in ("b/he2015.md", "a/smoke.md", "a/smoke.json"):
        path = page.parent / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"### {name}\n")
    assert call() == 0
    text = page.read_text()
    assert "### a/smoke.md\n\n### b/he2015.md" in text
    assert "json" not in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert call() == 0
    assert page.read_text() == text


def test_without_results_it_says_so(page):
    assert call() == 0
    assert "None are stored yet." in page.read_text()


def test_a_page_without_a_place_is_left_alone(page, capsys):
    page.write_text("mine")
    assert call() == 2
    assert "put them back" in capsys.readouterr().err
    assert page.read_text() == "mine"


def test_the_readme_has_the_results_that_are_stored():
    text = README.read_text()
    assert text == results.replaced(text, results.section(RESULTS))
