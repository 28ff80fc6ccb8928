import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_jax import UserError, data
from resnet_jax.augment import statistics
from resnet_jax.data import dataset, examples
from resnet_jax.data import tfds as sets
from resnet_jax.data.picture import decode, fit
from resnet_jax.preemption import Preemption, StoppedError
from tests.data.conftest import CIFAR10_NAMES

VERSION = Path("cifar10") / "3.0.2"


@pytest.fixture
def prepared(config, tiny, tmp_path):
    """The directory of a prepared CIFAR-10 with 40 and 10 examples."""
    tiny("cifar10").write(tmp_path)
    data.load(config("cifar10"))
    return tmp_path / VERSION


def overwrite_middle(path):
    content = bytearray(path.read_bytes())
    content[40_000:40_100] = bytes(100)
    path.write_bytes(content)


def train_file(directory):
    return directory / "cifar10-train.array_record-00000-of-00001"


def test_the_second_time_comes_from_the_cache(config, prepared, monkeypatch):
    first, read = data.load(config("cifar10")), []
    once = dataset.read

    def counted(source, selections, size, **settings):
        read.append(size)
        return once(source, selections, size, **settings)

    monkeypatch.setattr(dataset, "read", counted)
    second = data.load(config("cifar10"))
    assert read == []
    assert second.class_names == first.class_names
    for split in ("train", "eval"):
        for arrays in zip(getattr(first, split), getattr(second, split), strict=True):
            np.testing.assert_array_equal(*arrays)
    data.load(config("cifar10", image_size=16))  # other pixels
    assert read == [16]
    os.utime(train_file(prepared), (1, 1))
    data.load(config("cifar10"))
    assert read == [16, 0]


def test_what_is_in_the_cache_needs_no_tfds(config, prepared):
    data.load(config("cifar10"))
    program = (
        "import sys; from ml_collections import ConfigDict; from resnet_jax import data"
        f"; data.load(ConfigDict({config('cifar10').to_dict()}))"
        "; assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (
            lambda d: train_file(d).write_bytes(train_file(d).read_bytes()[:50_000]),
            "cifar10-train.array_record-00000-of-00001 holds 0 examples, not 40",
        ),
        (lambda d: train_file(d).unlink(), "holds 0 examples, not 40"),
        (lambda d: overwrite_middle(train_file(d)), "Corrupted"),
        (
            lambda d: shutil.copy(
                d / "cifar10-test.array_record-00000-of-00001", train_file(d)
            ),
            "holds 10 examples, not 40",
        ),
        (lambda d: (d / "features.json").unlink(), "there is no features.json"),
        (lambda d: (d / "dataset_info.json").unlink(), "no dataset_info.json"),
        (lambda d: (d / "dataset_info.json").write_text("{"), "dataset_info.json: Exp"),
        (lambda d: (d / "dataset_info.json").write_text("[]"), "it is not an object"),
        (lambda d: (d / "features.json").write_text("{"), "TFDS cannot read it"),
    ],
)
def test_damaged(config, prepared, damage, what):
    damage(prepared)
    with pytest.raises(UserError) as error:
        data.load(config("cifar10"))
    assert str(error.value).startswith(f"{prepared} is damaged or half-written (")
    assert what in str(error.value)
    assert str(error.value).endswith("delete it and run again")


def test_files_of_any_mode_become_what_the_set_says():
    """TFDS itself gives the indices of a palette, and the channels of the file."""
    colours = np.array([[[200, 0, 0], [0, 90, 0]]], np.uint8)
    image = Image.fromarray(colours)
    for stored in (image, image.quantize(2), image.convert("RGBA")):
        file = io.BytesIO()
        stored.save(file, "PNG")
        for channels in (3, 4, 0):  # 0: the set does not say
            read = examples.decoded(file.getvalue(), 0, channels, "train[0]")
            np.testing.assert_array_equal(read, colours)
        assert examples.decoded(file.getvalue(), 0, 1, "train[0]").shape == (1, 2, 1)
    assert str(examples.decoded(b"no", 0, 3, "train[7]")).startswith("train[7]: ")


def test_jpeg_pictures_are_decoded_small_as_predictions_do():
    noise = np.random.default_rng(0).integers(0, 256, (400, 320, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG")
    read = examples.decoded(file.getvalue(), 64, 3, "train[0]")
    np.testing.assert_array_equal(read, decode(file, (64, 64)))


def test_a_signal_is_no_damage(config, prepared, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("tensorflow_datasets.builder_from_directory", interrupted)
    with pytest.raises(StoppedError, match="while starting"), Preemption():
        data.load(config("cifar10", image_size=16))  # not in the cache


def test_other_format(config, prepared):
    path = prepared / "dataset_info.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(
        UserError, match=r"is in tfrecord format, .*tfds build cifar10 --"
    ):
        data.check(config("cifar10"))
    del info["fileFormat"]
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="is in tfrecord format"):
        data.load(config("cifar10"))


def test_the_newest_version_or_the_one_asked_for(config, prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "cifar10" / "3.0.10")
    newest = sets.locate("cifar10", str(tmp_path))
    assert newest == tmp_path / "cifar10" / "3.0.10"
    assert sets.locate("cifar10:3.0.2", str(tmp_path)) == prepared
    assert len(data.load(config("cifar10:3.0.2")).eval.labels) == 10


def test_a_missing_split(config, prepared):
    with pytest.raises(UserError, match=r"no split 'valid': choose one of train, test"):
        data.load(config("cifar10", train_split="valid"))


def test_parts_across_chunks_are_in_order(config, prepared, monkeypatch):
    whole = data.load(config("cifar10")).train
    monkeypatch.setattr(examples, "CHUNK", 7)
    part = data.load(config("cifar10", train_split="train[3:25]")).train
    np.testing.assert_array_equal(part.images, whole.images[3:25])
    np.testing.assert_array_equal(part.labels, whole.labels[3:25])


@pytest.fixture
def several_processes(monkeypatch):
    """Reads in pieces of two images, in two processes."""
    monkeypatch.setattr(examples, "WORTHWHILE", 0.0)
    monkeypatch.setattr(examples, "_PROBE", 5)
    monkeypatch.setattr(examples, "_PIECE", 2 * 32 * 32 * 3)
    monkeypatch.setattr(examples, "_cores", lambda: 2)


def test_several_processes_read_in_order(
    config, prepared, several_processes, monkeypatch
):
    whole = data.load(config("cifar10")).train
    source = sets.source("cifar10", str(prepared.parent.parent), "", 16)
    indices = [*range(30, 40), *range(9)]
    once = examples.Examples._read

    def forbidden(self, split, indices):
        assert len(indices) <= 5, "read in this process"
        return once(self, split, indices)

    monkeypatch.setattr(examples.Examples, "_read", forbidden)
    images, labels = zip(*source.examples("train", indices), strict=True)
    for image, index in zip(images, indices, strict=True):
        np.testing.assert_array_equal(image, fit(whole.images[index], 16))
    np.testing.assert_array_equal(labels, whole.labels[indices])


@pytest.mark.parametrize("written", [b"", pickle.dumps([0] * 1000)[:500]])
def test_a_process_that_ends_loses_no_example(
    config, prepared, several_processes, monkeypatch, written
):
    whole = data.load(config("cifar10")).train
    source = sets.source("cifar10", str(prepared.parent.parent), "", 0)
    started, start = [], examples._process

    @contextlib.contextmanager
    def second_ends(*task):
        with start(*task) as process:
            if started:
                process.kill()
                process.stdout.close()
                process.stdout = io.BytesIO(written)
            started.append(process)
            yield process

    monkeypatch.setattr(examples, "_process", second_ends)
    _, labels = zip(*source.examples("train", range(40)), strict=True)
    np.testing.assert_array_equal(labels, whole.labels)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_without_other_processes(config, prepared, several_processes, monkeypatch):
    whole = data.load(config("cifar10")).train
    source = sets.source("cifar10", str(prepared.parent.parent), "", 0)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    _, labels = zip(*source.examples("train", range(40)), strict=True)
    np.testing.assert_array_equal(labels, whole.labels)


def test_damage_that_another_process_finds(config, prepared, several_processes):
    overwrite_middle(train_file(prepared))
    with pytest.raises(UserError, match=r"damaged or half-written \(.*Corrupted"):
        data.load(config("cifar10"))


def write_set(root, name, features, examples, config=None):
    """Writes a TFDS set with the given features, as other programs would."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []
        pkg_dir_path = Path()
        _log_download_bytes = _log_download_done = lambda self: None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: enumerate(examples) for split in ("train", "test")}

        def _generate_examples(self):
            raise NotImplementedError

    Builder.name = name
    tfds.disable_progress_bar()
    Builder(data_dir=root, file_format="array_record").download_and_prepare()


def picture(*shape):
    return Image.fromarray(np.full(shape, 7, np.uint8))


def test_a_set_of_ones_own(config, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 1)),
        "label": tfds.features.ClassLabel(names=["cat", "dog"]),
    }
    examples = [
        {"image": picture(9, 6), "label": "dog"},
        {"image": picture(5, 5), "label": "cat"},
    ]
    write_set(tmp_path, "pets", features, examples)
    with pytest.raises(UserError, match=r"pets differ in size .*dataset.image_size"):
        data.load(config("pets"))
    pets = data.load(config("pets", image_size=4))
    assert pets.class_names == ("cat", "dog")
    assert pets.train.images.shape == (2, 4, 4, 1)
    assert (pets.train.images == 7).all()
    assert sorted(pets.train.labels) == [0, 1]


def test_configs(config, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    examples = [{"image": picture(5, 5, 3), "label": 2}]
    write_set(tmp_path, "kinds", features, examples, config="small")
    with pytest.raises(UserError, match=r"has several variants: .* kinds/small"):
        data.check(config("kinds"))
    kinds = data.load(config("kinds/small"))
    assert kinds.class_names == ("0", "1", "2")
    assert kinds.train.labels.tolist() == [2]


def test_streamed_set_has_the_images_of_the_one_in_memory(config, tmp_path):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    pixels = np.random.default_rng(0).integers(0, 256, (9, 5, 5, 3)).astype(np.uint8)
    examples = [
        {"image": Image.fromarray(x), "label": i % 3} for i, x in enumerate(pixels)
    ]
    write_set(tmp_path, "noise", features, examples)
    for size in (0, 4):
        memory = data.load(config("noise", image_size=size, stream="never"))
        stream = data.load(config("noise", image_size=size, stream="always"))
        for one, other in ((memory.train, stream.train), (memory.eval, stream.eval)):
            assert other.images.shape == one.images.shape
            np.testing.assert_array_equal(other.labels, one.labels)
            for row, image in enumerate(one.images):
                np.testing.assert_array_equal(other.images[row], image)
        for normalization in ("mean", "mean_std", "pixel_mean"):
            for one, other in zip(
                statistics(normalization, memory.train.images),
                statistics(normalization, stream.train.images),
                strict=True,
            ):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("missing", ["image", "label"])
def test_not_for_image_classification(config, tmp_path, missing):
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(5, 5, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
    }
    features["number"] = features.pop(missing)
    example = {"image": picture(5, 5, 3), "label": 2}
    example["number"] = example.pop(missing)
    write_set(tmp_path, "other", features, [example])
    with pytest.raises(
        UserError, match=r"no 8-bit 'image' .*\(it has .*number.*\): choose"
    ):
        data.load(config("other"))


REAL = Path(os.environ.get("TFDS_DATA_DIR") or "nowhere")


@pytest.mark.skipif(
    not (REAL / VERSION).is_dir(), reason="no prepared CIFAR-10 in TFDS_DATA_DIR"
)
def test_real_cifar10(config):
    cifar = data.load(config("cifar10", data_dir=str(REAL), train_split="train[:100]"))
    assert cifar.class_names == CIFAR10_NAMES
    assert cifar.image_shape == (32, 32, 3)
    assert np.bincount(cifar.eval.labels).tolist() == [1000] * 10
