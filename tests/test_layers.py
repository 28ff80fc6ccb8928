import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from resnet_jax import convolution, layers, models
from tests.exactness import assert_close, draw
from tests.quick import quick_jit

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
@pytest.mark.parametrize(
    ("channels", "features", "stride", "before"),
    [(4, 8, 2, 2), (4, 16, 1, 6), (3, 8, 2, 2), (4, 4, 2, 0)],
)
def test_shortcut_a_subsamples_and_pads_channels_with_zeros(
    size, channels, features, stride, before
):
    images = draw(0, 2, *size, channels)
    height, width = (-(-pixels // stride) for pixels in size)
    expected = np.zeros((2, height, width, features))
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                expected[:, row, column, before + channel] = images[
                    :, stride * row, stride * column, channel
                ]
    actual = layers.zero_padded_shortcut(jnp.asarray(images), features, stride)
    np.testing.assert_array_equal(actual, expected)


def batch_norms(dtype):
    """Ours, Flax's, their variables and an input."""
    settings = {"momentum": 0.9, "epsilon": 1e-5, "dtype": dtype}
    x = jnp.asarray(3 * draw(0, 8, 5, 5, 6) + 1, dtype)
    flax = nn.BatchNorm(**settings)
    variables = flax.init(jax.random.key(0), x, use_running_average=False)
    variables = jax.tree.map(
        lambda v: v + abs(draw(1, *v.shape)).astype(v.dtype), variables
    )
    return layers.FusedBatchNorm(**settings), flax, variables, x


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """What is written for this backend, on the one that is there."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    monkeypatch.setattr(layers, "_normalize_once", layers.normalize_batch)


@pytest.mark.slow
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_batch_norm_is_that_of_flax(dtype):
    ours, flax, variables, x = batch_norms(dtype)
    weights = draw(2, *x.shape)

    def trained(norm):
        def loss(params, x):
            y, changed = norm.apply(
                {**variables, "params": params},
                *(x, False),
                mutable=["batch_stats"],
            )
            return (weights * y**2).sum(), (y, changed)

        gradient = quick_jit(jax.grad(loss, (0, 1), has_aux=True))
        values, (y, changed) = gradient(variables["params"], x)
        return values, y, changed["batch_stats"]

    tolerance = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 0.03}[dtype]
    assert_close(trained(ours), trained(flax), tolerance)


def test_equal_values_have_no_negative_variance():
    """As rounding gives some, of which there is no root."""
    values = jnp.linspace(50, 2000, 400, dtype=jnp.float32)
    ones = jnp.ones(400, jnp.float32)
    x = jnp.broadcast_to(values, (333, 400))
    y, _, var = layers.normalize_batch(x, ones, ones, 1e-5)
    assert (var >= 0).all()
    assert jnp.isfinite(y).all()


def test_batch_norm_evaluates_as_that_of_flax():
    ours, flax, variables, x = batch_norms(jnp.float32)
    given = ours.init(jax.random.key(0), x, use_running_average=False)
    assert_close(given, flax.init(jax.random.key(0), x, use_running_average=False))
    assert_close(
        ours.apply(variables, x, use_running_average=True),
        flax.apply(variables, x, use_running_average=True),
        tolerance=1e-6,
    )


def test_a_network_has_the_batch_norm_of_its_backend(monkeypatch):
    assert layers.batch_norm() is layers.FusedBatchNorm
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert layers.batch_norm() is nn.BatchNorm


def test_relu_is_that_of_flax():
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-300, 3.0])

    def values_and_derivatives(relu, x):
        def gradient(x):
            return jax.grad(lambda x: (relu(jnp.sin(x)) ** 3).sum())(x)

        slopes = jax.vjp(relu, x)[1](jnp.arange(1.0, 6.0))
        at_zero = jax.hessian(lambda p: (relu(p[0]) + p[1]) ** 2)(x[1:3])
        return relu(x), slopes, jax.jvp(gradient, (x,), (x + 1,)), at_zero

    found, expected = (
        quick_jit(values_and_derivatives, static_argnums=0)(relu, x)
        for relu in (layers.relu, nn.relu)
    )
    assert_close(found, expected)


def test_normalisation_and_relu_are_one_loop_of_a_cpu():
    """XLA makes that of them if the gradient needs nothing in between."""
    x, scale = jnp.ones((8, 32, 32, 16), jnp.float32), jnp.ones(16, jnp.float32)
    kernel = jnp.ones((3, 3, 16, 16), jnp.float32)

    def loss(x, scale, kernel):
        y = layers.relu(layers.normalize_batch(x, scale, scale, 1e-5)[0])
        return (convolution.convolve(y, kernel, (1, 1), "SAME") ** 2).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, scale, kernel)
    kinds = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE"
    program = lowered.compile({"xla_cpu_experimental_ynn_fusion_type": kinds})
    (loop,) = (
        part
        for part in program.as_text().split("\n\n")
        if "f32[8,32,32,16]" in part and " maximum(" in part
    )
    assert " multiply(" in loop


def test_batch_norm_sees_the_batch_of_all_devices():
    x, scale = jnp.asarray(draw(0, 8, 3, 3, 6)), jnp.asarray(draw(1, 6))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def gradients(x, scale):
        def loss(x, scale):
            return (layers.normalize_batch(x, scale, scale, 1e-5)[0] ** 3).sum()

        return jax.grad(loss, (0, 1))(x, scale)

    assert_close(gradients(spread, scale), gradients(x, scale))


@pytest.mark.slow
def test_hessian_products_pass_the_batch_norm():
    x, scale = jnp.asarray(draw(0, 4, 6)), jnp.asarray(draw(1, 6))

    def gradient(norm):
        return jax.grad(lambda x: (norm(x) ** 3).sum())

    def plain(x):
        mean, var = x.mean(0), (x**2).mean(0) - x.mean(0) ** 2
        return (x - mean) * lax.rsqrt(var + 1e-5) * scale + scale

    def ours(x):
        return layers.normalize_batch(x, scale, scale, 1e-5)[0]

    products = [
        jax.jvp(gradient(norm), (x,), (jnp.asarray(draw(2, 4, 6)),))[1]
        for norm in (ours, plain)
    ]
    assert_close(*products, tolerance=1e-9)


def test_equal_layers_are_traced_once():
    net = models.resnet(1, 20, 10, width=4)  # seven BatchNorms a stage
    images = jnp.zeros((2, 8, 8, 1), jnp.float32)

    def loss(variables):
        logits, _ = net.apply(variables, images, train=True, mutable="batch_stats")
        return logits.sum()

    variables = models.zeros(net, (8, 8, 1))
    text = jax.jit(jax.grad(loss)).lower(variables).as_text()
    functions = re.findall(r"func.func private @(normalize_batch\w*)", text)
    calls = re.findall(r"call @normalize_batch", text)
    assert len(calls) == 2 * 19  # forward and backward
    assert len(functions) == 2 * 3  # of three shapes
