import io
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax import attribution, command_line, data, explain, train, trained
from resnet_jax.augment import normalize
from tests.test_train import digits_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_trainings):
    """A run that has learned, and three test images as files beside it."""
    config = digits_config(steps=0, epochs=4, **{"model.width": 8})
    root = tmp_path_factory.mktemp("explain")
    train.train_and_evaluate(config, root / "run")
    dataset = data.load(config.dataset)
    for number, image in enumerate(dataset.eval.images[:3]):
        Image.fromarray(image[..., 0]).save(root / f"{number}.png")
    return root


def call(run, *arguments) -> int:
    argv = ["explain", f"--workdir={run / 'run'}", *map(str, arguments)]
    return command_line.call(explain.main, argv)


@pytest.mark.slow
def test_overlays_sheet_and_check(run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    pictures = [run / "0.png", run / "1.png", tmp_path / f"2_$5_$6{'_' * 240}.png"]
    shutil.copy(run / "2.png", pictures[-1])  # no mathematics
    assert call(run, *pictures, f"--out={out}") == 0
    told = capsys.readouterr().out
    assert "sanity check" in told
    assert "remains with all weights random: near 0, the maps depend" in told
    kinds = ("grad_cam", "integrated_gradients")
    stems = [picture.stem[:50] for picture in pictures]
    expected = {
        f"00{n + 1}_{stem}_{kind}.png" for n, stem in enumerate(stems) for kind in kinds
    }
    expected |= {"contact_sheet.png", "explanations.json"}
    assert {path.name for path in out.iterdir()} == expected
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) >= 224
        assert np.ptp(pixels) > 50
    content = json.loads((out / "explanations.json").read_text())
    assert [entry["file"] for entry in content["pictures"]] == list(map(str, pictures))
    assert all(entry["completeness_error"] < 0.1 for entry in content["pictures"])
    last = content["sanity_check"][-1]
    assert last["randomized"] == "all weights"
    assert abs(last["integrated_gradients"]) < 0.5


@pytest.mark.slow
def test_explains_a_named_class_at_a_named_layer(run, tmp_path, capsys):
    arguments = ["--class=3", "--layer=stage1", f"--out={tmp_path}", run / "0.png"]
    assert call(run, *arguments) == 0
    assert "explained: 3" in capsys.readouterr().out
    content = json.loads((tmp_path / "explanations.json").read_text())
    assert content["layer"] == "stage1"
    assert content["pictures"][0]["explained"] == "3"
    restored = trained.load(run / "run")
    image = np.asarray(Image.open(run / "0.png"))[None, ..., None]
    network = restored.net, restored.variables
    given = normalize(jnp.asarray(image), *restored.inputs.normalization)

    def differences(label: int, layer: str) -> list[float]:
        """How far the pictures are from those of a class and a layer, on average."""
        labels = jnp.array([label])
        heat = attribution.grad_cam(*network, given, labels, layer)
        gradients, _ = attribution.integrated_gradients(*network, given, labels)
        found = []
        for kind, values in (
            ("grad_cam", heat),
            ("integrated_gradients", gradients.sum(-1)),
        ):
            signed = kind == "integrated_gradients"
            expected = explain.overlay(image[0], np.asarray(values[0]), signed)
            written = Image.open(tmp_path / f"001_0_{kind}.png")
            apart = np.asarray(written, float) - np.asarray(expected, float)
            found.append(np.abs(apart).mean())
        return found

    assert max(differences(3, "stage1")) < 0.5
    assert min(differences(0, "stage1")) > 5
    assert differences(3, "features")[0] > 5


@pytest.mark.slow
def test_any_number_of_images_and_the_check(run):
    restored = trained.load(run / "run")
    dataset = data.load(restored.config.dataset)
    explainer = explain.Explainer(restored)
    images, labels = dataset.eval.images[:11], dataset.eval.labels[:11]
    found = explainer(images, labels)
    assert found.grad_cam.shape == found.integrated_gradients.shape == (11, 8, 8)
    alone = explainer(images[9:10], labels[9:10])
    np.testing.assert_allclose(alone.grad_cam[0], found.grad_cam[9], atol=1e-4)
    # Weights that stay as they are fail the check: it can fail.
    same = explainer(images, labels, restored.variables)
    correlation = explain.attribution.rank_correlation
    assert correlation(found.grad_cam, same.grad_cam) > 0.99
    rows = explainer.check(images, labels, found)
    assert abs(rows[-1]["integrated_gradients"]) < 0.5


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_of_channels_that_are_no_colours_the_first_is_shown(channels):
    image = np.full((8, 8, channels), 9, np.uint8)
    image[..., 0] = 70
    shown = explain.enlarge(image)
    assert shown.mode == "RGB"
    assert (np.asarray(shown) == 70).all()


def test_overlay_is_coloured_where_the_map_is():
    image = np.full((8, 8, 1), 100, np.uint8)
    values = np.zeros((8, 8))
    values[0, 0], values[7, 7] = 1, -1
    picture = np.asarray(explain.overlay(image, values, signed=True)).astype(int)
    assert picture.shape == (224, 224, 3)
    red, blue, rest = picture[5, 5], picture[-5, -5], picture[100, 100]
    assert red[0] > red[2] + 100
    assert blue[2] > blue[0] + 100
    np.testing.assert_array_equal(rest, [100, 100, 100])


@pytest.mark.parametrize("count", [1, 2])
def test_a_long_caption_leaves_the_columns_as_they_are(count):
    pictures = [Image.new("RGB", (8, 8))] * 3

    def places(caption: str) -> np.ndarray:
        figure = explain.contact_sheet([(caption, pictures)] * count)
        figure.draw_without_rendering()
        return np.array([cell.get_window_extent().bounds for cell in figure.axes])

    np.testing.assert_allclose(places("x" * 80), places("x"))


def test_names_that_are_no_text_are_drawn():
    caption = explain._shortened("holiday/caf\udce9.png")
    figure = explain.contact_sheet([(caption, [Image.new("RGB", (8, 8))] * 3)])
    figure.savefig(io.BytesIO())


@pytest.mark.slow
def test_mistakes_are_sentences(run, tmp_path, capsys):
    def error(status, *arguments) -> str:
        assert call(run, *arguments) == status
        return capsys.readouterr().err

    picture = run / "0.png"
    assert "--class=zwei is not a class" in error(2, picture, "--class=zwei")
    assert "no picture was given" in error(2)
    assert "layer" in error(2, picture, "--layer=stage9")
    (tmp_path / "file").write_text("mine")
    assert "is a file: give a directory" in error(
        2, picture, f"--out={tmp_path / 'file'}"
    )
    (tmp_path / "broken.png").write_text("mine")
    out = f"--out={tmp_path / 'out'}"
    assert "no picture could be read" in error(2, tmp_path / "broken.png", out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out" / "001_0_grad_cam.png").mkdir(parents=True)
    assert "cannot be written" in error(1, picture, out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_stage_that_the_network_has_not_is_refused(run, tmp_path, capsys):
    assert call(run, run / "0.png", "--layer=stage4") == 2
    assert "--layer=stage4 is not in this network" in capsys.readouterr().err
