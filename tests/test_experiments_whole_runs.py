import numpy as np
import pytest

from experiments import whole_runs
from tests.quick import ENVIRONMENT

RUN = {
    "seconds": {"training": 8.0, "evaluation": 1.5, "compiling": 3.0, "rest": 2.5},
    "images_per_second": 5000.0,
    "test_accuracy": 0.875,
}


@pytest.mark.slow
def test_the_parts_of_a_run_make_up_its_time(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    small = ["--config.model.version=1", "--config.model.depth=8", "--config.steps=4"]
    found = whole_runs.measure(["--config=configs/digits.py", *small])
    assert set(found["seconds"]) == set(whole_runs.PARTS)
    assert min(found["seconds"].values()) >= 0
    assert found["seconds"]["rest"] > 1  # imports alone
    assert found["dataset"] == "digits"


def test_table_and_figure_have_every_part():
    runs = {"one": RUN, "another": RUN}
    head, line, _ = whole_runs.table(runs).splitlines()
    assert head.split()[1:6] == [*whole_runs.PARTS, "total"]
    assert line.split() == [
        "one",
        "8.0",
        "1.5",
        "3.0",
        "2.5",
        "15.0",
        "5,000",
        "87.50%",
    ]
    (axes,) = whole_runs.draw(runs).axes
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert np.isclose(max(ends), 15)
