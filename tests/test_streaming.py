"""Training on images that are read batch by batch, against training in memory."""

import pickle
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from configs import image_folder
from resnet_jax import UserError, command_line, data, evaluate, report, train
from resnet_jax.config import validate
from resnet_jax.data import stream
from resnet_jax.data.stream import StreamedImages
from resnet_jax.feed import Feed, train_feed
from resnet_jax.metrics import read_rows
from resnet_jax.parallel import Parallel
from resnet_jax.plan import Plan
from resnet_jax.step import epoch_order
from tests.test_train import digits_config, same_bits, saved_arrays

pytest.importorskip("grain")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No test finds what another has kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def streamed(config):
    config = config.copy_and_resolve_references()
    config.dataset.stream = "always"
    return config


def test_images_that_come_from_another_process_are_read_here_if_the_same():
    config = streamed(digits_config()).dataset
    dataset = data.load(config)
    copy = pickle.loads(pickle.dumps(dataset))
    data.reopen(copy, config)
    for one, other in ((copy.train, dataset.train), (copy.eval, dataset.eval)):
        assert np.array_equal(one.images[3:5], other.images[3:5])
    config.name = "fake"
    with pytest.raises(
        UserError, match=r"fake .* is not the same here as in process 0"
    ):
        data.reopen(copy, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "normalization"), [("jit", "mean_std"), ("pmap", "pixel_mean")]
)
def test_streaming_gives_the_losses_of_training_in_memory(
    tmp_path, mode, normalization
):
    config = digits_config(**{"parallel": mode, "augment.normalization": normalization})
    config.dataset.update(train_split="train[:400]", eval_split="test[:100]")
    train.train_and_evaluate(config, tmp_path / "memory")
    train.train_and_evaluate(streamed(config), tmp_path / "stream")
    rows, others = (read_rows(tmp_path / name) for name in ("memory", "stream"))
    assert len(rows) == len(others) > 4
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_stopping_half_way_changes_no_bit_of_a_streamed_run(tmp_path):
    """At step 8, in the second epoch of 6.25 batches."""
    config = streamed(digits_config())
    config.dataset.update(train_split="train[:400]", eval_split="test[:100]")
    train.train_and_evaluate(config, tmp_path / "straight")
    half = config.copy_and_resolve_references()
    half.steps = 8
    train.train_and_evaluate(half, tmp_path / "halves")
    (tmp_path / "halves" / "summary.json").unlink()
    train.train_and_evaluate(config, tmp_path / "halves")
    assert same_bits(
        *(saved_arrays(tmp_path / name, config) for name in ("straight", "halves"))
    )


def test_streamed_images_are_indexed_as_an_array():
    config = digits_config()
    images, labels = data.load(config.dataset).eval
    others, other_labels = data.load(streamed(config).dataset).eval
    np.testing.assert_array_equal(labels, other_labels)
    for rows in (7, slice(3, 40), slice(350, 500), np.array([9, 0, 9])):
        np.testing.assert_array_equal(others[rows], images[rows])


@pytest.mark.slow
def test_report_of_a_streamed_run(tmp_path, quick_training):
    config = streamed(digits_config(steps=4))
    config.dataset.update(train_split="train[:400]", eval_split="test[:100]")
    train.train_and_evaluate(config, tmp_path)
    report.update(tmp_path)
    assert "most confident mistakes" in (tmp_path / "report.html").read_text().lower()


class Numbered(StreamedImages):
    """Images whose pixel is their own row."""

    def __init__(self, count: int):
        self.shape = (count, 1, 1, 1)

    def __getitem__(self, row):
        return np.full((1, 1, 1), row, np.uint8)


def rows_of(blocks) -> list[list[int]]:
    """The rows of each batch; the labels must be theirs."""
    batches = []
    for first, last, images, labels in blocks:
        size = np.asarray(labels).shape[-1]
        images = np.asarray(images).reshape(-1, size).T
        labels = np.asarray(labels).reshape(-1, size).T
        np.testing.assert_array_equal(labels, 2 * images)
        assert not images[last - first :].any()
        batches += images[: last - first].tolist()
    return batches


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize("devices", [1, 8])
def test_feed_gives_the_epochs_orders_wherever_it_starts(mode, devices):
    examples, batch_size, seed = 20, 8, 3
    split = data.Split(Numbered(examples), 2 * np.arange(examples, dtype=np.int32))
    plan = Plan(examples, batch_size, total_steps=10, steps_per_call=3)
    parallel = Parallel.over(jax.devices()[:devices], mode, batch_size)
    laid_out = np.concatenate([epoch_order(seed, e, examples) for e in range(4)])
    expected = laid_out.reshape(-1, batch_size).tolist()
    feed = train_feed(split, plan, seed, parallel)
    assert np.asarray(feed.positions).ravel().tolist() == list(range(batch_size))
    for start, stop in ((0, 2), (2, 6), (7, 10), (1, 3), (3, 4), (0, 10)):
        found = rows_of(feed.blocks(start, stop, end=10))
        assert found == expected[start:stop]
    _, _, images, _ = next(feed.blocks(0, 1, end=1))
    assert len(images.sharding.device_set) == devices
    assert images.shape == feed.empty_block()[0].shape
    feed.close()


def test_feed_reads_ahead_and_no_further():
    read = []

    class Watched(Numbered):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    split = data.Split(Watched(200), 2 * np.arange(200, dtype=np.int32))
    parallel = Parallel.over(jax.devices()[:1], "jit", 4)
    feed = Feed(split, lambda place: place, 4, 1, parallel)
    assert rows_of(feed.blocks(0, 1, end=50)) == [[0, 1, 2, 3]]
    feed.close()
    assert len(read) <= 100


@pytest.mark.parametrize(
    ("seconds", "threads"),
    [((0.0, 9.0, 0.0), 1), ((0.01, 0.01, 0.0), stream.THREADS)],  # a stall is no speed
)
def test_only_slow_pictures_are_read_by_several_threads(monkeypatch, seconds, threads):
    now = 0.0

    class Pictures(StreamedImages):
        def __init__(self):
            pass

        def __getitem__(self, row):
            nonlocal now
            now += seconds[row]

    monkeypatch.setattr(stream, "time", SimpleNamespace(perf_counter=lambda: now))
    assert stream._threads(Pictures(), [2, 0, 1]) == threads


def test_blocks_of_large_images_are_short(monkeypatch):
    split = data.Split(Numbered(20), 2 * np.arange(20, dtype=np.int32))
    parallel = Parallel.over(jax.devices()[:1], "jit", 4)
    monkeypatch.setattr("resnet_jax.feed._BLOCK_BYTES", 8)
    feed = Feed(split, lambda place: place, 4, 5, parallel)
    blocks = list(feed.blocks(0, 5, end=5))
    assert [(first, last) for first, last, _, _ in blocks] == [(0, 2), (2, 4), (4, 5)]
    assert rows_of(blocks) == np.arange(20).reshape(5, 4).tolist()


# A folder of photographs


def photograph(rng, label: int, height: int, width: int) -> Image.Image:
    """Ten kinds: stripes of a direction and a colour, under shadows and noise."""
    rows, columns = np.mgrid[0:height, 0:width] / min(height, width)
    angle = np.pi * label / 10
    wave = np.sin(
        (rows * np.sin(angle) + columns * np.cos(angle)) * rng.uniform(20, 40)
    )
    tint = np.array([np.cos(label), np.sin(label), np.cos(2 * label)])
    picture = 128 + 60 * wave[..., None] * tint + 30 * rng.normal(size=3)
    picture = picture * (0.6 + 0.4 * rows[..., None])
    picture += rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Ten classes of six JPEG files of 224 to 1,000 pixels, in one folder."""
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for label in range(10):
        folder = root / f"kind{label}"
        folder.mkdir()
        for number in range(6):
            height, width = rng.integers(224, 1001, size=2)
            picture = photograph(rng, label, height, width)
            picture.save(folder / f"{number}.jpg", quality=90)
    return root


def photographs_config(root, **changes):
    """ResNet-18 in every respect but its width and the size of its images."""
    config = image_folder.get_config("imagenet")
    config.dataset.path = str(root)
    config.update_from_flattened_dict(
        {
            "steps": 6,
            "batch_size": 16,
            "model.width": 8,
            "dataset.image_size": 64,
            "steps_per_call": 3,
            **changes,
        }
    )
    validate(config)
    return config


def train_losses(directory) -> list[float]:
    return [row["train_loss"] for row in read_rows(directory) if "train_loss" in row]


@pytest.mark.slow
def test_resnet_18_trains_on_large_photographs_on_both_paths(
    photographs, tmp_path, capsys, quick_compilation
):
    config = photographs_config(
        photographs,
        **{"steps": 40, "schedule.name": "constant", "optimizer.learning_rate": 0.02},
    )
    result = train.train_and_evaluate(config, tmp_path / "memory")
    assert result["test_examples"] == 10
    losses = train_losses(tmp_path / "memory")
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    config.steps = 6
    train.train_and_evaluate(streamed(config), tmp_path / "stream")
    streamed_losses = train_losses(tmp_path / "stream")
    assert streamed_losses[:2] == pytest.approx(losses[:2], rel=1e-4)
    capsys.readouterr()
    argv = ["evaluate", f"--workdir={tmp_path}/stream"]
    assert command_line.call(evaluate.main, argv) == 0
    assert "kind7" in capsys.readouterr().out


@pytest.mark.slow
def test_picture_that_goes_away_ends_training_in_a_sentence(photographs, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(photographs, root)
    config = streamed(photographs_config(root, **{"dataset.image_size": 32}))
    found = data.load(config.dataset)
    plan = Plan(len(found.train.labels), 16, total_steps=10, steps_per_call=2)
    parallel = Parallel.over(jax.devices()[:1], "jit", 16)
    feed = train_feed(found.train, plan, 0, parallel)
    _, _, images, _ = next(feed.blocks(0, 2, end=2))
    assert images.shape == (16, 2, 32, 32, 3)
    for path in root.glob("*/*.jpg"):
        path.unlink()
    with pytest.raises(UserError, match=r"No such file.*restore the file") as raised:
        for _ in feed.blocks(2, 10, end=10):
            pass
    assert "\n" not in str(raised.value)
    feed.close()


def test_auto_streams_what_is_too_large(photographs, monkeypatch):
    config = photographs_config(photographs)
    assert isinstance(data.load(config.dataset).train.images, np.ndarray)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 60 * 64 * 64 * 3 - 1)
    assert isinstance(data.load(config.dataset).train.images, StreamedImages)
    config.dataset.stream = "never"
    assert isinstance(data.load(config.dataset).train.images, np.ndarray)
