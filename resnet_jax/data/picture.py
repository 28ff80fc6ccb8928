"""One picture file to pixels: any size, mode and orientation to RGB of one size."""

import warnings
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from PIL import Image

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# By content and not by name, since many a '.jpg' is another format.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
)
_ORIENTATION = 0x0112  # of EXIF
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Larger pictures are refused below, before they are decoded, and in a sentence.
Image.MAX_IMAGE_PIXELS = None
# What Pillow mends by itself in a picture is no news to who trains on thousands.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableError(Exception):
    """A file is no picture that can be read; says why in a few words."""


def decode(
    file: str | Path | BufferedIOBase,
    size: int | tuple[int, int] = 0,
    channels: int = 3,
) -> np.ndarray:
    """Reads a picture as it is seen: turned as its EXIF says, on white where clear.

    The middle of it is resized (bilinear, over all pixels that a new one covers) to
    `size`, a square's side or height and width; 0 leaves the whole picture as it is. Of
    an animation it is the first frame. A JPEG is decoded at a half, a quarter or an
    eighth where that is no smaller than `size`. One channel is grey.

    Returns:
      uint8 [height, width, channels].

    Raises:
      UnreadableError: it is damaged, over `MAX_PIXELS`, or none of `FORMATS`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UnreadableError(
                    f"{width}x{height} pixels are over {MAX_PIXELS // 10**6} million"
                )
            if size:
                side = max(size) if isinstance(size, tuple) else size
                image.draft(None, (side, side))
            image.load()
            image = _upright(_rgb(image), _orientation(image))
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's plugins raise all kinds at damaged files.
        raise UnreadableError(_reason(error)) from None
    if size:
        image = resized(image, *(size if isinstance(size, tuple) else (size, size)))
    if channels == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image)


def resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, bilinear, over all pixels that a new one covers."""
    box = _middle(image.size, (width, height))
    return image.resize((width, height), Image.Resampling.BILINEAR, box)


def _middle(
    size: tuple[int, int], target: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The largest box of the target's shape in the middle of a picture."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    # Rounding may reach beyond the picture by less than a pixel's billionth.
    right, bottom = min(left + width, size[0]), min(top + height, size[1])
    return max(left, 0.0), max(top, 0.0), right, bottom


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray((grey >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(clear)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged note does not spoil the picture
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TRANSPOSE.get(orientation)
    return image if turn is None else image.transpose(turn)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "cannot identify" in str(error):
        return f"no picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return " ".join(str(error).split()) or type(error).__name__
