import threading

import numpy as np
import pytest
from PIL import Image

from resnet_jax import UserError, data
from resnet_jax.data import archive, prepare
from tests.data.conftest import CIFAR10_NAMES, MAKERS

NAMES = {
    "cifar10": CIFAR10_NAMES,
    "cifar100": tuple(f"fine{i}" for i in range(100)),
    "fashion_mnist": (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "svhn_cropped": tuple("0123456789"),
}


def pairs(images, labels):
    return sorted(
        (image.tobytes(), label) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("name", prepare.NAMES)
def test_from_the_archive_in_the_data_directory(config, tiny, tmp_path, capsys, name):
    tiny = tiny(name)
    tiny.write(tmp_path)
    dataset = data.load(config(name))
    assert dataset.name == name
    assert dataset.class_names == NAMES[name]
    assert dataset.image_shape == MAKERS[name][2]
    assert pairs(*dataset.train) == pairs(*tiny.train)
    assert pairs(*dataset.eval) == pairs(*tiny.test)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"prepare   {name} in {tmp_path / name}")
    assert err.count("\n") == 1

    # The second time the archive is not needed, and nothing is said.
    for file in tiny.files:
        (tmp_path / file).unlink()
    again = data.load(config(name))
    np.testing.assert_array_equal(again.train.images, dataset.train.images)
    assert capsys.readouterr() == ("", "")


def test_ids_and_coarse_labels_are_those_of_tfds(config, tiny, tmp_path):
    import tensorflow_datasets as tfds

    tiny = tiny("cifar100")
    tiny.write(tmp_path)
    data.load(config("cifar100"))
    source = tfds.builder_from_directory(
        prepare.prepare("cifar100", tmp_path, "")
    ).as_data_source("train")
    images, labels = tiny.train
    for example in source:
        row = int(example["id"].decode().removeprefix("train_"))
        assert example["id"] == b"train_%05d" % row
        assert example["label"] == labels[row]
        assert example["coarse_label"] == labels[row] // 5
        np.testing.assert_array_equal(example["image"], images[row])


def test_official_archives():
    (cifar,) = archive.official("cifar10")
    assert cifar == archive.Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    )
    assert {file.name for file in archive.official("svhn_cropped")} == {
        "train_32x32.mat",
        "test_32x32.mat",
    }
    assert len(archive.official("fashion_mnist")) == 4


def test_from_the_archive_in_downloads(config, tiny, tmp_path, monkeypatch):
    tiny("cifar10").write(tmp_path / "sets" / "downloads")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    assert len(data.load(config("cifar10", data_dir="")).train.labels) == 40


def test_downloaded_from_a_mirror(config, tiny, server, tmp_path, capsys):
    tiny = tiny("fashion_mnist")
    server.files = {f"mirror/{name}": content for name, content in tiny.files.items()}
    server.plan = ["half", "whole", "stall"]
    # Nothing is given: TFDS's default directory is created.
    dataset = data.load(
        config("fashion_mnist", data_dir="", mirror=server.url + "/mirror/")
    )
    assert pairs(*dataset.eval) == pairs(*tiny.test)
    downloads = tmp_path / "home" / "tensorflow_datasets" / "downloads"
    assert set(tiny.files) <= {path.name for path in downloads.iterdir()}
    assert f"download  {server.url}/mirror/train-images" in capsys.readouterr().err


def test_only_what_is_missing_is_downloaded(config, tiny, server, tmp_path):
    tiny = tiny("svhn_cropped")
    tiny.write(tmp_path)
    (tmp_path / "test_32x32.mat").unlink()
    server.files = tiny.files
    data.load(config("svhn_cropped", mirror=server.url))
    assert len(server.ranges) == 1


def test_ways_out_when_nothing_works(config, tiny, server, tmp_path):
    tiny("cifar10")
    with pytest.raises(UserError) as error:
        data.load(config("cifar10", mirror=server.url))
    first, *ways = str(error.value).splitlines()
    assert first == (
        f"cifar10 is not prepared in {tmp_path}, cifar-10-binary.tar.gz is neither "
        f"there nor in its downloads/, and {server.url}/cifar-10-binary.tar.gz failed "
        "(HTTP 404 Not Found):"
    )
    assert len(ways) == 3
    assert "put cifar-10-binary.tar.gz (" in ways[0]
    assert f"into {tmp_path}/downloads" in ways[0]
    assert "--config.dataset.data_dir or TFDS_DATA_DIR" in ways[1]
    assert "--config.dataset.name=digits" in ways[2]


@pytest.mark.parametrize("folder", ["", "downloads"])
def test_wrong_archive_is_never_used(config, tiny, server, tmp_path, folder):
    tiny = tiny("cifar10")
    server.files = tiny.files
    tiny.write(tmp_path / folder)
    path = tmp_path / folder / "cifar-10-binary.tar.gz"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path} is not the official archive.*delete"):
        data.load(config("cifar10", mirror=server.url))
    assert server.ranges == []
    assert not (tmp_path / "cifar10").exists()


def test_preparation_is_whole_or_not_there(config, tiny, tmp_path, monkeypatch):
    tiny("cifar10").write(tmp_path)
    images = iter(range(30))
    real = Image.fromarray

    def fail_later(array):
        if next(images, None) is None:
            raise OSError(28, "No space left on device")
        return real(array)

    with monkeypatch.context() as patch:
        patch.setattr(Image, "fromarray", fail_later)
        with pytest.raises(
            UserError, match=r"No space left on device.*: make room, or give"
        ):
            data.load(config("cifar10"))
    assert not list((tmp_path / "cifar10").iterdir())
    # What a killed process leaves behind is not taken for a prepared set.
    (tmp_path / "cifar10" / "incomplete.ABC123_3.0.2").mkdir()
    assert len(data.load(config("cifar10")).train.labels) == 40


def test_data_directory_that_cannot_be_written_to(config, tiny, tmp_path):
    tiny("cifar10")
    (tmp_path / "downloads").write_text("a file in the way")
    with pytest.raises(UserError, match=r"cifar10 cannot be prepared .*\(.*exists"):
        data.load(config("cifar10"))


def test_two_runs_at_once_prepare_once(config, tiny, tmp_path, monkeypatch):
    tiny("cifar10").write(tmp_path)
    built = []
    real = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda *args: (built.append(1), real(*args)))
    sizes = []
    runs = [
        threading.Thread(
            target=lambda: sizes.append(len(data.load(config("cifar10")).eval.labels))
        )
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sizes == [10, 10, 10]
    assert built == [1]
