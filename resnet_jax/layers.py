"""The normalisation, ReLU and initialisers that every network is built from."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

# What layers call is jitted here and below, so that JAX traces it and its gradients
# once per shape, not once per layer.
_once_a_shape = partial(jax.jit, static_argnums=(1, 2))
# Standard deviation sqrt(2 / (kernel height * kernel width * output channels)):
# fb.resnet.torch's reading of He et al. 2015 (arXiv 1502.01852).
he_normal = _once_a_shape(nn.initializers.variance_scaling(2.0, "fan_out", "normal"))
# U(-1/sqrt(inputs), 1/sqrt(inputs)), Torch's default for a linear layer.
torch_uniform = _once_a_shape(
    nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
)
keras_he_normal = _once_a_shape(nn.initializers.he_normal())


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
        # Keeps the sum separate: with the layers before it, jaxlib 0.12 hands it to
        # XLA's library of kernels, which then returns NaN.
        x = lax.optimization_barrier(x)
    return x.mean(axis=(1, 2), dtype=jnp.promote_types(jnp.float32, x.dtype))


def stochastic_depth(
    survival: Float[Array, "blocks"], key: Array
) -> Float[Array, "blocks"]:
    """Draws what blocks' branches are multiplied by: 1 / survival, or 0 if dropped.

    Huang et al. 2016 (arXiv 1603.09382), section 3. They scale the branch by `survival`
    in evaluation; dividing by it in training instead is the same on average, and leaves
    the trained network an ordinary one.
    """
    return jax.random.bernoulli(key, survival) / survival


def relu(x: Array) -> Array:
    """max(x, 0), in the form that is fastest on this backend."""
    return _relu_once(x) if jax.default_backend() == "cpu" else nn.relu(x)


# The gradient that JAX derives reads the input, which XLA for CPU then has to store;
# this one reads the output, so that the maximum and what precedes it form one loop.
# (It uses != since XLA turns max(x, 0) > 0 into x > 0.)
@jax.custom_vjp
def _cpu_relu(x):
    return nn.relu(x)


def _relu_forward(x):
    y = nn.relu(x)
    return y, y


def _relu_backward(y, gradient):
    return (jnp.where(y != 0, gradient, 0).astype(gradient.dtype),)


_cpu_relu.defvjp(_relu_forward, _relu_backward)
_relu_once = jax.jit(_cpu_relu)


def batch_norm() -> type[nn.BatchNorm]:
    """The BatchNorm that is fastest on this backend."""
    return nn.BatchNorm if jax.default_backend() == "tpu" else FusedBatchNorm


@jax.jit
def _normalize_by(x, mean, var, scale, bias):
    return (x - mean) * (lax.rsqrt(var) * scale) + bias


class FusedBatchNorm(nn.BatchNorm):
    """`nn.BatchNorm` over the last axis, which trains in fewer passes over memory.

    XLA for GPU runs each of the small reductions that JAX derives as a kernel of its
    own, which takes longer to launch than to compute. XLA for CPU stores what several
    of its loops share, even a vector broadcast over the batch, and reads it back.
    """

    @nn.compact
    def __call__(self, x, use_running_average: bool):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        if use_running_average:
            y = _normalize_by(x, mean.value, var.value + self.epsilon, scale, bias)
            return y.astype(self.dtype)
        x = x.astype(self.dtype)
        y, batch_mean, batch_var = _normalize_once(x, scale, bias, self.epsilon)
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
    product -= mean * total  # the sum of gradient * (x - mean), with one operation less
    count = x.size // x.shape[-1]
    if jax.default_backend() == "cpu":
        # So that the vectors below are not shared with the forward pass: see the class.
        inverse, scale = lax.optimization_barrier((inverse, scale))
    factor = inverse * scale
    along = -factor * inverse * inverse * (product / count)
    constant = -factor * (total / count) - mean * along
    x_gradient = gradient * factor + (wide * along + constant)
    of_parameters = (product * inverse).astype(scale.dtype), total.astype(scale.dtype)
    return x_gradient.astype(x.dtype), *of_parameters


def _channel_sums(one, other):
    """Both sums over all axes but the last, in one pass if the backend supports it."""
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
_normalize_once = jax.jit(normalize_batch, static_argnums=3)
