import csv
import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from resnet_jax import UserError, command_line, data, predict, train, trained
from resnet_jax.augment import normalize, statistics
from tests.test_train import digits_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_trainings):
    """A run's directory, and the test images as files `<number>.png` beside it."""
    config = digits_config(steps=60)
    root = tmp_path_factory.mktemp("predict")
    train.train_and_evaluate(config, root / "run")
    dataset = data.load(config.dataset)
    (root / "pictures" / "more").mkdir(parents=True)
    for number, image in enumerate(dataset.eval.images[:40]):
        folder = root / "pictures" / ("more" if number % 2 else "")
        Image.fromarray(image[..., 0]).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def expected(run):
    """The probabilities of the test images, computed at once."""
    restored = trained.load(run / "run")
    dataset = data.load(restored.config.dataset)
    normalization = statistics("mean_std", dataset.train.images)
    images = normalize(jnp.asarray(dataset.eval.images[:40]), *normalization)
    logits = np.float64(restored.net.apply(restored.variables, images))
    exponents = np.exp(logits)
    return exponents / exponents.sum(1, keepdims=True)


def call(run, *arguments) -> int:
    argv = ["predict", f"--workdir={run / 'run'}", *map(str, arguments)]
    return command_line.call(predict.main, argv)


def test_json_of_a_folder(run, expected, capsys):
    hidden = run / "pictures" / "._00.png"  # as Macs leave
    hidden.write_bytes(b"no picture")
    assert call(run, run / "pictures", "--format=json", "--top=10") == 0
    hidden.unlink()
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 40
    for row in found:
        number = int(row["file"][-6:-4])
        probabilities = {e["class"]: e["probability"] for e in row["classes"]}
        assert list(probabilities.values()) == sorted(probabilities.values())[::-1]
        found_probabilities = [probabilities[str(label)] for label in range(10)]
        np.testing.assert_allclose(found_probabilities, expected[number], atol=1e-5)


def test_csv_and_table(run, expected, capsys):
    files = [run / "pictures" / f"{number:02}.png" for number in (0, 2, 4)]
    assert call(run, *files, "--format=csv", "--top=2") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [row["class_1"] for row in rows] == [
        str(expected[number].argmax()) for number in (0, 2, 4)
    ]
    assert call(run, *files, "--top=99") == 0  # more than there are: all
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert f"{expected[0].max():.1%}" in lines[0]


@pytest.mark.parametrize("batch_size", [16, 128])
def test_any_number_of_pictures_by_one_program(run, expected, monkeypatch, batch_size):
    monkeypatch.setattr(predict, "_BATCH_SIZE", batch_size)
    restored = trained.load(run / "run")
    predictor = predict.Predictor(restored, 40)
    dataset = data.load(restored.config.dataset)
    for count in (1, 16, 17, 40):
        logits = predictor(dataset.eval.images[:count])
        found = softmax(np.float64(logits), axis=1)
        np.testing.assert_allclose(found, expected[:count], atol=1e-5)


def test_reads_a_picture_from_standard_input(run, expected, capsys, monkeypatch):
    content = (run / "pictures" / "06.png").read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert call(run, "-", "--format=json", "--top=1") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["file"] == "-"
    assert row["classes"][0]["class"] == str(expected[6].argmax())


def test_other_files_of_a_folder_are_told(run, tmp_path, capsys):
    shutil.copy(run / "pictures" / "00.png", tmp_path)
    (tmp_path / "scan.tiff").touch()
    assert predict.find_pictures([str(tmp_path)]) == [str(tmp_path / "00.png")]
    told = f"ignored   1 other files in {tmp_path}, such as {tmp_path}/scan.tiff\n"
    assert capsys.readouterr().err == told


def test_networks_of_other_channels_read_no_pictures():
    with pytest.raises(UserError, match="images of 5 channels, which no picture has"):
        next(predict.read_pictures(["a.png"], (8, 8, 5)))


def test_unreadable_pictures_are_told_and_skipped(run, tmp_path, capsys):
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.png").write_bytes((run / "pictures" / "00.png").read_bytes())
    (tmp_path / "c.txt").write_text("not looked at")
    assert call(run, tmp_path, "--format=json") == 1
    told = capsys.readouterr()
    assert [row["file"] for row in json.loads(told.out)] == [str(tmp_path / "b.png")]
    assert f"skipped   {tmp_path / 'a.png'}: not a picture in" in told.err
    assert "1 of 2 pictures could not be read" in told.err
    assert call(run, tmp_path / "a.png") == 2
    assert "no picture could be read" in capsys.readouterr().err


def test_height_and_width_are_the_networks(tmp_path):
    pixels = np.arange(8 * 24, dtype=np.uint8).reshape(8, 24, 1)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "wide.png")
    Image.new("L", (24, 24)).save(tmp_path / "square.png")
    files = [str(tmp_path / name) for name in ("wide.png", "square.png")]
    (_, wide), (_, square) = predict.read_pictures(files, (8, 24, 1))
    np.testing.assert_array_equal(wide, pixels)
    assert square.shape == (8, 24, 1)


def test_more_pictures_than_are_decoded_ahead(run, capsys, monkeypatch):
    monkeypatch.setattr(predict, "_AHEAD", 3)
    monkeypatch.setattr(predict, "_BATCH_SIZE", 8)
    assert call(run, run / "pictures", "--format=csv") == 0
    files = [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]]
    assert files == predict.find_pictures([str(run / "pictures")])


def test_mistakes_are_sentences(run, tmp_path, capsys):
    def error(*arguments) -> str:
        assert command_line.call(predict.main, ["predict", *map(str, arguments)]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        return told.err

    workdir, picture = f"--workdir={run / 'run'}", run / "pictures" / "00.png"
    assert "no picture was given" in error(workdir)
    assert "does not exist" in error(workdir, tmp_path / "none.png")
    assert "'' is not a picture" in error(workdir, "")
    assert "contains no pictures" in error(workdir, tmp_path)
    assert "--workdir is missing" in error(picture)
    assert "holds no run" in error(f"--workdir={tmp_path}", picture)
    assert "no validation split" in error(workdir, picture, "--checkpoint=best")
    assert "top" in error(workdir, picture, "--top=0")
    assert "format" in error(workdir, picture, "--format=xml")
