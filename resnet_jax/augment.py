"""From stored images to the network's input, inside jit: normalise, move, cut, mix.

Every random draw belongs to one example of one step, or to the step, so a batch looks
the same however it is spread over devices; but under 'pmap' examples are mixed with
others on their own device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from ml_collections import ConfigDict

from resnet_jax.resampling import Windows, resample

# Torch's and the Inception paper's range of width / height; Torch's attempt limit.
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def normalization(
    config: ConfigDict,
    images: UInt8[np.ndarray, "examples height width channels"] | Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale to normalise by: those of `config.augment`, or `statistics`."""
    if config.mean:
        return np.float32(config.mean), np.float32(config.std)
    return statistics(config.normalization, images)


def statistics(
    normalization: str,
    images: UInt8[np.ndarray, "examples height width channels"] | Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale to normalise by, from the training images divided by 255.

    'pixel_mean' gives a mean [height, width, channels] and 'mean' one [channels], both
    with scale 1; 'mean_std' gives the channels' mean and standard deviation.
    """
    if isinstance(images, np.ndarray):
        # Sums of integers: exact, and the same however NumPy orders them.
        total = images.sum(0, dtype=np.int64)
        squares = np.zeros_like(total)
        if normalization == "mean_std":
            for chunk in np.array_split(images, max(1, len(images) // 1024)):
                squares += np.square(chunk, dtype=np.int64).sum(0)
    else:  # streamed, and summed when they were read
        total, squares = images.sums
    if normalization == "pixel_mean":
        mean = total / len(images) / 255
        return mean.astype(np.float32), np.ones_like(mean, np.float32)
    count = len(images) * total[..., 0].size
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
    mirrored: Bool[Array, "batch"] | None = None,
    size: int = 0,
) -> Float[Array, "batch out_height out_width channels"]:
    """Crops padded images (He 2015, section 4.2), or shifts as Keras does, or enlarges
    a part of the image (Szegedy et al. 2015, arXiv 1409.4842, section 6); flips; scales
    down; and cuts squares out (DeVries and Taylor 2017, arXiv 1708.04552).

    Args:
      config: `config.augment`.
      images: normalised, so that the zeros that `crop` pads with, and that fill what is
        cut out, are mean pixels.
      key: the step's random key.
      positions: the examples' places in the whole batch; each has its own draws.
      mirrored: which to flip; None: drawn.
      size: the result's shorter side, at most that of the images, whose aspect ratio
        is kept; 0: as large as they are.
    """
    height, width = images.shape[1:3]
    scale = size / min(height, width) if size else 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    vertical, horizontal, flip_draw = jax.vmap(
        lambda key: jax.random.uniform(key, (3,)), out_axes=1
    )(keys)
    rows, columns = (
        Windows.whole(round(length * scale), length, len(keys))
        for length in (height, width)
    )
    if config.flip:
        mirrored = flip_draw < 0.5 if mirrored is None else mirrored
        columns = columns.mirrored(mirrored)
    if config.random_resized_crop:
        (tops, heights), (lefts, widths) = _boxes(
            config.random_resized_crop, keys, vertical, horizontal
        )
        rows, columns = rows.within(tops, heights), columns.within(lefts, widths)
    elif config.crop:
        rows = rows.moved(_whole_offsets(vertical, round(config.crop * height)))
        columns = columns.moved(_whole_offsets(horizontal, round(config.crop * width)))
    elif config.shift:
        # As in Keras's ImageDataGenerator: any fraction of a pixel.
        rows = rows.moved((2 * vertical - 1) * config.shift * height)
        columns = columns.moved((2 * horizontal - 1) * config.shift * width)
    if config.flip or config.random_resized_crop or config.crop or config.shift or size:
        images = resample(images, rows, columns, zero_outside=config.crop > 0)
    return _cut_out(config.cutout, images, keys) if config.cutout else images


def alternate(key: Array, rows: Int[Array, "batch"], epochs: Int[Array, "batch"]):
    """Which examples to flip: a random half in the first epoch, then alternating.

    Two successive epochs thus show each image both ways (Jordan 2024,
    arXiv 2404.00498, section 3.6).

    Args:
      key: the run's.
      rows: the examples' places in the training split.
      epochs: the epoch that each is taken in, counted from 0.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
    return (jax.vmap(jax.random.bits)(keys) + epochs.astype(jnp.uint32)) % 2 == 0


def _cut_out(part: float, images, keys):
    """Zeros a square around a random pixel, as far as it lies within the image."""
    height, width = images.shape[1:3]
    side = round(part * min(height, width))
    centres = jax.vmap(
        lambda key: jax.random.uniform(jax.random.fold_in(key, 2), (2,)), out_axes=1
    )(keys)
    inside = [
        _span_mask(jnp.floor(centre * length), side, length)
        for centre, length in zip(centres, (height, width), strict=True)
    ]
    cut = inside[0][:, :, None] & inside[1][:, None, :]
    return jnp.where(cut[..., None], 0, images)


def _span_mask(centre, side, length: int):
    """Mask, bool [..., length], of the `side` pixels from centre - side // 2 on."""
    start = (centre - side // 2)[..., None]
    pixels = jnp.arange(length)
    return (pixels >= start) & (pixels < start + jnp.asarray(side)[..., None])


def mix(
    config: ConfigDict,
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    key: Array,
    plain: Bool[Array, ""],
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Mixes each image and its target with those at the mirrored place in the batch.

    'mixup' adds the two (Zhang et al. 2017, arXiv 1710.09412), with weights drawn from
    Beta(mixup, mixup); 'cutmix' pastes a rectangle of one into the other (Yun et al.
    2019, arXiv 1905.04899), with an area drawn from Beta(cutmix, cutmix). There is one
    draw per step. Under 'pmap' the batch is that of a device.

    Args:
      config: `config.augment`.
      images: as `augment` returns them.
      targets: class probabilities.
      key: the step's.
      plain: whether to mix nothing.
    """
    key, place = jax.random.split(key)
    if config.mixup:
        kept = jnp.where(plain, 1, symmetric_beta(key, config.mixup))
        images = kept * images + (1 - kept) * images[::-1]
    else:
        kept = symmetric_beta(key, config.cutmix)
        height, width = images.shape[1:3]
        part, centres = jnp.sqrt(1 - kept), jax.random.uniform(place, (2,))
        inside = [
            _span_mask(jnp.floor(centre * length), jnp.floor(part * length), length)
            for centre, length in zip(centres, (height, width), strict=True)
        ]
        pasted = inside[0][:, None] & inside[1] & ~plain
        images = jnp.where(pasted[..., None], images[::-1], images)
        kept = 1 - pasted.mean(dtype=images.dtype)
    return images, kept * targets + (1 - kept) * targets[::-1]


def symmetric_beta(key: Array, alpha: float) -> Float[Array, ""]:
    """Draws from Beta(alpha, alpha), without the rejection loop of `jax.random.beta`.

    Computed as (1 + t / sqrt(2 alpha + t^2)) / 2, where t has Student's t distribution
    with 2 alpha degrees of freedom and is drawn from two uniform numbers (Bailey 1994,
    Mathematics of Computation 62, pages 779-781).
    """
    radius, angle = jax.random.uniform(key, (2,))
    cosine = jnp.cos(2 * np.pi * angle)
    power = jnp.log(radius) / alpha  # of e; 1 - e^power is never 0, the ratio never NaN
    ratio = jnp.exp(power) / -jnp.expm1(power)  # (2 alpha / t^2) cosine^2
    root = jnp.sqrt(cosine**2 + ratio)
    smaller = ratio / (2 * root * (root + jnp.abs(cosine)))
    return jnp.where(cosine < 0, smaller, 1 - smaller)


def averaged_over_flip(function: Callable) -> Callable:
    """Averages a function over each image and its mirror image."""
    return lambda images: (function(images) + function(images[:, :, ::-1])) / 2


def _boxes(smallest: float, keys, vertical, horizontal):
    """A box in each image to enlarge: (top, height) and (left, width), [batch] each.

    All are fractions of the image's sides. The area is uniform from `smallest` to 1,
    its aspect ratio log-uniform; boxes that exceed the image are drawn again, as in
    Torch, which also gives up after ten and takes the whole image.
    """
    draws = jax.vmap(
        lambda key: jax.random.uniform(jax.random.fold_in(key, 1), (_ATTEMPTS, 2))
    )(keys)
    area = smallest + (1 - smallest) * draws[..., 0]
    least, most = np.log(_ASPECT)
    aspect = jnp.exp(least + (most - least) * draws[..., 1])
    high, wide = jnp.sqrt(area / aspect), jnp.sqrt(area * aspect)
    fits = (high <= 1) & (wide <= 1)
    first = fits.argmax(-1, keepdims=True)
    high, wide = (
        jnp.where(fits.any(-1), jnp.take_along_axis(side, first, -1)[:, 0], 1)
        for side in (high, wide)
    )
    return (vertical * (1 - high), high), (horizontal * (1 - wide), wide)


def _whole_offsets(uniform: Float[Array, "batch"], pad: int) -> Float[Array, "batch"]:
    """Offsets from -pad to pad, equally likely, from numbers in [0, 1)."""
    return jnp.floor(uniform * (2 * pad + 1)) - pad
