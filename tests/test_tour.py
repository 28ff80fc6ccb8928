"""The notebook runs from first to last cell, and is committed with its outputs."""

from pathlib import Path

import pytest

from tests.quick import ENVIRONMENT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "experiments" / "tour.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_runs_and_shows_what_it_says(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("resnet_jax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "experiments").mkdir()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(TOUR, as_version=4)
    (training,) = [cell for cell in notebook.cells if "config.epochs" in cell.source]
    shorter = "config.epochs = 4\nconfig.model.scan = True"  # compiles faster
    training.source = training.source.replace("config.epochs = 8", shorter)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        resources={"metadata": {"path": str(tmp_path / "experiments")}},
    )
    client.execute()  # raises where a cell does
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(figures) == 4
    assert (tmp_path / "runs" / "tour" / "digit.png").exists()
    printed = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    accuracies = {
        words[0]: float(words[-1].rstrip("%"))
        for words in map(str.split, printed.splitlines())
        if words[:1] in (["residual"], ["plain"])
    }
    assert accuracies["residual"] > 60
    assert accuracies["plain"] < 30


def test_is_committed_small_and_whole():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert TOUR.stat().st_size < 500_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "/home/" not in str(output)
