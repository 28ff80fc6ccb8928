"""Folders of pictures, good and bad."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_jax import UserError, data
from resnet_jax.data import dataset, listing, picture

SIZE = 8


def colour(*name) -> tuple[int, int, int]:
    """A colour of its own for each name, in whatever process."""
    value = sum(ord(c) * 7919**i for i, c in enumerate("/".join(map(str, name))))
    return tuple(
        int(x) for x in np.random.default_rng(value % 2**32).integers(256, size=3)
    )


def draw(path: Path, kind: str | None = None, size: int = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent.name, path.name
    Image.new("RGB", (size, size), colour(*name)).save(path, kind)


def write(root: Path, **classes) -> Path:
    """Makes `root/split/class/NN.png`, as `write(root, train={'cat': 3})`."""
    for split, counts in classes.items():
        for name, count in counts.items():
            for number in range(count):
                draw(root / split / name / f"{number:02}.png")
            (root / split / name).mkdir(parents=True, exist_ok=True)
    return root


@pytest.fixture
def root(tmp_path):
    return tmp_path / "pictures"


@pytest.fixture
def load(config, root):
    """Loads the folder `root`; returns the data and the notes on them."""

    def run(**fields):
        fields = {"path": str(root), "image_size": SIZE} | fields
        loaded = data.load(config("image_folder", **fields))
        return loaded, "\n".join(loaded.notes)

    return run


def names(split: data.Split, root: Path, folder: str) -> list[str]:
    """The files of a split, found by their colours."""
    known = {
        colour(path.parent.name, path.name): f"{path.parent.name}/{path.name}"
        for path in (root / folder).glob("*/*.png")
    }
    return [known[tuple(map(int, image[0, 0]))] for image in split.images]


def test_train_and_test_folders(load, root):
    write(root, train={"cat": 6, "dog": 6}, test={"dog": 2, "cat": 1})
    found, told = load()
    assert found.name == "image_folder (pictures)"
    assert found.class_names == ("cat", "dog")
    assert found.image_shape == (SIZE, SIZE, 3)
    assert found.validation is None
    train, test = names(found.train, root, "train"), names(found.eval, root, "test")
    for split, files in ((found.train, train), (found.eval, test)):
        classes = [found.class_names[label] for label in split.labels]
        assert classes == [file.split("/")[0] for file in files]
        assert split.labels.dtype == np.int32
    assert len(set(train)) == 12
    assert sorted(test) == ["cat/00.png", "dog/00.png", "dog/01.png"]
    assert told == "classes   2, of 6 pictures each in train"


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_validation_folder(load, root, validation):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1}, **{validation: {"a": 2}})
    found, told = load(validation_split="val")
    assert sorted(names(found.validation, root, validation)) == ["a/00.png", "a/01.png"]
    assert "warning   val has no picture of b" in told
    shutil.rmtree(root / "test")
    found, told = load()
    assert sorted(names(found.eval, root, validation)) == ["a/00.png", "a/01.png"]
    assert "is the validation folder, since there is no test folder" in told
    assert "warning   config" not in told
    with pytest.raises(UserError, match=r"no split 'val'.*choose one of train, test$"):
        load(validation_split="val")


def test_one_folder_is_split_by_class_and_seed(load, root):
    write(root / "x", **{"": {"a": 50, "b": 20, "c": 2, "d": 1}})
    found, told = load(path=str(root / "x"))
    train, test = (names(split, root, "x") for split in (found.train, found.eval))
    assert len({*train, *test}) == len(train) + len(test) == 73
    assert np.bincount(found.eval.labels).tolist() == [10, 4, 1]
    assert "split     20% of each class for testing, by seed 0" in told
    assert "so none to test on: d" in told
    assert (
        "4, of 1 (c) to 40 (a) pictures in train; always guessing a would be right"
        in told
    )
    assert names(load(path=str(root / "x"))[0].train, root, "x") == train
    other, _ = load(path=str(root / "x"), split_seed=1)
    assert set(names(other.eval, root, "x")) != set(test)
    assert np.bincount(other.eval.labels).tolist() == [10, 4, 1]


def test_single_pictures_leave_none_to_test(load, root):
    write(root, **{"": {"a": 1, "b": 1}})
    with pytest.raises(UserError, match=r"one picture of each class, and none to test"):
        load()


def test_split_outlives_a_move_and_another_file(load, root):
    write(root / "x", **{"": {"a": 40, "b": 40}})
    before = set(names(load(path=str(root / "x"))[0].eval, root, "x"))
    shutil.move(root / "x", root / "y")
    assert set(names(load(path=str(root / "y"))[0].eval, root, "y")) == before
    draw(root / "y" / "a" / "new.png")
    after = set(names(load(path=str(root / "y"))[0].eval, root, "y"))
    assert len(after - before) <= 1


def test_train_alone_is_split_too(load, root):
    write(root, train={"a": 10, "b": 10})
    found, _ = load()
    assert (len(found.train.labels), len(found.eval.labels)) == (16, 4)


def test_every_slice_has_its_share_of_each_class(load, root):
    write(root, train={"a": 40, "b": 20}, test={"a": 1, "b": 1})
    found, _ = load(train_split="train[:80%]", validation_split="train[80%:]")
    assert np.bincount(found.train.labels).tolist() == [32, 16]
    assert np.bincount(found.validation.labels).tolist() == [8, 4]
    assert set(found.train.labels[:3]) == {0, 1}
    numbers = [name for name in names(found.train, root, "train") if name[0] == "a"]
    assert numbers != sorted(numbers)


def test_class_called_train_is_a_class(load, root):
    write(root / "x", **{"": {"train": 5, "tram": 5}})
    assert load(path=str(root / "x"))[0].class_names == ("train", "tram")


def test_what_is_no_picture_is_left_alone(load, root):
    write(root, train={"a": 3, "b": 3, "none": 0}, test={"a": 1, "b": 1}, more={"a": 1})
    for name in (".DS_Store", "Thumbs.db", ".hidden.png", ".git/a.png"):
        path = root / "train" / "a" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    for name in ("a/notes.txt", "a/clip.mp4", "b/model.h5", "labels.csv"):
        (root / "train" / name).write_text("x")
    found, told = load()
    assert found.class_names == ("a", "b")
    assert len(found.train.labels) == 6
    assert "ignored   more next to train" in told
    assert "classes without a picture: none" in told
    assert "no pictures: train/a/clip.mp4, train/a/notes.txt, train/b/model.h5" in told
    assert "and 1 more" in told
    assert "DS_Store" not in told
    assert "hidden" not in told


def test_folders_in_classes_and_links(load, root):
    write(root, train={"a": 2, "b": 2}, test={"a": 1, "b": 1})
    draw(root / "train" / "a" / "deep" / "er" / "x.png")
    (root / "train" / "a" / "loop").symlink_to(root / "train")
    draw(root / "elsewhere" / "y.png")
    (root / "train" / "b" / "linked").symlink_to(root / "elsewhere")
    (root / "train" / "c").symlink_to(root / "elsewhere")
    found, told = load()
    assert np.bincount(found.train.labels).tolist() == [3, 2, 1]
    assert "no pictures: train/a/loop, train/b/linked" in told


def test_names_of_any_language_and_wrong_suffixes(load, root):
    write(root, train={"кот": 2, "b c": 2}, test={"кот": 1, "b c": 1})
    draw(root / "train" / "кот" / "猫 ü.JPG", "PNG")
    found, told = load()
    assert found.class_names == ("b c", "кот")
    assert len(found.train.labels) == 5
    assert "skipped" not in told


def test_damaged_pictures_are_told_and_skipped(load, root):
    write(root, train={"a": 20, "b": 20}, test={"a": 2, "b": 2})
    (root / "train" / "a" / "00.png").write_bytes(b"")
    (root / "train" / "b" / "05.png").write_bytes(b"\x89PNG")
    (root / "train" / "b" / "gone.png").symlink_to(root / "nowhere.png")
    for _ in range(2):  # and again where the pictures come from the cache
        found, told = load()
        assert np.bincount(found.train.labels).tolist() == [19, 19]
        assert len(found.eval.labels) == 4
        lines = [line for line in told.splitlines() if line.startswith("skipped")]
        assert len(lines) == 3
        for name in ("train/a/00.png", "train/b/05.png", "train/b/gone.png"):
            assert any(name in line for line in lines)
        streamed, told = load(stream="always")
        assert told.count("skipped") == 3
        np.testing.assert_array_equal(streamed.train.labels, found.train.labels)
        for row, image in enumerate(found.train.images):
            np.testing.assert_array_equal(streamed.train.images[row], image)


def test_long_lists_of_damaged_pictures_are_cut(load, root):
    write(root, train={"a": 150, "b": 3}, test={"a": 2, "b": 2})
    for number in range(12):
        (root / "train" / "a" / f"{number:02}.png").write_bytes(b"")
    _, told = load()
    assert told.count("skipped") == dataset._TOLD + 1
    assert "2 more that cannot be read" in told


def test_pictures_are_kept_until_a_file_changes(load, root, monkeypatch):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    first, _ = load(stream="never")
    decoded = []
    decode = picture.decode
    monkeypatch.setattr(
        picture, "decode", lambda path, size: decoded.append(path) or decode(path, size)
    )
    again, _ = load(stream="never")
    np.testing.assert_array_equal(again.train.images, first.train.images)
    assert not decoded
    load(stream="never", image_size=4)
    assert len(decoded) == 8
    changed = root / "train" / "a" / "01.png"
    draw(changed)
    os.utime(changed, ns=(1, 1))
    load(stream="never")
    assert len(decoded) == 16


def test_two_folders_of_files_of_one_size_and_time_are_two(load, root):
    other = write(
        root.with_name("other"), train={"a": 2, "b": 2}, test={"a": 1, "b": 1}
    )
    write(root, train={"a": 2, "b": 2}, test={"a": 1, "b": 1})
    for number, folder in enumerate((root, other)):
        for path in folder.rglob("*.png"):
            path.unlink()
            grey = Image.new("L", (SIZE, SIZE), 50 + 100 * number)
            grey.save(path.with_suffix(".bmp"))
            os.utime(path.with_suffix(".bmp"), ns=(1, 1))
    found = [load(path=str(path))[0].train.images for path in (root, other)]
    assert (found[0] == 50).all()
    assert (found[1] == 150).all()


def test_pixels_are_read_again_by_other_code(load, root, monkeypatch):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    load(stream="never")
    monkeypatch.setattr(data, "DECODING", "other")
    monkeypatch.setattr(
        picture, "decode", lambda *_: np.full((SIZE, SIZE, 3), 7, np.uint8)
    )
    assert (load(stream="never")[0].train.images == 7).all()


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "one gone", "text"])
def test_damaged_cache_is_made_again(load, root, damage):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    first = np.array(load()[0].train.images)  # not the map of the file
    (file,) = (Path.home() / ".cache" / "resnet_jax" / "data").glob("*/images.npy")
    content = file.read_bytes()
    if damage == "gone":
        shutil.rmtree(file.parent)
    elif damage == "one gone":
        file.with_name("skipped.npy").unlink()
    else:
        cut = {"cut": content[:-100], "empty": b"", "text": b"text"}
        file.write_bytes(cut[damage])
    again, _ = load()
    np.testing.assert_array_equal(again.train.images, first)
    assert file.read_bytes() == content


def test_cache_that_cannot_be_written_is_done_without(load, root, capsys):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    (Path.home() / ".cache").parent.mkdir(exist_ok=True)
    (Path.home() / ".cache").write_text("a file")
    assert len(load()[0].train.labels) == 6
    out, told = capsys.readouterr()
    assert out == ""
    assert "warning   what was read is not cached" in told


def test_signal_while_the_cache_is_written_leaves_nothing(load, root, monkeypatch):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    kept = Path.home() / ".cache" / "resnet_jax" / "data"
    assert not list(kept.glob(".part-*"))


def test_images_that_do_not_fit_in_memory(load, root, monkeypatch):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})

    def full(*_):
        raise MemoryError

    monkeypatch.setattr(np, "empty", full)
    with pytest.raises(UserError, match=r"stream=never: .* leave it at auto"):
        load()


def test_folder_whose_name_is_no_text(load, root):
    named = root.with_name("caf\udce9")
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    root.rename(named)
    name = load(path=str(named))[0].name
    assert name == "image_folder (caf\N{REPLACEMENT CHARACTER})"


def test_images_as_stored(load, root):
    write(root, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    assert load(image_size=0)[0].image_shape == (SIZE, SIZE, 3)
    draw(root / "train" / "a" / "large.png", size=9)
    with pytest.raises(UserError, match=r"differ in size.*dataset.image_size"):
        load(image_size=0)


def nothing(root):
    pass


def empty(root):
    root.mkdir()


def no_pictures(root):
    write(root, train={"a": 0, "b": 0})


def loose_pictures(root):
    draw(root / "1.png")


def loose_in_train(root):
    draw(root / "train" / "1.png")


def loose_in_splits(root):
    for split in ("train", "test"):
        draw(root / split / "1.png")


def one_class(root):
    write(root, train={"cat": 5})


def one_class_with_pictures(root):
    write(root, train={"cat": 5, "dog": 0}, test={"cat": 1})


def unknown_class(root):
    write(root, train={"cat": 3, "dog": 3}, test={"cat": 1, "emu": 1})


def all_damaged(root):
    write(root, train={"cat": 9, "dog": 9}, test={"cat": 2, "dog": 2})
    for path in root.glob("train/*/*.png"):
        path.write_bytes(b"no picture")


def third_damaged(root):
    write(root, train={"cat": 9, "dog": 9}, test={"cat": 2, "dog": 2})
    for path in root.glob("train/cat/*.png"):
        path.write_bytes(path.read_bytes()[:40])


def damaged_test(root):
    write(root, train={"cat": 30, "dog": 30}, test={"cat": 1, "dog": 1})
    for path in root.glob("test/*/*.png"):
        path.write_bytes(b"")


def other_formats(root):
    write(root, train={"cat": 0, "dog": 0})
    for name in ("cat/a.tiff", "dog/a.heic", "dog/b.svg"):
        (root / "train" / name).write_text("x")


def a_file(root):
    root.write_text("x")


def two_validations(root):
    write(root, train={"a": 2, "b": 2}, val={"a": 1, "b": 1}, valid={"a": 1, "b": 1})


def other_names(root):
    write(root, Train={"a": 2, "b": 2}, Testing={"a": 1, "b": 1})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (nothing, "does not exist: give a folder of pictures"),
        (a_file, "is a file: give a folder of pictures"),
        (empty, "has no pictures: put each class's pictures"),
        (no_pictures, "has no pictures: put each class's pictures"),
        (
            other_formats,
            r"has no pictures: .*\.gif, .*\.jpg.*in a folder named after it",
        ),
        (loose_pictures, "has pictures, but not in folders: put each"),
        (loose_in_train, r"has pictures in train, but no class folders there"),
        (loose_in_splits, r"has pictures in test, train, but no class folders"),
        (one_class, "has pictures of only one class, cat: give at least two"),
        (one_class_with_pictures, "has pictures of only one class, cat"),
        (unknown_class, "emu of test has no pictures to train on: give it some"),
        (all_damaged, r"over 10% of 22 pictures cannot be read \(such as train/"),
        (third_damaged, r"over 10% of 22 pictures cannot be read \(such as train/cat/"),
        (damaged_test, r"no picture of split 'test' can be read \(first: test/"),
        (two_validations, "several folders for validation"),
        (
            other_names,
            "in Testing, Train, but none in train: name the splits train, val and test",
        ),
    ],
)
@pytest.mark.parametrize("stream", ["never", "always"])
def test_bad_folders_are_refused_in_a_sentence(load, root, make, sentence, stream):
    make(root)
    with pytest.raises(UserError, match=sentence) as raised:
        load(stream=stream)
    message = str(raised.value)
    assert raised.value.exit_status == 2
    assert "\n" not in message
    assert "pictures" in message
    assert not (Path.home() / ".cache").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_that_must_not_be_read(load, root):
    write(root, train={"a": 3, "b": 3})
    (root / "train" / "a").chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load()
    (root / "train" / "a").chmod(0o700)


def test_unreadable_folder_is_a_sentence(root):
    with pytest.raises(UserError, match=r"pictures cannot be read \(No such file"):
        listing._entries(root)
