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

from configs import common
from resnet_jax.augment import (
    alternate,
    augment,
    averaged_over_flip,
    mix,
    normalization,
    normalize,
    statistics,
    symmetric_beta,
)
from tests.quick import quick_jit

SHAPES = [(8, 1), (8, 3), (32, 1), (32, 3)]


def settings(**changes) -> ConfigDict:
    """`config.augment` with everything off but the changes."""
    config = common.default().augment
    config.update(crop=0.0, flip=False)
    config.update(changes)
    return config


def random_images(count, size, channels, seed=0):
    shape = (count, size, size, channels)
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(np.float32)


def run(config, images, seed=0, step=0, positions=None, mirrored=None, size=0):
    key = jax.random.fold_in(jax.random.key(seed), step)
    if positions is None:
        positions = np.arange(len(images), dtype=np.int32)
    function = compiled(tuple(sorted(config.items())), size)
    return np.asarray(function(images, key, jnp.asarray(positions), mirrored))


@functools.cache
def compiled(items, size):
    return quick_jit(functools.partial(augment, ConfigDict(dict(items)), size=size))


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


def are_unrelated(draws, to: int | None = None) -> bool:
    """Whether none of some numbers is correlated with the first `to`; None: any."""
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    return abs(correlations[:to]).max() < 0.08


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
        results = np.asarray(quick_jit(one)(keys))
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


@pytest.mark.parametrize("shape", [(8, 28), (28, 8)])
def test_rows_move_by_a_part_of_the_height_and_columns_by_one_of_the_width(shape):
    ramps = np.stack(np.mgrid[tuple(map(slice, shape))], axis=-1).astype(np.float32)
    middle, ramps = np.array(shape) // 2, np.repeat(ramps[None], 400, axis=0)
    for change, furthest, tolerance in (
        ({"crop": 0.125}, [round(0.125 * side) for side in shape], 0),
        ({"shift": 0.25}, [0.25 * side for side in shape], 0.05),
    ):
        moved = run(settings(**change), ramps)[:, *middle] - middle
        np.testing.assert_allclose(abs(moved).max(0), furthest, rtol=tolerance)


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


def torch_boxes(count, smallest):
    """Widths and heights as Torch's RandomResizedCrop draws them, but not rounded."""
    draws, sides = np.random.default_rng(0), []
    while len(sides) < count:
        for _ in range(10):
            area = draws.uniform(smallest, 1)
            aspect = np.exp(draws.uniform(-np.log(4 / 3), np.log(4 / 3)))
            wide, high = np.sqrt(area * aspect), np.sqrt(area / aspect)
            if wide <= 1 and high <= 1:
                break
        else:
            wide = high = 1.0
        sides.append((wide, high))
    return np.array(sides).T


@pytest.mark.parametrize("smallest", [0.2, 0.97])
def test_random_resized_crops_have_the_areas_and_aspects_of_torch(smallest):
    size = 32
    found, mirrored = boxes(3000, size, smallest, flip=True)
    wide, high = (found[:, 2:] - found[:, :2]).T / size
    assert found.min() > -1e-2
    assert found.max() < size + 1e-2
    assert is_uniform([mirrored.sum(), (~mirrored).sum()])
    theirs = torch_boxes(3000, smallest)
    for quantity in (np.multiply, np.divide):
        ours, expected = quantity(wide, high), quantity(*theirs)
        assert scipy.stats.ks_2samp(ours.round(4), expected.round(4)).pvalue > 1e-3
    free = (wide < 0.9) & (high < 0.9)
    if free.any():
        sides = ((wide, found[:, 0]), (high, found[:, 1]))
        places = [(first / size / (1 - side))[free] for side, first in sides]
        for place in places:
            assert scipy.stats.kstest(place, scipy.stats.uniform().cdf).pvalue > 1e-3
        assert are_unrelated([*places, wide[free] * high[free], mirrored[free]])


def test_what_is_cut_out_does_not_depend_on_the_crop():
    size, count = 32, 2000
    found, _ = boxes(count, size, 0.2, flip=False)
    wide, high = (found[:, 2:] - found[:, :2]).T
    config = settings(random_resized_crop=0.2, cutout=0.25)
    cut = run(config, np.ones((count, size, size, 1), np.float32))[..., 0] == 0
    centres = [
        cut.any(axis) @ np.arange(size) / cut.any(axis).sum(1) for axis in (1, 2)
    ]
    for centre in centres:
        assert are_unrelated([centre, wide * high, wide / high, *found.T[:2]], to=1)


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


def test_constants_stand_for_the_statistics(photographs):
    config = common.default().augment
    config.update(normalization="mean_std", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    given = normalization(config, photographs)
    for found, expected in zip(given, ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), strict=True):
        np.testing.assert_array_equal(found, np.float32(expected))
    config.update(mean=(), std=())
    found = normalization(config, photographs)
    for ours, theirs in zip(found, statistics("mean_std", photographs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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


@pytest.mark.parametrize(("size", "part"), [(32, 0.5), (32, 0.25), (24, 0.4)])
def test_cutout_zeros_a_square_around_any_pixel(size, part):
    count, side = 3000, round(part * size)
    results = run(settings(cutout=part), np.ones((count, size, size, 1), np.float32))
    cut = results[..., 0] == 0
    squares = {}
    for row in range(size):
        for column in range(size):
            square = np.zeros((size, size), bool)
            top, left = row - side // 2, column - side // 2
            square[max(top, 0) : top + side, max(left, 0) : left + side] = True
            squares.setdefault(square.tobytes(), (row, column))
    centres = [squares[image.tobytes()] for image in cut]
    for found in zip(*centres, strict=True):
        assert is_uniform(np.bincount(found, minlength=size))
    images = random_images(8, size, 3)
    changed = run(settings(cutout=part), images)
    assert ((changed == images) | (changed == 0)).all()


@pytest.mark.parametrize("shape", [(24, 10), (10, 24)])
def test_cutout_is_a_part_of_the_shorter_side(shape):
    cut = run(settings(cutout=0.5), np.ones((50, *shape, 1), np.float32)) == 0
    sides = [cut.any(axis).sum(axis=(1, 2)).max() for axis in (1, 2)]
    assert sides == [5, 5]


def test_alternating_flip_shows_both_ways_in_two_epochs():
    rows = jnp.arange(4000)
    key = jax.random.key(3)
    epochs = [np.asarray(alternate(key, rows, jnp.full(4000, e))) for e in range(4)]
    assert is_uniform([epochs[0].sum(), (~epochs[0]).sum()])
    assert (epochs[0] != epochs[1]).all()
    assert (epochs[0] == epochs[2]).all()
    assert (epochs[1] == epochs[3]).all()
    other = np.asarray(alternate(jax.random.key(4), rows, jnp.zeros(4000, int)))
    assert is_uniform([(other == epochs[0]).sum(), (other != epochs[0]).sum()])


def test_given_flips_are_made():
    images = random_images(6, 8, 3)
    mirrored = np.array([True, False, False, True, True, False])
    results = run(settings(flip=True), images, mirrored=mirrored)
    expected = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(results, expected)


@pytest.mark.parametrize(("size", "smaller"), [(32, 16), (32, 24), (28, 11)])
def test_smaller_images_are_pillows_means_over_areas(size, smaller):
    images = random_images(4, size, 3)
    results = run(settings(), images, size=smaller)
    for image, result in zip(images, results, strict=True):
        channels = [
            Image.fromarray(channel).resize((smaller, smaller), Image.Resampling.BOX)
            for channel in np.moveaxis(image, -1, 0)
        ]
        if size % smaller == 0:
            expected = np.stack(channels, axis=-1)
        else:  # Pillow's boxes are of whole pixels there
            fine = image.repeat(smaller, 0).repeat(smaller, 1)
            expected = fine.reshape(smaller, size, smaller, size, 3).mean((1, 3))
        np.testing.assert_allclose(result, expected, atol=2e-5)


def test_crops_of_smaller_images_are_means_over_crops():
    images, config = random_images(16, 32, 3), settings(crop=0.125, flip=True)
    expected = run(config, images).reshape(16, 16, 2, 16, 2, 3).mean((2, 4))
    results = run(config, images, size=16)
    np.testing.assert_allclose(results, expected, atol=1e-5)


def means_over_windows(image, low, high, size):
    """An image's part from `low` to `high`, (row, column), as size x size means.

    Its pixels are squares of one colour, of which those at the border go on outside. A
    window is at least a pixel wide.
    """
    weights = []
    for start, stop, length in zip(low, high, image.shape, strict=False):
        centres = start + (np.arange(size) + 0.5) * (stop - start) / size
        width = max(1, (stop - start) / size)
        places = centres[:, None] + np.linspace(-0.5, 0.5, 4001)[1:-1:2] * width
        pixels = np.floor(places).astype(int)
        chosen = np.eye(length)[pixels.clip(0, length - 1)]
        weights.append(chosen.mean(1))
    return np.einsum(
        "ik,kjc->ijc", weights[0], np.einsum("jk,ikc->ijc", weights[1], image)
    )


@pytest.mark.parametrize("size", [12, 16])
@pytest.mark.parametrize("smallest", [0.08, 0.6])
def test_smaller_parts_of_images_are_means_or_between_two_pixels(size, smallest):
    images = random_images(24, 24, 3)
    found, _ = boxes(24, 24, smallest, flip=False)
    config = settings(random_resized_crop=smallest)
    results = run(config, images, size=size)
    for image, (left, top, right, bottom), result in zip(
        images, found, results, strict=True
    ):
        expected = means_over_windows(image, (top, left), (bottom, right), size)
        np.testing.assert_allclose(result, expected, atol=2e-3)


@pytest.mark.parametrize("size", [12, 16])
def test_smaller_images_that_were_shifted_repeat_the_border(size):
    images = random_images(24, 24, 3)
    config = settings(shift=0.3)
    rows, columns, _ = keras_draws(config, 24, 24)
    results = run(config, images, size=size)
    for image, row, column, result in zip(images, rows, columns, results, strict=True):
        low, high = (row, column), (row + 24, column + 24)
        expected = means_over_windows(image, low, high, size)
        np.testing.assert_allclose(result, expected, atol=2e-3)


def test_smaller_images_keep_their_aspect():
    images = np.random.default_rng(0).uniform(size=(4, 28, 40, 1)).astype(np.float32)
    results = run(settings(), images, size=14)
    expected = images.reshape(4, 14, 2, 20, 2, 1).mean((2, 4))
    np.testing.assert_allclose(results, expected, atol=1e-6)


def mixed(config, images, keys, plain=False):
    targets = jnp.eye(len(images))
    function = jax.vmap(lambda key: mix(config, images, targets, key, jnp.array(plain)))
    return map(np.asarray, quick_jit(function)(keys))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_adds_opposite_examples_by_weights_of_a_beta_distribution(alpha):
    images = random_images(6, 8, 3)
    keys = jax.random.split(jax.random.key(0), 2000)
    results, targets = mixed(settings(mixup=alpha), jnp.asarray(images), keys)
    weights = targets[:, 0, 0].astype(np.float64)
    for weight, result, target in list(zip(weights, results, targets, strict=True))[
        :50
    ]:
        expected = weight * images + (1 - weight) * images[::-1]
        np.testing.assert_allclose(result, expected, atol=1e-6)
        expected = weight * np.eye(6) + (1 - weight) * np.eye(6)[::-1]
        np.testing.assert_allclose(target, expected, atol=1e-6)
    assert scipy.stats.kstest(weights, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def paper_boxes(alpha, size, count):
    """The share of the image that is pasted, drawn by NumPy as Yun et al. 2019 do."""
    draws = np.random.default_rng(0)
    part = np.sqrt(1 - draws.beta(alpha, alpha, count))
    sides = (part * size).astype(int)
    share = np.ones(count)
    for centre in draws.integers(0, size, (2, count)):
        low = centre - sides // 2
        share *= (np.minimum(low + sides, size) - np.maximum(low, 0)) / size
    return share


def test_cutmix_pastes_rectangles_of_opposite_examples():
    size, count = 16, 3000
    images = random_images(6, size, 3)
    keys = jax.random.split(jax.random.key(0), count)
    results, targets = mixed(settings(cutmix=1.0), jnp.asarray(images), keys)
    pasted = (results[:, 0] != images[0]).any(-1)
    for place, result, target in list(zip(pasted, results, targets, strict=True))[:200]:
        rows, columns = place.any(1), place.any(0)
        assert (place == rows[:, None] & columns).all()
        for side in (rows, columns):
            assert (np.diff(side.astype(int)) != 0).sum() <= 2
        expected = np.where(place[..., None], images[::-1], images)
        np.testing.assert_array_equal(result, expected)
        expected = (1 - place.mean()) * np.eye(6) + place.mean() * np.eye(6)[::-1]
        np.testing.assert_allclose(target, expected, atol=1e-6)
    shares = pasted.mean((1, 2))
    assert scipy.stats.ks_2samp(shares, paper_boxes(1.0, size, count)).pvalue > 1e-3


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_nothing_is_mixed_in_the_plain_tail(kind):
    images = random_images(6, 8, 3)
    keys = jax.random.split(jax.random.key(0), 20)
    results, targets = mixed(settings(**{kind: 1.0}), jnp.asarray(images), keys, True)
    assert (results == images).all()
    assert (targets == np.eye(6)).all()


def test_average_over_flip():
    images = random_images(3, 8, 3)
    weights = np.random.default_rng(1).normal(size=(8, 8, 3))
    result = averaged_over_flip(lambda x: (x * weights).sum((1, 2, 3)))(images)
    expected = [(x * (weights + weights[:, ::-1])).sum() / 2 for x in images]
    np.testing.assert_allclose(result, expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("radius", [0.0, np.nextafter(np.float32(1), np.float32(0))])
def test_beta_is_finite_at_the_ends_of_its_uniform_numbers(monkeypatch, alpha, radius):
    drawn = jnp.asarray([radius, 0.3], jnp.float32)
    monkeypatch.setattr(jax.random, "uniform", lambda *_: drawn)
    assert 0 <= symmetric_beta(jax.random.key(0), alpha) <= 1
