import pytest

from experiments import depth_and_version


@pytest.mark.slow
def test_remat_takes_less_memory_for_the_same_network(monkeypatch):
    monkeypatch.setattr(depth_and_version, "IMAGE_SHAPE", (16, 16, 3))
    kept, again = (depth_and_version.cost(1, 20, remat, 16) for remat in (False, True))
    assert kept["params"] == again["params"] == 269_722
    # At least the outputs of 19 convolutions on the other side of the scale.
    assert again["memory"] < kept["memory"] - 2**20
