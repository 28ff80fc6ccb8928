import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from resnet_jax import UserError, data
from resnet_jax.data import picture, prepare
from resnet_jax.data.source import Source


def test_digits(config):
    digits = data.load(config("digits"))
    assert digits.name == "digits"
    assert digits.class_names == tuple("0123456789")
    assert digits.num_classes == 10
    assert digits.image_shape == (8, 8, 1)
    assert digits.validation is None
    for split, size in ((digits.train, 1437), (digits.eval, 360)):
        assert split.images.shape == (size, 8, 8, 1)
        assert split.images.dtype == np.uint8
        assert split.labels.shape == (size,)
        assert split.labels.dtype == np.int32
        # The split is fair: every class has about a tenth.
        assert np.bincount(split.labels).min() > 0.07 * size
    # Together they are scikit-learn's digits, each with its label.
    original = load_digits()
    expected = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), label)
        for image, label in zip(original.images, original.target, strict=True)
    }
    images = np.concatenate([digits.train.images, digits.eval.images])
    labels = np.concatenate([digits.train.labels, digits.eval.labels])
    assert images.max() == 255
    pairs = zip(images, labels, strict=True)
    assert {(image.tobytes(), label) for image, label in pairs} == expected


def test_digits_never_change_place(config):
    labels = data.load(config("digits")).eval.labels
    assert labels[:12].tolist() == [7, 9, 4, 7, 0, 2, 6, 1, 3, 1, 3, 7]


def test_fake_says_so_and_is_the_same_each_time(config):
    fake = data.load(config("fake", train_split="train[:100]", eval_split="test[:5]"))
    again = data.load(
        config("fake", train_split="train[50:100]", eval_split="test[:5]")
    )
    assert "fake" in fake.name
    assert "random" in fake.name
    assert fake.image_shape == (32, 32, 3)
    assert fake.num_classes == 10
    np.testing.assert_array_equal(fake.train.images[50:], again.train.images)
    np.testing.assert_array_equal(fake.train.labels[50:], again.train.labels)
    assert (fake.train.images[:5] != fake.eval.images).any()


def test_three_splits_are_cut_where_they_should(config):
    whole = data.load(config("digits")).train
    parts = data.load(
        config(
            "digits",
            train_split="train[:1000]",
            validation_split="train[1000:1100]",
            eval_split="train[-5:]+test[:3]",
        )
    )
    np.testing.assert_array_equal(parts.train.images, whole.images[:1000])
    np.testing.assert_array_equal(parts.validation.images, whole.images[1000:1100])
    np.testing.assert_array_equal(parts.validation.labels, whole.labels[1000:1100])
    np.testing.assert_array_equal(parts.eval.images[:5], whole.images[-5:])
    assert len(parts.eval.labels) == 8


def test_test_examples_that_were_seen_are_noted(config):
    validation = {"train_split": "train[:50]", "validation_split": "train[50:60]"}
    digits = data.load(config("digits", **validation, eval_split="test"))
    assert digits.notes == ()
    digits = data.load(config("digits", **validation, eval_split="test+train[45:60]"))
    first, second = digits.notes
    assert "eval_split shares 5 examples with config.dataset.train_split" in first
    assert "eval_split shares 10 examples with config.dataset.valid" in second


def test_random_pixels_are_the_same_streamed(config):
    """As they are where they are made large."""
    splits = {"train_split": "train[5:25]", "eval_split": "test[:5]", "image_size": 16}
    streamed = data.load(config("fake", stream="always", **splits))
    whole = data.load(config("fake", stream="never", **splits))
    np.testing.assert_array_equal(streamed.train.images[:], whole.train.images)
    np.testing.assert_array_equal(streamed.train.labels, whole.train.labels)


def test_overlap_is_an_error(config):
    with pytest.raises(UserError, match=r"dataset.train_split=train\[:1293\]"):
        data.load(config("digits", validation_split="train[90%:]"))


def test_split_that_does_not_exist(config):
    with pytest.raises(UserError, match=r"eval_split='tests'.*did you mean 'test'"):
        data.load(config("digits", eval_split="tests"))


def test_image_size(config):
    digits = data.load(config("digits", image_size=16, train_split="train[:50]"))
    assert digits.image_shape == (16, 16, 1)


def test_resizing_is_bilinear():
    edge = np.array([[[0], [255]], [[0], [255]]], np.uint8)
    assert picture.fit(edge, 4)[..., 0].tolist() == [[0, 64, 191, 255]] * 4


@pytest.mark.parametrize("shape", [(6, 4, 3), (4, 6, 1)])
def test_resizing_reads_the_middle_as_predictions_do(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    middle = image[1:-1] if shape[0] == 6 else image[:, 1:-1]
    np.testing.assert_array_equal(picture.fit(image, 4), middle)
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "PNG")
    for size in (3, 8):
        predicted = picture.decode(file, (size, size), shape[-1])
        np.testing.assert_array_equal(picture.fit(image, size), predicted)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_that_are_no_colours_are_resized_one_by_one(channels):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (9, 12, channels), np.uint8)
    image[..., -1] = 0  # transparent, if it were that
    alone = [picture.fit(image[..., [n]], 6)[..., 0] for n in range(channels)]
    np.testing.assert_array_equal(picture.fit(image, 6), np.stack(alone, -1))
    assert channels == 1 or picture.fit(image, 6)[..., 0].any()


def test_image_size_in_colour(config):
    fake = data.load(
        config("fake", image_size=8, train_split="train[:3]", eval_split="test[:1]")
    )
    assert fake.train.images.shape == (3, 8, 8, 3)


def source_of(images, labels):
    return lambda: Source(
        name="mixed",
        class_names=("a", "b"),
        sizes={"train": len(images), "test": 1},
        examples=lambda split, indices: [(images[i], labels[i]) for i in indices],
    )


def test_images_that_differ_in_size(config, monkeypatch):
    images = [np.zeros((4, 4, 3), np.uint8), np.full((5, 7, 3), 9, np.uint8)]
    monkeypatch.setitem(data.SOURCES, "mixed", source_of(images, [0, 1]))
    with pytest.raises(
        UserError, match=r"differ in size.*give config.dataset.image_size"
    ):
        data.load(config("mixed"))
    mixed = data.load(config("mixed", image_size=6))
    assert mixed.train.images.shape == (2, 6, 6, 3)
    assert (mixed.train.images[1] == 9).all()


def test_examples_without_a_label(config, monkeypatch):
    images = [np.zeros((4, 4), np.uint8)] * 2
    monkeypatch.setitem(data.SOURCES, "mixed", source_of(images, [0, -1]))
    with pytest.raises(UserError, match=r"without a label in split 'train'"):
        data.load(config("mixed"))


def test_labels_that_count_from_one(config, monkeypatch):
    images = [np.zeros((4, 4), np.uint8)] * 2
    monkeypatch.setitem(data.SOURCES, "mixed", source_of(images, [1, 2]))
    with pytest.raises(UserError, match=r"the label 2 in split .* number them from 0"):
        data.load(config("mixed"))


@pytest.mark.parametrize("stream", ["never", "always"])
def test_images_that_are_not_bytes(config, monkeypatch, stream):
    images = [np.full((4, 4, 3), 0.7, np.float32)] * 2
    monkeypatch.setitem(data.SOURCES, "mixed", source_of(images, [0, 1]))
    with pytest.raises(UserError, match="mixed are float32: give uint8, 0 to 255"):
        data.load(config("mixed", stream=stream))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"train_split": "train[5]"},
            r"dataset.train_split='train\[5\]' is not a split",
        ),
        ({"train_split": ""}, "dataset.train_split='' is not a split"),
        ({"validation_split": "train["}, "dataset.validation_split='train.' is not"),
        ({"eval_split": ""}, "dataset.eval_split='' is not a split"),
        ({"mirror": "example.org"}, "dataset.mirror=example.org is not an address"),
        (
            {"name": "cifar-10"},
            r"dataset.name=cifar-10 is neither .*did you mean 'cifar10'\?",
        ),
        ({"name": "digit"}, r"did you mean 'digits'\?"),
        (
            {"name": "image_folders"},
            r"did you mean 'image_folder'\? .*, image_folder, digits and fake$",
        ),
        ({"name": "../digits"}, "is neither known"),
        (
            {"name": "qqqqqq"},
            "is neither known nor prepared in .*available without TensorFlow",
        ),
        ({"name": "stl10"}, "stl10 is not prepared.*tfds build stl10 --file_format"),
        ({"name": "cifar10:3.0.1"}, "is not prepared in"),
        (
            {"name": "cifar10", "data_dir": "/does/not/exist"},
            "dataset.data_dir=/does/not/exist is not a directory",
        ),
    ],
)
def test_check(config, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        data.check(config(**fields))


def test_what_is_known_is_what_can_be_read():
    assert {*prepare.NAMES, *data.SOURCES, "image_folder"} == set(data.KNOWN)


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({"name": "digits"}, 8),
        ({"name": "cifar10:3.0.2"}, 32),
        ({"name": "image_folder"}, 0),
        ({"name": "image_folder", "image_size": 64}, 64),
        ({"name": "eurosat/rgb"}, 0),
    ],
)
def test_size_of_images_is_known_before_they_are_read(config, fields, size):
    assert data.known_size(config(**fields)) == size


def test_check_of_the_environment(config, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "/does/not/exist")
    with pytest.raises(UserError, match="TFDS_DATA_DIR=/does/not/exist is not a dir"):
        data.check(config("cifar10", data_dir=""))
    data.check(config("digits", data_dir=""))


@pytest.mark.parametrize("name", ["digits", "fake", "cifar10", "svhn_cropped"])
def test_check_passes_and_writes_nothing(config, tmp_path, name):
    data.check(config(name, validation_split="train[90%:]"))
    data.check(config(name, data_dir=""))
    assert not list(tmp_path.iterdir())
