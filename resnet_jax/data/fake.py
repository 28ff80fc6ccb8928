"""Random pixels and labels in the shape of CIFAR-10, to measure speed with."""

import numpy as np

from resnet_jax.data.source import Source

SIZES = {"train": 50_000, "test": 10_000}


def source() -> Source:
    """Random uint8 images `[32, 32, 3]` with random labels of 10 classes.

    There is nothing to learn in them: for speed tests only. An example depends on its
    split and number alone, and is the same in every run.
    """

    def example(split, index):
        rng = np.random.default_rng((list(SIZES).index(split), index))
        image = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
        return image, int(rng.integers(10))

    def examples(split, indices):
        return (example(split, index) for index in indices)

    return Source(
        name="fake (random pixels, for speed only)",
        class_names=tuple(str(label) for label in range(10)),
        sizes=SIZES,
        examples=examples,
    )
