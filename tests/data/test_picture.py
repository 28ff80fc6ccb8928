import io

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.picture import PictureError, decode

NOISE = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
GREY = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)


def encoded(picture, form="PNG", **options) -> bytes:
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_picture_of_the_right_size_is_left_as_it_is(form, tmp_path):
    options = {"lossless": True} if form == "WEBP" else {}
    content = encoded(NOISE, form, **options)
    (tmp_path / "picture").write_bytes(content)
    np.testing.assert_array_equal(decode(content, (32, 32), 3), NOISE)
    np.testing.assert_array_equal(decode(tmp_path / "picture", (32, 32), 3), NOISE)


@pytest.mark.parametrize("form", ["JPEG", "GIF"])
def test_formats_with_loss_come_close(form):
    smooth = np.dstack([np.kron(GREY, np.ones((4, 4)))] * 3).astype(np.uint8)
    found = decode(encoded(smooth, form), (32, 32), 3)
    assert np.abs(found.astype(int) - smooth).mean() < 5


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5000), (5000, 1), (31, 33), (3, 7), (2000, 3000)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size(shape, channels):
    content = encoded(np.full(shape, 77, np.uint8))
    found = decode(content, (24, 40), channels)
    assert found.shape == (24, 40, channels)
    assert (found == 77).all()


def test_crops_the_centre_of_the_longer_side():
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200  # the middle third
    assert (decode(encoded(wide), (10, 10), 1) == 200).all()
    assert (decode(encoded(wide.T.copy()), (10, 10), 1) == 200).all()


def test_makes_smaller_by_the_mean_of_what_a_pixel_covers():
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    found = decode(encoded(checks.astype(np.uint8)), (8, 8), 1)
    assert np.abs(found.astype(int) - 127).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_turns_as_exif_says(orientation, form):
    upright = np.zeros((32, 32), np.uint8)
    upright[:16, :16], upright[:16, 16:] = 80, 160  # three shades: one way up
    upright[16:, :16] = 240
    undo = {  # EXIF 2.3, tag 274: how the stored picture comes from the upright one
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.T,
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].T,
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(undo(upright))
    found = decode(encoded(stored, form, exif=exif), (32, 32), 1)[..., 0]
    assert np.abs(found.astype(int) - upright).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode(mode, channels):
    content = encoded(Image.new("RGB", (9, 9), "white").convert(mode))
    assert (decode(content, (4, 4), channels) == 255).all()


def test_cmyk():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    found = decode(encoded(red, "JPEG"), (4, 4), 3).astype(int)
    assert np.abs(found - [255, 0, 0]).max() < 30


def test_transparent_parts_are_white():
    picture = np.zeros((4, 4, 4), np.uint8)
    picture[:2, :, 3] = 255
    found = decode(encoded(picture), (4, 4), 1)[..., 0]
    assert (found[:2] == 0).all()
    assert (found[2:] == 255).all()


def test_sixteen_bits_keep_their_shades():
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = decode(encoded(shades), (8, 8), 1)[..., 0]
    assert np.abs(found - shades / 257).max() <= 0.5


PNG, JPEG = encoded(NOISE), encoded(NOISE, "JPEG")


@pytest.mark.parametrize(
    "content",
    [b"", b"GIF", b"\0" * 999, PNG[:99], PNG[:500], PNG[:-30], JPEG[:200], JPEG[:-200]],
)
def test_damaged_pictures(content):
    with pytest.raises(PictureError, match=r"is damaged|is no picture"):
        decode(content, (8, 8), 3)


def test_refuses_bombs_and_what_is_not_there(tmp_path):
    for side in (8_000, 14_000):
        bomb = encoded(Image.new("1", (side, side)))
        with pytest.raises(PictureError, match="more than 50 million pixels"):
            decode(bomb, (8, 8), 1)
    with pytest.raises(PictureError, match="No such file"):
        decode(tmp_path / "none.png", (8, 8), 1)
    with pytest.raises(PictureError, match="pixels of 'F'"):
        decode(encoded(Image.new("F", (8, 8)), "TIFF"), (8, 8), 1)
