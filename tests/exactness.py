"""Values for tests in float64, and how close what they compute has to be."""

import jax
import numpy as np


def draw(seed: int, *shape: int, dtype=np.float64) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_close(actual, expected, tolerance=1e-12):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * np.abs(b).max()
        )
