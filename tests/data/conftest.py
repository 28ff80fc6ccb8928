"""A configuration, a local server that misbehaves on request, and tiny archives."""

import gzip
import hashlib
import http.server
import io
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from ml_collections import ConfigDict

from resnet_jax.data import archive

HERE = "127.0.0.1"


@pytest.fixture
def config(tmp_path, tmp_path_factory, monkeypatch):
    """Makes `config.dataset`; its data directory is empty unless given."""
    # TFDS leaves an empty directory behind for each builder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def make(name="digits", **fields):
        defaults = {
            "name": name,
            "data_dir": str(tmp_path),
            "mirror": "",
            "image_size": 0,
            "path": "",
            "split_seed": 0,
            "stream": "auto",
            "train_split": "train",
            "validation_split": "",
            "eval_split": "test",
        }
        return ConfigDict(defaults | fields)

    return make


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `plan` says how each request in turn is answered.

    'whole' (also when the plan is over), 'half' (half of what was asked for, then the
    connection ends), 'stall' (half, then silence), 'no range' (Range is ignored),
    'no range half', or a status.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__((HERE, 0), Handler)
        self.url = f"http://{HERE}:{self.server_port}"
        self.files, self.plan, self.ranges = {}, [], []
        self.closing = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers["Range"])
        how = server.plan.pop(0) if server.plan else "whole"
        data = server.files.get(self.path.removeprefix("/"))
        self.close_connection = True
        if data is None or isinstance(how, int):
            self.send_error(how if isinstance(how, int) else 404)
            return
        start = 0
        if self.headers["Range"] and "no range" not in how:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}"
            )
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        complete = how in ("whole", "no range")
        self.wfile.write(body if complete else body[: len(body) // 2])
        self.wfile.flush()
        if how == "stall":
            self.server.closing.wait(20)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(archive, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(archive, "SILENCE_SECONDS", 0.3)
    monkeypatch.setenv("NO_PROXY", HERE)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def images_and_labels(count, classes, shape=(32, 32, 3), seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, *shape), dtype=np.uint8)
    return images, (np.arange(count) % classes).astype(np.uint8)


def tar(prefix, files):
    """A .tar.gz with these files, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{prefix}/{name}")
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def cifar_rows(images, *labels):
    """CIFAR's binary format: the label bytes, then red, green and blue planes."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([np.stack(labels, axis=1), planes], axis=1).tobytes()


CIFAR10_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


def cifar10(train, test):
    batches = zip(np.split(train[0], 5), np.split(train[1], 5), strict=True)
    files = {
        f"data_batch_{number}.bin": cifar_rows(*batch)
        for number, batch in enumerate(batches, 1)
    }
    names = "\n".join(CIFAR10_NAMES) + "\n\n"
    files |= {"batches.meta.txt": names.encode(), "test_batch.bin": cifar_rows(*test)}
    return {"cifar-10-binary.tar.gz": tar("cifar-10-batches-bin", files)}


def cifar100(train, test):
    files = {
        "coarse_label_names.txt": "".join(f"coarse{i}\n" for i in range(20)).encode(),
        "fine_label_names.txt": "".join(f"fine{i}\n" for i in range(100)).encode(),
    }
    for split, (images, labels) in {"train": train, "test": test}.items():
        files[f"{split}.bin"] = cifar_rows(images, labels // 5, labels)
    return {"cifar-100-binary.tar.gz": tar("cifar-100-binary", files)}


def fashion_mnist(train, test):
    return {
        f"{prefix}-{kind}-ubyte.gz": gzip.compress(bytes(header) + data.tobytes())
        for prefix, (images, labels) in {"train": train, "t10k": test}.items()
        for kind, header, data in (
            ("images-idx3", 16, images),
            ("labels-idx1", 8, labels),
        )
    }


def svhn_cropped(train, test):
    files = {}
    for split, (images, labels) in {"train": train, "test": test}.items():
        buffer = io.BytesIO()
        digits = np.where(labels == 0, 10, labels)[:, None]
        scipy.io.savemat(buffer, {"X": np.moveaxis(images, 0, -1), "y": digits})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    return files


MAKERS = {
    "cifar10": (cifar10, 10, (32, 32, 3)),
    "cifar100": (cifar100, 100, (32, 32, 3)),
    "fashion_mnist": (fashion_mnist, 10, (28, 28, 1)),
    "svhn_cropped": (svhn_cropped, 10, (32, 32, 3)),
}


class Tiny:
    """A data set in its official format with few examples."""

    def __init__(self, name, monkeypatch):
        make, classes, shape = MAKERS[name]
        self.train = images_and_labels(40, classes, shape)
        self.test = images_and_labels(10, classes, shape, seed=1)
        self.files = make(self.train, self.test)
        real = archive.official

        def official(asked):
            # TFDS's own addresses, with the checksums of the tiny files.
            return [
                file._replace(
                    size=len(self.files[file.name]),
                    sha256=hashlib.sha256(self.files[file.name]).hexdigest(),
                )
                for file in real(asked)
            ]

        monkeypatch.setattr(archive, "official", official)

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)


@pytest.fixture
def tiny(monkeypatch):
    """Makes a `Tiny` by name, whose checksums pass for the official ones."""
    return lambda name: Tiny(name, monkeypatch)
