import json

import numpy as np
import pytest

from experiments import scaling
from resnet_jax import UserError, command_line

CELL = {"version": 1, "depth": 8, "batch_size": 16, "devices": 2, "mode": "jit"}


def test_line_fits_small_and_large_values_alike():
    x = np.array([20, 56, 110, 1202])
    start, slope, residuals = scaling.line(x, 3 + 0.5 * x)
    assert (start, slope) == pytest.approx((3, 0.5))
    np.testing.assert_allclose(residuals, 0, atol=1e-9)
    assert np.abs(scaling.line(x, x**1.5)[2]).max() > 0.2


def test_verdict_says_whether_cost_is_linear():
    depths = [20, 56, 110]
    linear = scaling.verdict("time of v1", "depth", depths, [5, 14, 27.5], "ms")
    assert linear.startswith("time of v1: ")
    assert "0.25 x depth ms" in linear
    assert linear.endswith(": linear within 10%")
    curved = scaling.verdict("time of v1", "depth", depths, [5, 30, 150], "ms")
    assert ": not linear within 10%" in curved


@pytest.fixture
def counted(monkeypatch):
    """Cells without measuring: a step takes a second a layer; the calls made."""
    calls = []

    def measure(**settings) -> dict:
        calls.append(settings)
        cost = settings["depth"] * settings["batch_size"]
        return {
            "step_seconds": cost / 128,
            "compile_seconds": 1.0,
            "device_bytes": cost * 2**20,
            "peak_bytes": 2**30,
            "device_count": settings["devices"] or 2,
            "made_by": {"device": "pocket calculator"},
        }

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling, "device_counts", lambda: [1, 2])
    return calls


@pytest.mark.slow
def test_table_and_figure_come_from_cells_that_are_measured_once(
    counted, tmp_path, capsys, monkeypatch
):
    argv = ["scaling", f"--out={tmp_path}"]
    assert command_line.call(scaling.main, argv) == 0
    rows = (tmp_path / "smoke.jsonl").read_text().splitlines()
    cells = [json.loads(row) for row in rows]
    assert len(cells) == len(counted) == 4 + 12 + 10 - 2  # two are on two axes
    assert {cell["device"] for cell in cells} == {"pocket calculator"}
    assert "made_by" not in cells[0]["result"]
    assert all((tmp_path / f"smoke.{kind}").exists() for kind in ("png", "svg"))
    told = capsys.readouterr().out
    assert "depth    v1-1202     32      2 jit" in told
    assert " + 32 x depth MiB, residuals" in told
    assert told.count(": linear within 10%") == 8  # time and memory, twice by each

    before = len(counted)
    assert command_line.call(scaling.main, argv) == 0
    monkeypatch.setattr(scaling, "device_counts", lambda: [1, 2, 4, 8])
    assert command_line.call(scaling.main, [*argv, "--redraw"]) == 0
    assert len(counted) == before


@pytest.mark.slow
def test_cell_is_measured_in_a_process_with_its_own_devices():
    cell = scaling.measure(**CELL, dataset="digits", seconds=0.05)
    assert cell["device_count"] == 2
    assert cell["made_by"]["device"] == "cpu"
    assert cell["step_seconds"] > 0
    assert cell["peak_bytes"] > cell["device_bytes"] > 600_000  # its parameters alone


@pytest.mark.slow
def test_cell_that_fails_is_told_with_its_cause(capfd):
    with pytest.raises(UserError, match="ended with status 1: see above"):
        scaling.measure(**CELL, dataset="nowhere", seconds=0.05)
    assert "nowhere" in capfd.readouterr().err
