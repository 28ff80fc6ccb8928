"""From stored images to the network's input, inside jit: normalise, crop, shift, flip.

Every draw belongs to one example of one step, so a batch looks the same however it is
spread over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

# Torch's and the Inception paper's range of width / height.
_ASPECT = (3 / 4, 4 / 3)


def statistics(
    normalization: str,
    images: UInt8[np.ndarray, "examples height width channels"] | Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale to normalise by, from the training images divided by 255.

    'pixel_mean' gives a mean [height, width, channels] and 'mean' one [channels], both
    with scale 1; 'mean_std' gives the channels' mean and standard deviation.
    """
    if not isinstance(images, np.ndarray):  # streamed, and summed when they were read
        return statistics_of_sums(normalization, len(images), *images.sums)
    # Sums of integers: exact, and the same however NumPy orders them.
    squares = np.zeros(images.shape[1:], np.int64)
    if normalization == "mean_std":
        for chunk in np.array_split(images, max(1, len(images) // 1024)):
            squares += np.square(chunk, dtype=np.int64).sum(0)
    total = images.sum(0, dtype=np.int64)
    return statistics_of_sums(normalization, len(images), total, squares)


def statistics_of_sums(
    normalization: str, examples: int, total: np.ndarray, squares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What `statistics` gives, from the sums of the images and of their squares.

    Args:
      normalization: as in `statistics`.
      examples: the number of images.
      total: int64 [height, width, channels], their sum.
      squares: the same of their squares, which 'mean_std' alone reads.
    """
    if normalization == "pixel_mean":
        mean = total / examples / 255
        return mean.astype(np.float32), np.ones_like(mean, np.float32)
    count = examples * total[..., 0].size
    mean = total.sum((0, 1)) / count / 255
    scale = np.ones_like(mean)
    if normalization == "mean_std":
        square = squares.sum((0, 1)) / count / 255**2
        scale = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return mean.astype(np.float32), scale.astype(np.float32)


def normalize(
    images: UInt8[Array, "batch height width channels"],
    mean: Float[np.ndarray, "..."],
    scale: Float[np.ndarray, "..."],
) -> Float[Array, "batch height width channels"]:
    """Subtracts the mean and divides by the scale that `statistics` gives."""
    return (images.astype(jnp.float32) / 255 - mean) / scale


def augment(
    config: ConfigDict,
    images: Float[Array, "batch height width channels"],
    key: Array,
    positions: Int[Array, "batch"],
) -> Float[Array, "batch height width channels"]:
    """Crops from padded images (He 2015, section 4.2), or shifts as Keras, or enlarges
    a part of the image (Szegedy et al. 2015, arXiv 1409.4842, section 6); and flips.

    Args:
      config: `config.augment`.
      images: normalised, so that the zeros that `crop` pads with are mean pixels.
      key: the step's random key.
      positions: the examples' places in the whole batch; each has its own draws.
    """
    height, width = images.shape[1:3]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    vertical, horizontal, mirrored = jax.vmap(
        lambda key: jax.random.uniform(key, (3,)), out_axes=1
    )(keys)
    rows = jnp.broadcast_to(jnp.arange(height, dtype=jnp.float32), (len(keys), height))
    columns = jnp.broadcast_to(jnp.arange(width, dtype=jnp.float32), (len(keys), width))
    if config.flip:
        columns = jnp.where(mirrored[:, None] < 0.5, width - 1 - columns, columns)
    if config.random_resized_crop:
        tops, heights, lefts, widths = _boxes(
            config.random_resized_crop, keys, vertical, horizontal, height, width
        )
        rows = ((rows + 0.5) * heights + tops - 0.5).clip(0, height - 1)
        columns = ((columns + 0.5) * widths + lefts - 0.5).clip(0, width - 1)
    elif config.crop:
        rows += _whole_offsets(vertical, round(config.crop * height))
        columns += _whole_offsets(horizontal, round(config.crop * width))
    elif config.shift:
        # Keras's ImageDataGenerator: any fraction of a pixel, the border repeated.
        rows += ((2 * vertical - 1) * config.shift * height)[:, None]
        columns += ((2 * horizontal - 1) * config.shift * width)[:, None]
        rows, columns = rows.clip(0, height - 1), columns.clip(0, width - 1)
    elif not config.flip:
        return images
    return _resample(images, rows, columns)


def _boxes(smallest: float, keys, vertical, horizontal, height: int, width: int):
    """A box in each image to enlarge: top, height, left, width; [batch, 1] each.

    Height and width are by the image's. The area is uniform from the smallest to 1, its
    aspect log uniform; a side that would be longer than the image's is as long.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (2,)))(
        keys
    )
    area = smallest + (1 - smallest) * draws[:, 0]
    least, most = np.log(_ASPECT)
    aspect = jnp.exp(least + (most - least) * draws[:, 1])
    high = jnp.minimum(jnp.sqrt(area / aspect), 1)
    wide = jnp.minimum(jnp.sqrt(area * aspect), 1)
    tops, lefts = vertical * (1 - high) * height, horizontal * (1 - wide) * width
    return (x[:, None] for x in (tops, high, lefts, wide))


def _whole_offsets(uniform, pad: int):
    """Offsets -pad to pad, all as likely, from numbers in [0, 1): shape [batch, 1]."""
    return jnp.floor(uniform * (2 * pad + 1))[:, None] - pad


def _resample(images, rows, columns):
    """Reads images at rows and columns, linearly between pixels, zero outside.

    Two small matrix products an image: exact where rows and columns are whole.
    """

    def weights(sources, size):
        distance = jnp.abs(sources[:, :, None] - jnp.arange(size, dtype=jnp.float32))
        return jnp.maximum(1 - distance, 0)

    exact = {"precision": jax.lax.Precision.HIGHEST}
    images = jnp.einsum(
        "bik,bkjc->bijc", weights(rows, images.shape[1]), images, **exact
    )
    return jnp.einsum(
        "bjk,bikc->bijc", weights(columns, images.shape[2]), images, **exact
    )
