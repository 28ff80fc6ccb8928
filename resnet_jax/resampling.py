"""Shifts, mirror images, parts and smaller sizes of images, inside jit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


class Windows(NamedTuple):
    """Where the pixels of a result lie along one side of the images.

    Each is the mean over a window, in pixels of the images, the first of which spans
    -1/2 to 1/2.
    """

    centres: Float[Array, "batch pixels"]
    width: Float[Array, "batch 1"] | float  # at least 1: linear between two pixels
    length: int  # of the images

    @classmethod
    def whole(cls, pixels: int, length: int, batch: int) -> "Windows":
        """Windows that cover the whole image with `pixels` outputs."""
        width = length / pixels
        centres = (jnp.arange(pixels, dtype=jnp.float32) + 0.5) * width - 0.5
        return cls(jnp.broadcast_to(centres, (batch, pixels)), width, length)

    def mirrored(self, which: Bool[Array, "batch"]) -> "Windows":
        other = self.length - 1 - self.centres
        return self._replace(centres=jnp.where(which[:, None], other, self.centres))

    def moved(self, offsets: Float[Array, "batch"]) -> "Windows":
        return self._replace(centres=self.centres + offsets[:, None])

    def within(
        self, starts: Float[Array, "batch"], parts: Float[Array, "batch"]
    ) -> "Windows":
        """The same for a part of each image, by its start and length as fractions."""
        parts, start = parts[:, None], starts[:, None] * self.length
        centres = (self.centres + 0.5) * parts + start - 0.5
        return self._replace(centres=centres, width=jnp.maximum(1, self.width * parts))

    def weights(self, zero_outside: bool) -> Float[Array, "batch pixels length"]:
        """The share of each window that each pixel of the images covers.

        Without `zero_outside`, border pixels repeat outside.
        """
        edges = np.arange(self.length + 1, dtype=np.float32) - 0.5
        if not zero_outside:
            edges[0], edges[-1] = -np.inf, np.inf
        low, high = (
            self.centres[:, :, None] + sign * jnp.asarray(self.width)[..., None] / 2
            for sign in (-1, 1)
        )
        shared = jnp.minimum(high, edges[1:]) - jnp.maximum(low, edges[:-1])
        return shared.clip(0) / jnp.asarray(self.width)[..., None]


def resample(
    images: Float[Array, "batch height width channels"],
    rows: Windows,
    columns: Windows,
    zero_outside: bool,
) -> Float[Array, "batch out_height out_width channels"]:
    """Reads the images in windows: two small matrix products per image.

    Exact where windows are whole pixels. Outside the images there are zeros, or else
    their border pixels.
    """
    exact = {"precision": jax.lax.Precision.HIGHEST}
    images = jnp.einsum("bik,bkjc->bijc", rows.weights(zero_outside), images, **exact)
    return jnp.einsum("bjk,bikc->bijc", columns.weights(zero_outside), images, **exact)
