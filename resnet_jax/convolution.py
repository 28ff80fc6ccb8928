"""The convolution of every network, in the form that is fastest on this backend."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax import compilation

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def convolve(images, kernel, strides, padding, **settings):
    """The convolution that `nn.Conv` calls, in the form fastest on this backend.

    Images are [batch, height, width, channels], the kernel [height, width, channels,
    features]. `settings` are those that `nn.Conv` gives `jax.lax.conv_general_dilated`.
    """
    dilated = any(
        set(settings.get(name) or (1,)) != {1}
        for name in ("lhs_dilation", "rhs_dilation")
    )
    grouped = settings.get("feature_group_count", 1) != 1
    if jax.default_backend() != "cpu" or dilated or grouped:
        return lax.conv_general_dilated(images, kernel, strides, padding, **settings)
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], size, strides, padding)
    padding, onednn = tuple(map(tuple, padding)), compilation.tracing_for_onednn()
    return _on_cpu(images, kernel, tuple(strides), padding, onednn)


# Jitted on its own, so that identical layers and their gradients are traced once.
@partial(jax.jit, static_argnums=(2, 3, 4))
def _on_cpu(images, kernel, strides, padding, onednn):
    if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        chosen = images[:, :: strides[0], :: strides[1]]
        # With two axes: XLA for CPU is slower at products with more.
        product = chosen.reshape(-1, chosen.shape[-1]) @ kernel[0, 0]
        return product.reshape(*chosen.shape[:-1], kernel.shape[-1])
    return _cpu_convolve(images, kernel, strides, padding, onednn)


def _is_larger(kernel, images) -> bool:
    """Whether a kernel has more pixels than the images.

    XLA then swaps the two, which on a CPU is not the fast form: 3x3 convolutions of 2x2
    pixels take 8 times as long as the equivalent matrix product with 64 channels, and
    90 times with 512.
    """
    return math.prod(kernel.shape[:2]) > math.prod(images.shape[1:3])


def _dense_kernel(kernel, size, strides, padding):
    """The weight of each value of an image of `size` in each value of its convolution.

    [height, width, channels, new height, new width, features].
    """
    around, starts = [], []
    for n, k, stride, (low, high) in zip(
        size, kernel.shape[:2], strides, padding, strict=True
    ):
        last = (n + low + high - k) // stride * stride
        around.append((last - low, n + low - k, 0))
        starts.append(range(last, -1, -stride))
    # An output's weights over the whole image are a slice of the zero-padded kernel.
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [*around, (0,) * 3, (0,) * 3])
    (height, width), (rows, columns) = size, starts
    taken = [
        [kernel[row : row + height, column : column + width] for column in columns]
        for row in rows
    ]
    return jnp.stack([jnp.stack(of_a_row, axis=3) for of_a_row in taken], axis=3)


def _raw_convolve(images, kernel, strides, padding, **dilations):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=_DIMENSIONS, **dilations
    )


# XLA for CPU has fast convolutions only in the layout NHWC, HWIO. It converts others to
# that layout at the top level of a program, but not in the body of a loop, where the
# gradients that JAX derives run 4 to 30 times slower. So the two gradients are written
# here as ordinary convolutions or, for few pixels, as matrix products; the values are
# the same.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _cpu_convolve(images, kernel, strides, padding, onednn):
    return _forward(images, kernel, strides, padding, onednn)[0]


def _forward(images, kernel, strides, padding, onednn):
    if _is_larger(kernel, images):
        dense = _dense_kernel(kernel, images.shape[1:3], strides, padding)
        count, shape = images.shape[0], dense.shape[3:]  # symbolic in an export
        product = images.reshape(count, -1) @ dense.reshape(-1, math.prod(shape))
        convolved = product.reshape(count, *shape)
    else:
        convolved = _raw_convolve(images, kernel, strides, padding)
    return convolved, (images, kernel)


def _backward(strides, padding, onednn, residuals, gradient):
    images, kernel = residuals
    # One (size, kernel, gradient span, low padding) for height and for width.
    spans = [
        (size, k, (out - 1) * stride + 1, low)
        for size, k, out, stride, (low, _) in zip(
            images.shape[1:3],
            kernel.shape[:2],
            gradient.shape[1:3],
            strides,
            padding,
            strict=True,
        )
    ]
    if _is_larger(kernel, gradient):
        dense = _dense_kernel(kernel, images.shape[1:3], strides, padding)
        gradients = gradient.reshape(gradient.shape[0], -1)
        product = gradients @ dense.reshape(-1, gradients.shape[1]).T
        images_gradient = product.reshape(images.shape)
    else:
        images_gradient = _raw_convolve(
            gradient,
            kernel[::-1, ::-1].swapaxes(2, 3),
            (1, 1),
            [(k - 1 - low, size - span + low) for size, k, span, low in spans],
            lhs_dilation=strides,
        )
    pads = [(low, k - 1 + span - size - low) for size, k, span, low in spans]
    if onednn:
        # It takes 2 to 5 times as long where a kernel is as large as the images. XLA
        # does not hand it negative padding, so a column is added for that to cut off:
        # in a loop of its own, since adding and transposing in one is slower.
        low, high = pads[1]
        images = lax.optimization_barrier(
            jnp.pad(images, ((0, 0), (0, 0), (low + 1, 0), (0, 0)))
        )
        pads[1] = (-1, high)
    kernel_gradient = _raw_convolve(
        images.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        (1, 1),
        pads,
        rhs_dilation=strides,
    )
    return images_gradient, kernel_gradient.transpose(1, 2, 0, 3)


_cpu_convolve.defvjp(_forward, _backward)
