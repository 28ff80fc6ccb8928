import hashlib
import time

import numpy as np
import pytest

from resnet_jax import UserError
from resnet_jax.data import archive

DATA = np.random.default_rng(0).bytes(300_000)
SIZE = len(DATA)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def fetch(server, tmp_path):
    """Fetches 'a.tar.gz' from the server; returns its content."""
    server.files["a.tar.gz"] = DATA
    path = tmp_path / "a.tar.gz"

    def run(size=SIZE, digest=DIGEST):
        archive.download(server.url + "/a.tar.gz", path, size=size, digest=digest)
        assert not path.with_name("a.tar.gz.part").exists()
        return path.read_bytes()

    return run


def test_good(fetch, server, capsys):
    assert fetch() == DATA
    assert server.ranges == [None]
    assert capsys.readouterr() == ("", "")  # No progress bar into a log file.


@pytest.mark.parametrize("how", ["half", "stall"])
def test_cut_off_or_silent_half_way_is_resumed(fetch, server, how):
    server.plan = [how]
    start = time.perf_counter()
    assert fetch() == DATA
    assert len(server.ranges) == 2
    assert server.ranges[1].startswith("bytes=1")
    assert time.perf_counter() - start < 5


def test_cut_off_often_is_resumed_while_more_comes(fetch, server):
    server.plan = ["half"] * 4 + [503] + ["half"] * 2
    assert fetch() == DATA
    assert len(server.ranges) == 8


def test_next_run_resumes(fetch, server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(DATA[:1234])
    assert fetch() == DATA
    assert server.ranges == ["bytes=1234-"]


def test_next_run_with_everything_there_asks_nothing(fetch, server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(DATA)
    assert fetch() == DATA
    assert server.ranges == []


def test_server_without_range(fetch, server):
    server.plan = ["no range half", "no range"]
    assert fetch() == DATA
    assert len(server.ranges) == 2


def test_wrong_checksum_is_deleted(fetch, tmp_path):
    with pytest.raises(
        UserError, match=r"than a.tar.gz \(its SHA-256 is wrong\), which was deleted"
    ):
        fetch(digest="0" * 64)
    assert not list(tmp_path.iterdir())


def test_wrong_beginning_is_found_and_the_next_run_is_good(fetch, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="SHA-256 is wrong"):
        fetch()
    assert fetch() == DATA


@pytest.mark.parametrize(
    ("plan", "reason", "requests"),
    [
        ([404], "HTTP 404 Not Found", 1),
        ([503] * 9, "503 Server Error", 3),
        (["half", *[503] * 9], "503 Server Error", 4),
        (["half"] * 2 + ["no range half"] * 9, "the connection was cut off", 5),
        (["stall"] + [500] * 9, "500 Server Error", 4),
    ],
)
def test_failures(fetch, server, plan, reason, requests):
    server.plan = plan
    with pytest.raises(archive.DownloadError, match=reason):
        fetch()
    assert len(server.ranges) == requests


def test_silence_has_an_end(fetch, server):
    server.plan = ["stall"] * 40
    server.files["a.tar.gz"] = DATA[:2]
    start = time.perf_counter()
    with pytest.raises(archive.DownloadError, match=r"no data for 0\.3 s"):
        fetch(size=2)
    assert time.perf_counter() - start < 5


def test_another_length_is_not_downloaded(fetch, tmp_path):
    with pytest.raises(archive.DownloadError, match="has 300000 bytes, not 300001"):
        fetch(size=SIZE + 1)
    assert not (tmp_path / "a.tar.gz").exists()


def test_no_server(server, tmp_path):
    port = server.server_port
    server.socket.close()
    with pytest.raises(archive.DownloadError, match="no connection"):
        archive.download(
            f"http://127.0.0.1:{port}/a", tmp_path / "a", size=1, digest=DIGEST
        )
