"""Pictures of every kind against pixels that are known without our code."""

import io
import os
import signal
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data import picture
from resnet_jax.preemption import Preemption, StoppedError

RNG = np.random.default_rng(0)


def smooth(height, width, channels=3) -> np.ndarray:
    """uint8 [height, width, channels] that no coder changes much."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    ramps = [40 + 160 * rows, 220 - 180 * columns, 60 + 80 * rows + 80 * columns, rows]
    return np.stack(ramps[:channels], -1).round().astype(np.uint8)


def encoded(image: Image.Image, kind: str, **settings) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("kind", "settings", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 8),
        ("JPEG", {"quality": 95}, 6),
        ("JPEG", {"quality": 95, "progressive": True}, 6),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
    ],
)
def test_formats_give_their_pixels(kind, settings, tolerance):
    pixels = smooth(23, 31)
    read = picture.decode(encoded(Image.fromarray(pixels), kind, **settings))
    assert read.shape == (23, 31, 3)
    assert read.dtype == np.uint8
    assert abs(read.astype(int) - pixels).max() <= tolerance


def test_grey_has_three_equal_channels():
    grey = smooth(9, 7, 1)[..., 0]
    for kind in ("PNG", "BMP"):
        read = picture.decode(encoded(Image.fromarray(grey), kind))
        np.testing.assert_array_equal(read, np.stack([grey] * 3, -1))
    bits = (grey > 100).astype(np.uint8) * 255
    read = picture.decode(encoded(Image.fromarray(bits).convert("1"), "PNG"))
    np.testing.assert_array_equal(read[..., 0], bits)


def test_sixteen_bits_of_grey_keep_the_upper_eight():
    grey = RNG.integers(0, 2**16, (6, 5)).astype(np.uint16)
    read = picture.decode(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(read[..., 1], grey >> 8)


def test_sixteen_bits_of_grey_that_are_clear_are_white():
    grey = np.array([[0, 300, 300, 60_000]], np.uint16)
    file = encoded(Image.fromarray(grey), "PNG", transparency=300)
    assert picture.decode(file)[..., 0].tolist() == [[0, 255, 255, 60_000 >> 8]]


def test_what_is_clear_is_white():
    colour = smooth(8, 8)
    alpha = np.full((8, 8, 1), 255, np.uint8)
    alpha[:4], alpha[4] = 0, 128
    image = Image.fromarray(np.concatenate([colour, alpha], -1))
    share = alpha / 255
    expected = colour * share + 255 * (1 - share)
    for kind, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        read = picture.decode(encoded(image, kind, **settings))
        assert abs(read - expected).max() <= 1
        assert (read[:4] == 255).all()


def test_a_clear_colour_is_white():
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = 255, 0, 255
    image = Image.fromarray(pixels)
    read = picture.decode(encoded(image, "PNG", transparency=(255, 0, 255)))
    np.testing.assert_array_equal(read[0, 0], [255, 255, 255])
    assert (read[1] == 0).all()


@pytest.mark.parametrize("size", [28, 224, 299])
def test_pictures_of_any_side_are_resized(size):
    """Rounding must not move the middle out of the picture, which Pillow refuses."""
    for side in (*range(1, 300, 7), 225, 300):
        for shape in ((side, side), (side, side + 1), (side + side // 3, side)):
            image = Image.new("L", shape, 7)
            read = picture.decode(encoded(image, "BMP"), size, channels=1)
            assert read.shape == (size, size, 1)
            assert (read == 7).all()


def test_palettes_and_their_clear_colour():
    indices = np.array([[0, 1], [2, 1]], np.uint8)
    image = Image.fromarray(indices).convert("L")
    image = Image.frombytes("P", (2, 2), indices.tobytes())
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 90, 0])
    colours = np.array([[10, 20, 30], [200, 0, 0], [0, 90, 0]])
    for kind in ("PNG", "GIF", "BMP"):
        read = picture.decode(encoded(image, kind))
        np.testing.assert_array_equal(read, colours[indices])
    for kind in ("PNG", "GIF"):
        read = picture.decode(encoded(image, kind, transparency=1))
        expected = np.where(indices[..., None] == 1, 255, colours[indices])
        np.testing.assert_array_equal(read, expected)


def test_cmyk_is_converted():
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[..., 0], ink[..., 3] = 255, 51  # cyan, a fifth of black
    file = encoded(Image.fromarray(ink, mode="CMYK"), "JPEG", quality=100)
    red, green, blue = picture.decode(file)[8, 8]
    assert red <= 2
    assert abs(int(green) - 204) <= 2
    assert abs(int(blue) - 204) <= 2


# As cameras hold them: what must be done to see the picture upright.
TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: np.rot90(x, 2),
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_turned_as_exif_says(kind, orientation):
    pixels = smooth(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    read = picture.decode(encoded(Image.fromarray(pixels), kind, exif=exif, **quality))
    expected = TURNS[orientation](pixels)
    assert read.shape == expected.shape
    assert abs(read.astype(int) - expected).max() <= 10


@pytest.mark.parametrize("tail", [b"MM\0*\0\0", b"II*\0\xff\xff\xff\xff"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, which commands do not show
def test_damaged_exif_does_not_spoil_a_picture(tail):
    image = Image.fromarray(smooth(16, 24))
    read = picture.decode(encoded(image, "JPEG", exif=b"Exif\0\0" + tail))
    assert read.shape == (16, 24, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    settings = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **settings)
    assert (picture.decode(file) == (255, 0, 0)).all()


@pytest.mark.parametrize(("height", "width"), [(40, 60), (64, 64), (90, 50), (32, 32)])
@pytest.mark.parametrize("size", [16, 32])
def test_middle_square_is_resized(height, width, size):
    pixels = smooth(height, width)
    read = picture.decode(encoded(Image.fromarray(pixels), "PNG"), size)
    assert read.shape == (size, size, 3)
    # The ramps are linear: a new pixel has the colour at its centre.
    side = min(height, width)
    places = (np.arange(size) + 0.5) * side / size - 0.5
    rows = ((height - side) / 2 + places) / (height - 1)
    columns = ((width - side) / 2 + places) / (width - 1)
    red, green = 40 + 160 * rows[:, None], 220 - 180 * columns[None]
    inner = slice(1, -1)  # at the border there are fewer pixels to average
    assert abs(read[..., 0] - red)[inner].max() <= 1.5
    assert abs(read[..., 1] - green)[:, inner].max() <= 1.5


def test_large_jpegs_are_decoded_smaller_to_nearly_the_same_pixels():
    pixels = smooth(1000, 1400)
    file = encoded(Image.fromarray(pixels), "JPEG", quality=95)
    exact = picture.decode(encoded(Image.fromarray(pixels), "PNG"), 100)
    assert abs(picture.decode(file, 100).astype(int) - exact).max() <= 4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (300, 1), (2, 2)])
def test_tiny_and_narrow_pictures_are_enlarged(height, width):
    image = Image.new("RGB", (width, height), (1, 2, 3))
    read = picture.decode(encoded(image, "PNG"), 32)
    assert (read == (1, 2, 3)).all()
    assert read.shape == (32, 32, 3)


def png_of_size(width, height) -> bytes:
    """A PNG that says its size and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, b"IDAT")
    )


def test_fifty_megapixels_are_read_and_more_are_refused():
    image = Image.new("L", (10_000, 5_000), 7)
    assert (picture.decode(encoded(image, "PNG"), 8) == 7).all()
    image = Image.new("1", (10_001, 5_000))
    for file in (encoded(image, "PNG"), io.BytesIO(png_of_size(60_000, 60_000))):
        with pytest.raises(picture.UnreadableError, match="are over 50 million"):
            picture.decode(file, 8)


def photograph(kind: str) -> bytes:
    noise = RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8)
    return encoded(Image.fromarray(noise), kind).getvalue()


BROKEN = {
    "empty": b"",
    "text": b"this is no picture",
    "cut.jpg": photograph("JPEG")[:700],
    "cut.png": photograph("PNG")[:900],
    "cut.webp": photograph("WEBP")[:300],
    "cut.bmp": photograph("BMP")[:500],
    "cut.gif": photograph("GIF")[:850],
    "header.jpg": photograph("JPEG")[:20],
    "header.png": png_of_size(40, 40),
    "wrong.png": photograph("PNG").replace(b"IDAT", b"IDOT"),
    "zeros": bytes(1000),
    "tiff": encoded(Image.new("L", (4, 4)), "TIFF").getvalue(),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.4\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_says_why(name):
    with pytest.raises(picture.UnreadableError) as raised:
        picture.decode(io.BytesIO(BROKEN[name]), 32)
    message = str(raised.value)
    assert message
    assert "\n" not in message
    assert "BytesIO" not in message


def test_a_signal_while_decoding_is_no_damage(monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(picture.Image, "open", interrupted)
    with pytest.raises(StoppedError, match="while starting"), Preemption():
        picture.decode(io.BytesIO(photograph("JPEG")))


def test_folders_missing_files_and_forbidden_ones_say_why(tmp_path):
    with pytest.raises(picture.UnreadableError, match="Is a directory"):
        picture.decode(tmp_path)
    with pytest.raises(picture.UnreadableError, match="No such file"):
        picture.decode(tmp_path / "gone.jpg")


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20), (64, 64)])
def test_any_shape_and_grey(height, width):
    red = Image.new("RGB", (60, 60), (255, 0, 0))
    grey = picture.decode(encoded(red, "PNG"), (height, width), channels=1)
    assert grey.shape == (height, width, 1)
    assert np.unique(grey).tolist() == [76]  # .299 of 255


def test_middle_of_the_shape_asked_for():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30] = 200
    file = encoded(Image.fromarray(pixels), "PNG")
    assert (picture.decode(file, (20, 40)) == 200).all()
