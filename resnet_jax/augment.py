"""From stored images to the network's input, inside jit: normalise, shift, crop, flip.

Every draw belongs to one example of one step, so a batch looks the same however it is
spread over devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict


def statistics(
    normalization: str, images: UInt8[np.ndarray, "examples height width channels"]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale to normalise by, from the training images divided by 255.

    'pixel_mean' gives a mean [height, width, channels] and 'mean' one [channels], both
    with scale 1; 'mean_std' gives the channels' mean and standard deviation.
    """
    # Sums of integers: exact, and the same however NumPy orders them.
    count = len(images) if normalization == "pixel_mean" else images[..., 0].size
    axes = 0 if normalization == "pixel_mean" else (0, 1, 2)
    mean = images.sum(axes, dtype=np.int64) / count / 255
    scale = np.ones_like(mean)
    if normalization == "mean_std":
        square = sum(
            np.square(chunk, dtype=np.int64).sum(axes)
            for chunk in np.array_split(images, max(1, len(images) // 1024))
        )
        scale = np.sqrt(np.maximum(square / count / 255**2 - mean**2, 1e-12))
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
    """Crops from padded images (He 2015, section 4.2), or shifts as Keras; and flips.

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
    if config.crop:
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
