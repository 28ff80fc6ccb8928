"""The convolution, normalisation and ReLU that every network is built from."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from resnet_jax import compilation

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")

# Standard deviation sqrt(2 / (kernel height * kernel width * output channels)):
# fb.resnet.torch's reading of He et al. 2015 (arXiv 1502.01852).
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# U(-1/sqrt(inputs), 1/sqrt(inputs)), Torch's default for a linear layer.
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
keras_he_normal = nn.initializers.he_normal()


def convolve(images, kernel, strides, padding, **settings):
    """The convolution that `nn.Conv` calls, in the form this backend is fastest at.

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
    padding = tuple(map(tuple, padding))
    if size == (1, 1) and padding == ((0, 0), (0, 0)):
        chosen = images[:, :: strides[0], :: strides[1]]
        # Of two axes: XLA for CPU takes longer over products of more.
        product = chosen.reshape(-1, chosen.shape[-1]) @ kernel[0, 0]
        return product.reshape(*chosen.shape[:-1], kernel.shape[-1])
    return _cpu_convolve(images, kernel, tuple(strides), padding)


def _is_larger(kernel, images) -> bool:
    """Whether a kernel has more pixels than images have.

    Then XLA takes the two for each other, which on a CPU is not the form that is fast:
    3x3 convolutions of 2x2 pixels take 8 times as long as their product of matrices
    where they have 64 channels, and 90 times where they have 512.
    """
    return math.prod(kernel.shape[:2]) > math.prod(images.shape[1:3])


def _dense_kernel(kernel, size, strides, padding):
    """What every value of an image of `size` adds to every one of its convolution.

    [height, width, channels, new height, new width, features].
    """
    around, starts = [], []
    for n, k, stride, (low, high) in zip(
        size, kernel.shape[:2], strides, padding, strict=True
    ):
        last = (n + low + high - k) // stride * stride
        around.append((last - low, n + low - k, 0))
        starts.append(range(last, -1, -stride))
    # With zeros around the kernel, what an output takes of the whole image is a slice.
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


# XLA for CPU has fast convolutions only in the layout NHWC, HWIO. It brings others into
# that form at the top level of a program, but not in the body of a loop, where the
# gradients that JAX derives run 4 to 30 times slower. So the two gradients are written
# here as ordinary convolutions, or, of few pixels, as products of matrices; the values
# are the same.
@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cpu_convolve(images, kernel, strides, padding):
    return _forward(images, kernel, strides, padding)[0]


def _forward(images, kernel, strides, padding):
    if _is_larger(kernel, images):
        dense = _dense_kernel(kernel, images.shape[1:3], strides, padding)
        count, shape = images.shape[0], dense.shape[3:]  # of an export: any count
        product = images.reshape(count, -1) @ dense.reshape(-1, math.prod(shape))
        convolved = product.reshape(count, *shape)
    else:
        convolved = _raw_convolve(images, kernel, strides, padding)
    return convolved, (images, kernel)


def _backward(strides, padding, residuals, gradient):
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
    if compilation.tracing_for_onednn():
        # oneDNN takes 2 to 5 times as long where a kernel is as large as the images. A
        # negative padding, which XLA does not hand to it, cuts off a column added here:
        # first, since to add it and transpose in one loop is slower.
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


def zero_padded_shortcut(images, features, stride):
    """Option A of He et al. 2015, section 4.2: no parameters.

    Takes every `stride`-th pixel and pads the new channels with zeros, half of
    them before the old ones and half after (as akamaster/pytorch_resnet_cifar10).
    """
    new = features - images.shape[-1]
    subsampled = images[:, ::stride, ::stride]
    return jnp.pad(subsampled, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def spatial_mean(
    x: Float[Array, "batch height width channels"],
) -> Float[Array, "batch channels"]:
    """The mean over height and width, in float32 at least."""
    if jax.default_backend() == "cpu" and x.dtype == jnp.bfloat16:
        # So that the sum is alone: with the layers before it, jaxlib 0.12 hands it to
        # XLA's library of kernels, which then returns NaN.
        x = lax.optimization_barrier(x)
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(jnp.float32, x.dtype))


def stochastic_depth(
    survival: Float[Array, "blocks"], key: Array
) -> Float[Array, "blocks"]:
    """Draws what blocks' branches are multiplied by, 1 / survival or, left out, 0.

    Huang et al. 2016 (arXiv 1603.09382), section 3. They scale the branch by `survival`
    in evaluation; here it is divided by it in training, which is the same on average
    and leaves a trained network an ordinary one.
    """
    return jax.random.bernoulli(key, survival) / survival


def relu(x: Array) -> Array:
    """max(x, 0), in the form this backend is fastest at."""
    return _cpu_relu(x) if jax.default_backend() == "cpu" else nn.relu(x)


# The gradient that JAX derives reads the input, which XLA for CPU then has to write;
# this one reads the output, so that what comes before and the maximum are one loop.
# (It says != since XLA turns max(x, 0) > 0 into x > 0.)
@jax.custom_vjp
def _cpu_relu(x):
    return nn.relu(x)


def _relu_forward(x):
    y = nn.relu(x)
    return y, y


def _relu_backward(y, gradient):
    return (jnp.where(y != 0, gradient, 0).astype(gradient.dtype),)


_cpu_relu.defvjp(_relu_forward, _relu_backward)


def batch_norm() -> type[nn.BatchNorm]:
    """The BatchNorm that this backend is fastest at."""
    return nn.BatchNorm if jax.default_backend() == "tpu" else FusedBatchNorm


class FusedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` of the last axis, which trains in fewer passes over memory.

    XLA for GPU runs each of the small reductions that JAX derives as a kernel of its
    own, which takes longer to start than to compute. XLA for CPU writes what several of
    its loops share, be it a vector broadcast over the batch, and reads it again.
    """

    @nn.compact
    def __call__(self, x, use_running_average: bool):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        if use_running_average:
            factor = lax.rsqrt(var.value + self.epsilon) * scale
            return ((x - mean.value) * factor + bias).astype(self.dtype)
        x = x.astype(self.dtype)
        y, batch_mean, batch_var = normalize_batch(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            for kept, new in ((mean, batch_mean), (var, batch_var)):
                kept.value = self.momentum * kept.value + (1 - self.momentum) * new
        return y


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_batch(
    x: Float[Array | np.ndarray, "*batch channels"],
    scale: Float[Array | np.ndarray, "channels"],
    bias: Float[Array | np.ndarray, "channels"],
    epsilon: float,
) -> tuple[
    Float[Array, "*batch channels"], Float[Array, "channels"], Float[Array, "channels"]
]:
    """BatchNorm in training (Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1).

    Computes in float32 at least, as `nn.BatchNorm` does.

    Returns:
      The normalised `x` in its own type, and the mean and the variance that it had,
      through which no gradient flows.
    """
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    total, squares = _channel_sums(wide, wide * wide)
    count = x.size // x.shape[-1]
    mean = total / count
    var = jnp.maximum(0, squares / count - mean * mean)
    inverse = lax.rsqrt(var + epsilon)
    factor = inverse * scale
    y = wide * factor + (bias - mean * factor)
    return (y.astype(x.dtype), mean, var), (x, mean, inverse, scale)


def _normalize_backward(epsilon, residuals, gradients):
    x, mean, inverse, scale = residuals
    gradient, wide = gradients[0].astype(mean.dtype), x.astype(mean.dtype)
    total, product = _channel_sums(gradient, gradient * wide)
    product -= mean * total  # the sum of gradient * (x - mean), in one operation less
    count = x.size // x.shape[-1]
    if jax.default_backend() == "cpu":
        # So that the vectors below are none of the forward pass's: see the class.
        inverse, scale = lax.optimization_barrier((inverse, scale))
    factor = inverse * scale
    along = -factor * inverse * inverse * (product / count)
    constant = -factor * (total / count) - mean * along
    x_gradient = gradient * factor + (wide * along + constant)
    of_parameters = (product * inverse).astype(scale.dtype), total.astype(scale.dtype)
    return x_gradient.astype(x.dtype), *of_parameters


def _channel_sums(one, other):
    """Both sums over all axes but the last: in one pass, where the backend has that."""
    axes = tuple(range(one.ndim - 1))
    if jax.default_backend() == "cpu":
        return one.sum(axes), other.sum(axes)
    zero = jnp.zeros((), one.dtype)
    return lax.reduce(
        (one, other),
        (zero, zero),
        lambda left, right: (left[0] + right[0], left[1] + right[1]),
        axes,
    )


normalize_batch.defvjp(_normalize_forward, _normalize_backward)
