"""One picture from a file to the array that a network reads, for any use of it."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SUFFIXES += (".ppm",)
# By name, because Pillow would start other programs for a few of the rest.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Larger pictures are refused below, before they are decoded, and in our words.
Image.MAX_IMAGE_PIXELS = None
_ORIENTATION = 0x0112  # of EXIF


class PictureError(ValueError):
    """A picture that cannot be read; the message is the reason alone."""


def decode(
    source: Path | bytes, size: tuple[int, int] | None, channels: int
) -> np.ndarray:
    """Reads a picture: turned as its EXIF says, scaled to cover `size`, centre cropped.

    Scaling is bilinear, and over all the pixels that one covers where it makes a
    picture smaller; pictures of that size already are left as they are. Transparent
    parts become white. The first frame of an animation counts.

    Args:
      source: a file, or the content of one.
      size: height and width of the result; None: the picture's own.
      channels: 1 for grey, 3 for RGB.

    Returns:
      uint8 [height, width, channels].

    Raises:
      PictureError: it is no picture in a format that is known, is damaged, or has more
        than 50 million pixels.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                limit = MAX_PIXELS // 10**6
                raise PictureError(f"has more than {limit} million pixels")
            if size:
                # JPEG can decode to a half, a quarter or an eighth, which is quick.
                image.draft(None, (2 * max(size), 2 * max(size)))
            image = _opaque(_upright(image))
            image = image.convert("L" if channels == 1 else "RGB")
        if size:
            target = size[::-1]
            box = _centre(image.size, target)
            image = image.resize(target, Image.Resampling.BILINEAR, box=box)
    except Image.UnidentifiedImageError:
        raise PictureError("is no picture in a format that is known") from None
    except PictureError:
        raise
    # On damaged files Pillow's readers raise whatever they run into.
    except Exception as error:
        missing = error.strerror if isinstance(error, OSError) else None
        told = f"cannot be read ({missing})" if missing else f"is damaged ({error})"
        raise PictureError(told) from None
    return np.array(image).reshape(image.height, image.width, channels)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # a damaged note does not spoil a picture
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _opaque(image: Image.Image) -> Image.Image:
    """The picture on white, in 8 bits a channel."""
    if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise PictureError(f"has pixels of {image.mode!r}, not of 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _centre(
    size: tuple[int, int], target: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The largest box of the target's shape in the middle of a picture."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height
