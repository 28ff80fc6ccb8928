import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from resnet_jax.data import cache


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "resnet_jax" / "data"


def images(value: int) -> dict[str, np.ndarray]:
    time.sleep(0.02)  # so that no two are as old
    return {"images": np.full(1000, value, np.uint8)}


def forbidden() -> dict[str, np.ndarray]:
    raise AssertionError("made again")


def test_what_was_not_used_for_longest_is_deleted(kept, monkeypatch):
    monkeypatch.setattr(cache, "MOST_BYTES", 5000)  # with headers, three of them
    made = [cache.cached(f"{n}", partial(images, n)) for n in range(3)]
    time.sleep(0.02)
    cache.cached("0", forbidden)
    cache.cached("3", partial(images, 3))
    assert len(list(kept.iterdir())) == 3
    for number in (0, 2, 3):
        assert (cache.cached(f"{number}", forbidden)["images"] == number).all()
    with pytest.raises(AssertionError, match="made again"):
        cache.cached("1", forbidden)
    assert (made[1]["images"] == 1).all()  # who is using it can go on


def test_one_that_is_larger_than_all_may_be_is_kept(kept, monkeypatch):
    cache.cached("small", partial(images, 0))
    monkeypatch.setattr(cache, "MOST_BYTES", 500)
    cache.cached("large", partial(images, 1))
    assert len(list(kept.iterdir())) == 1
    cache.cached("large", forbidden)


def test_what_a_killed_process_left_goes_too(kept, monkeypatch):
    (kept / ".part-x").mkdir(parents=True)
    np.save(kept / ".part-x" / "images.npy", np.zeros(1000, np.uint8))
    os.utime(kept / ".part-x", (0, 0))
    monkeypatch.setattr(cache, "MOST_BYTES", 2000)
    cache.cached("key", partial(images, 0))
    assert not (kept / ".part-x").exists()
