import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from ml_collections import ConfigDict
from PIL import Image

from resnet_jax.augment import augment, normalize, statistics

SHAPES = [(8, 1), (8, 3), (32, 1), (32, 3)]


def settings(crop=0.0, shift=0.0, flip=False, random_resized_crop=0.0) -> ConfigDict:
    return ConfigDict(
        {
            "crop": crop,
            "shift": shift,
            "flip": flip,
            "random_resized_crop": random_resized_crop,
        }
    )


def random_images(count, size, channels, seed=0):
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float32)


def run(config, images, seed=0, step=0, positions=None):
    key = jax.random.fold_in(jax.random.key(seed), step)
    if positions is None:
        positions = np.arange(len(images), dtype=np.int32)
    function = compiled(tuple(sorted(config.items())))
    return np.asarray(function(images, key, jnp.asarray(positions)))


@functools.cache
def compiled(items):
    return jax.jit(functools.partial(augment, ConfigDict(dict(items))))


def all_crops(image, pad, flips):
    """Every crop of the zero-padded image, by its bytes: (row, column, flipped)."""
    size = len(image)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    found = {}
    for flipped in flips:
        for row in range(2 * pad + 1):
            for column in range(2 * pad + 1):
                crop = padded[row : row + size, column : column + size]
                crop = crop[:, ::-1] if flipped else crop
                found[crop.tobytes()] = (row, column, flipped)
    return found


def is_uniform(counts) -> bool:
    return scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("size", "channels"), SHAPES)
@pytest.mark.parametrize("flip", [False, True])
def test_crops_are_windows_of_the_padded_image_bit_for_bit(size, channels, flip):
    images = random_images(48, size, channels)
    pad = size // 8
    flips = (False, True) if flip else (False,)
    for image, result in zip(
        images, run(settings(crop=0.125, flip=flip), images), strict=True
    ):
        assert result.tobytes() in all_crops(image, pad, flips)


@pytest.mark.parametrize("vary", ["positions", "steps"])
@pytest.mark.parametrize("size", [8, 32])
def test_offsets_and_flips_are_all_as_likely(size, vary):
    config = settings(crop=0.125, flip=True)
    crops = all_crops(random_images(1, size, 1)[0], size // 8, (False, True))
    image, count = random_images(1, size, 1), 6000
    if vary == "positions":
        results = run(config, np.repeat(image, count, axis=0))
    else:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(0), jnp.arange(count)
        )
        one = jax.vmap(
            lambda key: augment(config, jnp.asarray(image), key, jnp.zeros(1, int))[0]
        )
        results = np.asarray(jax.jit(one)(keys))
    drawn = [crops[result.tobytes()] for result in results]
    counts = [drawn.count(choice) for choice in crops.values()]
    assert min(counts) > 0
    assert is_uniform(counts)
    for part in zip(*drawn, strict=True):
        assert is_uniform(np.unique(part, return_counts=True)[1])


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_flip_alone_mirrors_about_half_of_the_images(size, channels):
    images = random_images(400, size, channels)
    results = run(settings(flip=True), images)
    kept = (results == images).all((1, 2, 3))
    mirrored = (results == images[:, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert is_uniform([kept.sum(), mirrored.sum()])


@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_all_off_returns_the_images(size, channels):
    images = random_images(5, size, channels)
    assert (run(settings(), images) == images).all()


def keras_draws(config, count, size):
    """Rows and columns that each example is moved by, and whether it is mirrored.

    Read off images whose pixels are their own rows and columns.
    """
    ramps = np.stack(np.mgrid[:size, :size], axis=-1).astype(np.float32)
    ramps = run(config, np.repeat(ramps[None], count, axis=0))
    middle = size // 2
    mirrored = ramps[:, 0, 0, 1] > ramps[:, 0, -1, 1]
    column = np.where(mirrored, size - 1 - middle, middle)
    return (
        ramps[:, middle, middle, 0] - middle,
        ramps[:, middle, middle, 1] - column,
        mirrored,
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_shift_is_that_of_keras(size, channels, flip):
    """ImageDataGenerator: affine_transform(order=1, mode='nearest'), then the flip."""
    config, images = settings(shift=0.1, flip=flip), random_images(24, size, channels)
    draws = keras_draws(config, len(images), size)
    for image, result, row, column, mirrored in zip(
        images, run(config, images), *draws, strict=True
    ):
        expected = scipy.ndimage.shift(
            image.astype(np.float64), (-row, -column, 0), order=1, mode="nearest"
        )
        expected = expected[:, ::-1] if mirrored else expected
        np.testing.assert_allclose(result, expected, atol=2e-6 * size)
        assert flip or not mirrored


@pytest.mark.parametrize("size", [8, 32])
def test_shifts_are_uniform_within_a_tenth_of_the_size(size):
    rows, columns, mirrored = keras_draws(settings(shift=0.1, flip=True), 4000, size)
    for moved in (rows, columns):
        assert abs(moved).max() <= 0.1 * size + 1e-5
        uniform = scipy.stats.uniform(-0.1 * size, 0.2 * size)
        assert scipy.stats.kstest(moved, uniform.cdf).pvalue > 1e-3
    assert abs(np.corrcoef([rows, columns, mirrored]) - np.eye(3)).max() < 0.06


def boxes(count, size, smallest, flip):
    """The part of each image that is enlarged: (left, top, right, bottom), mirrored.

    Read off images whose pixels are their own rows and columns, away from the border,
    where pixels repeat.
    """
    config = settings(random_resized_crop=smallest, flip=flip)
    ramps = np.stack(np.mgrid[:size, :size], axis=-1).astype(np.float32)
    ramps = run(config, np.repeat(ramps[None], count, axis=0)).astype(np.float64)
    rows, columns = ramps[:, :, size // 2, 0], ramps[:, size // 2, :, 1]
    sides = []
    for places in (columns, rows):
        inner = slice(size // 4, -size // 4 or None)
        steps = np.arange(size)[inner] + 0.5
        fits = [np.polyfit(steps, line[inner] + 0.5, 1) for line in places]
        sides.append([sorted((low, low + slope * size)) for slope, low in fits])
    across, down = np.array(sides[0]), np.array(sides[1])
    mirrored = columns[:, 0] > columns[:, -1]
    return np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], 1), mirrored


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("size", "channels"), [(32, 1), (24, 3)])
def test_random_resized_crop_is_pillows_resize_of_a_box(size, channels, flip):
    images = random_images(24, size, channels)
    found = boxes(24, size, 0.3, flip)
    results = run(settings(random_resized_crop=0.3, flip=flip), images)
    for image, result, box, mirrored in zip(images, results, *found, strict=True):
        box = tuple(np.clip(box, 0, size))
        expected = np.stack(
            [
                Image.fromarray(channel).resize(
                    (size, size), Image.Resampling.BILINEAR, box
                )
                for channel in np.moveaxis(image, -1, 0)
            ],
            axis=-1,
        )
        expected = expected[:, ::-1] if mirrored else expected
        np.testing.assert_allclose(result, expected, atol=1e-3)
        assert flip or not mirrored


def test_random_resized_crops_have_the_areas_and_aspects_of_the_paper():
    size, smallest = 32, 0.2
    found, mirrored = boxes(3000, size, smallest, flip=True)
    wide, high = (found[:, 2:] - found[:, :2]).T / size
    assert found.min() > -1e-2
    assert found.max() < size + 1e-2
    assert is_uniform([mirrored.sum(), (~mirrored).sum()])
    inside = (wide < 0.99) & (high < 0.99)  # no side was shortened
    assert ((wide * high)[inside] > smallest - 1e-3).all()
    aspect = np.log(wide / high)
    assert abs(aspect).max() < np.log(4 / 3) + 1e-2
    # Below 3/4 no side can be too long: what is there is as it was drawn.
    small = wide * high < 0.74
    uniform = scipy.stats.uniform(smallest, 0.74 - smallest)
    assert scipy.stats.kstest((wide * high)[small], uniform.cdf).pvalue > 1e-3
    assert small.mean() == pytest.approx((0.74 - smallest) / (1 - smallest), abs=0.03)
    uniform = scipy.stats.uniform(-np.log(4 / 3), 2 * np.log(4 / 3))
    assert scipy.stats.kstest(aspect[small], uniform.cdf).pvalue > 1e-3
    free = inside & (wide < 0.9) & (high < 0.9)
    for side, first in ((wide, found[:, 0]), (high, found[:, 1])):
        place = (first / size / (1 - side))[free]
        assert scipy.stats.kstest(place, scipy.stats.uniform().cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "config",
    [
        settings(crop=0.125, flip=True),
        settings(shift=0.1, flip=True),
        settings(random_resized_crop=0.08, flip=True),
    ],
    ids=["crop", "shift", "random_resized_crop"],
)
@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3)])
def test_example_s_draws_depend_on_key_and_position_alone(config, size, channels):
    images, whole_batch = random_images(16, size, channels), np.arange(16)
    whole = run(config, images)
    for chosen in (whole_batch[:8], whole_batch[8:], whole_batch[::-1]):
        part = run(config, images[chosen], positions=np.asarray(chosen, np.int32))
        assert part.tobytes() == whole[chosen].tobytes()


@pytest.mark.parametrize(
    "config",
    [
        settings(crop=0.125, flip=True),
        settings(shift=0.1, flip=True),
        settings(random_resized_crop=0.08, flip=True),
    ],
    ids=["crop", "shift", "random_resized_crop"],
)
def test_other_steps_and_other_positions_have_other_draws(config):
    images = np.repeat(random_images(1, 32, 1), 64, axis=0)
    first, second = (run(config, images, step=step) for step in (0, 1))
    assert (first == second).all((1, 2, 3)).mean() < 0.1
    assert len({image.tobytes() for image in first}) > 40
    assert run(config, images, step=1).tobytes() == second.tobytes()


@pytest.fixture(scope="module")
def photographs():
    rng = np.random.default_rng(1)
    images = rng.integers(256, size=(2500, 8, 8, 3)) // [1, 2, 5]
    return images.astype(np.uint8)


@pytest.mark.parametrize(
    ("normalization", "axes", "shape"),
    [
        ("pixel_mean", 0, (8, 8, 3)),
        ("mean", (0, 1, 2), (3,)),
        ("mean_std", (0, 1, 2), (3,)),
    ],
)
def test_statistics_are_those_of_the_images_over_255(
    photographs, normalization, axes, shape
):
    images = photographs
    mean, scale = statistics(normalization, images)
    assert mean.shape == scale.shape == shape
    assert mean.dtype == scale.dtype == np.float32
    np.testing.assert_allclose(mean, (images / 255).mean(axes), rtol=1e-7)
    deviation = (images / 255).std(axes) if normalization == "mean_std" else 1
    np.testing.assert_allclose(scale, np.broadcast_to(deviation, shape), rtol=1e-7)


@pytest.mark.parametrize("normalization", ["pixel_mean", "mean"])
def test_means_are_the_exact_ones_to_the_last_bit(photographs, normalization):
    images = photographs[:99, :2, :2]
    mean, _ = statistics(normalization, images)
    columns = images.reshape(99 if normalization == "pixel_mean" else -1, mean.size).T
    exact = [Fraction(sum(map(int, c)), 255 * len(c)) for c in columns]
    for got, true in zip(mean.ravel(), exact, strict=True):
        neighbours = np.nextafter(got, np.float32(-1)), np.nextafter(got, np.float32(2))
        nearest = min((got, *neighbours), key=lambda x: abs(Fraction(float(x)) - true))
        assert got == nearest


@pytest.mark.parametrize("normalization", ["pixel_mean", "mean", "mean_std"])
def test_statistics_do_not_depend_on_the_order_of_the_images(
    photographs, normalization
):
    images = photographs
    order = np.random.default_rng(2).permutation(len(images))
    for first, second in zip(
        statistics(normalization, images),
        statistics(normalization, images[order]),
        strict=True,
    ):
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("normalization", ["pixel_mean", "mean", "mean_std"])
def test_statistics_of_many_white_images_are_exact(normalization):
    mean, scale = statistics(normalization, np.full((70_000, 4, 4, 1), 255, np.uint8))
    assert (mean == 1).all()
    # One brightness has no deviation: the smallest scale, and no division by zero.
    np.testing.assert_allclose(scale, 1e-6 if normalization == "mean_std" else 1)


def test_small_deviation_is_not_lost_to_rounding():
    images = np.full((3000, 4, 4, 1), 255, np.uint8)
    images[0, 0, 0] = 254
    _, scale = statistics("mean_std", images)
    np.testing.assert_allclose(scale, (images / 255).std(), rtol=1e-4)


@pytest.mark.parametrize("normalization", ["pixel_mean", "mean", "mean_std"])
@pytest.mark.parametrize(("size", "channels"), SHAPES)
def test_normalize_subtracts_the_mean_and_divides_by_the_scale(
    normalization, size, channels
):
    rng = np.random.default_rng(3)
    images = rng.integers(256, size=(40, size, size, channels), dtype=np.uint8)
    mean, scale = statistics(normalization, images)
    result = np.asarray(jax.jit(lambda x: normalize(x, mean, scale))(images))
    assert result.dtype == np.float32
    expected = (images / 255 - mean.astype(np.float64)) / scale
    np.testing.assert_allclose(result, expected, atol=1e-6)
    axes = 0 if normalization == "pixel_mean" else (0, 1, 2)
    np.testing.assert_allclose(result.mean(axes), 0, atol=1e-5)
    if normalization == "mean_std":
        np.testing.assert_allclose(result.std(axes), 1, atol=1e-4)
