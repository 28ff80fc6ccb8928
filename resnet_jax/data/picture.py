"""Decodes a picture file: any size, mode and orientation to RGB of one size."""

import contextlib
import hashlib
import warnings
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps

MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# For listing; decoding goes by content, since many a '.jpg' is another format.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif")
)

# Changes whenever the pixels that are read may: of this file and of Pillow.
DECODING = hashlib.sha256(
    Path(__file__).read_bytes() + PIL.__version__.encode()
).hexdigest()
# Seconds: reading a picture in less is mostly Python's work, whose lock makes several
# threads take longer than one.
QUICK = 5e-4
# `decode` itself refuses larger pictures, before decoding them, with a sentence.
Image.MAX_IMAGE_PIXELS = None
# What Pillow repairs by itself is of no interest when training on thousands.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableError(Exception):
    """A file is not a picture that can be read; says why in a few words."""


def decode(
    file: str | Path | BufferedIOBase,
    size: int | tuple[int, int] = 0,
    channels: int = 3,
) -> np.ndarray:
    """Reads a picture: EXIF orientation applied; transparency composited on white.

    Its middle is resized (bilinearly, over all pixels that a new one covers) to `size`,
    a square's side or (height, width); 0 leaves the whole picture as it is. Of an
    animation, the first frame is read. A JPEG is decoded at a half, a quarter or an
    eighth of its size if that is no smaller than `size`. One channel means grey.

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
            # Damaged EXIF data does not spoil the picture. In place, it is rotated
            # before Pillow rewrites the EXIF data, which may fail.
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            image = _rgb(image)
    except UnreadableError:
        raise
    except Exception as error:  # Pillow's plugins raise anything on damaged files.
        raise UnreadableError(_reason(error)) from None
    if size:
        height, width = size if isinstance(size, tuple) else (size, size)
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    if channels == 1:
        return np.array(image.convert("L"))[..., None]
    return np.array(image)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """An image with channels; unless `size` is 0, its middle resized to that square."""
    image = image[..., None] if image.ndim == 2 else image
    if not size or image.shape[:2] == (size, size):
        return image

    def middle(pixels: np.ndarray) -> np.ndarray:
        whole = Image.fromarray(pixels)
        return np.asarray(ImageOps.fit(whole, (size, size), Image.Resampling.BILINEAR))

    if image.shape[-1] == 3:
        return middle(image)
    # Pillow would take the last of two or four channels for transparency.
    channels = [middle(channel) for channel in np.moveaxis(image, -1, 0)]
    return np.stack(channels, axis=-1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip to 8
        grey = np.asarray(image).astype(np.int64)
        clear = grey == image.info.get("transparency")
        pixels = np.where(clear, 255, (grey >> 8).clip(0, 255))
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(clear)
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "cannot identify" in str(error):
        return f"not a picture in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return " ".join(str(error).split()) or type(error).__name__
