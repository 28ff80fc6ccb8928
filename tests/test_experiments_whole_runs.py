import numpy as np
import pytest

from experiments import whole_runs
from tests.quick import ENVIRONMENT

RUN = {
    "seconds": dict(zip(whole_runs.PARTS, (8.0, 1.5, 3.0, 2.0, 0.5), strict=True)),
    "images_per_second": 5000.0,
    "test_accuracy": 0.875,
}


@pytest.mark.slow
def test_the_parts_of_a_run_make_up_its_time(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    small = "--config.model.version=1 --config.model.depth=8 --config.steps=4"
    found = whole_runs.measure(f"--config=configs/digits.py {small}")
    assert set(found["seconds"]) == set(whole_runs.PARTS)
    assert min(found["seconds"].values()) >= 0
    assert found["seconds"]["imports, report"] > 1
    assert found["dataset"] == "digits"


def test_table_and_figure_have_every_part():
    runs = {"one": RUN, "another": RUN}
    head, line, _ = whole_runs.table(runs).splitlines()
    assert all(part in head for part in whole_runs.PARTS)
    seconds = ["8.0", "1.5", "3.0", "2.0", "0.5", "15.0"]
    assert line.split() == ["one", *seconds, "5,000", "87.50%"]
    (axes,) = whole_runs.draw(runs).axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert np.isclose(max(ends), 15)
