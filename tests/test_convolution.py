import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resnet_jax import compilation, convolution
from resnet_jax.parallel import Parallel
from tests.exactness import assert_close, draw
from tests.quick import quick_jit

pytestmark = pytest.mark.usefixtures("float64")
DIMENSIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def reference(images, kernel, strides, padding, **settings):
    return lax.conv_general_dilated(
        images, kernel, strides, padding, **DIMENSIONS, **settings
    )


def project(images, kernel, strides, padding, **settings):
    return convolution.convolve(
        images, kernel, strides, padding, **DIMENSIONS, **settings
    )


def derivatives(convolution, strides, padding):
    """Jits values, gradients in both arguments, and products with the Hessian."""

    def loss(arguments):
        # Not linear in the output, so that no second derivative is zero.
        return jnp.sum(jnp.sin(convolution(*arguments, strides, padding)))

    def slope(arguments, direction):
        gradient = jax.grad(loss)(arguments)
        return sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))

    def all_orders(arguments, direction):
        return (
            convolution(*arguments, strides, padding),
            jax.grad(loss)(arguments),
            jax.grad(slope)(arguments, direction),
        )

    return quick_jit(all_orders)


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "padding"),
    [
        *(
            (size, (k, k), (stride, stride), padding)
            for size in ((6, 6), (7, 5))
            for k in (1, 3)
            for stride in (1, 2)
            for padding in ((((k // 2, k // 2),) * 2), "SAME")
        ),
        ((7, 5), (1, 1), (1, 2), "VALID"),
        ((7, 5), (1, 1), (2, 2), ((1, 1), (2, 0))),
        ((7, 5), (3, 3), (3, 1), ((0, 2), (3, 1))),
        ((7, 5), (3, 1), (2, 1), "VALID"),
        ((7, 5), (2, 4), (1, 2), "SAME"),
        # Fewer pixels than the kernel has: of the images, or of their convolution.
        ((1, 1), (3, 3), (1, 1), "SAME"),
        ((2, 2), (3, 3), (1, 1), "SAME"),
        ((2, 2), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((4, 4), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((4, 3), (3, 3), (2, 2), "SAME"),
        ((2, 3), (3, 3), (1, 2), ((2, 1), (0, 3))),
        ((1, 6), (2, 4), (1, 3), ((3, 0), (0, 1))),
        ((5, 6), (7, 7), (2, 2), ((3, 3), (3, 3))),
        ((2, 2), (2, 3), (1, 1), ((0, 1), (4, 2))),
    ],
    ids=str,
)
def test_values_and_derivatives_are_those_of_lax(size, kernel_size, strides, padding):
    arguments = (draw(0, 2, *size, 3), draw(1, *kernel_size, 3, 4))
    direction = (draw(2, 2, *size, 3), draw(3, *kernel_size, 3, 4))
    actual = derivatives(project, strides, padding)(arguments, direction)
    expected = derivatives(reference, strides, padding)(arguments, direction)
    assert all(np.abs(part).max() > 0.1 for part in jax.tree.leaves(expected))
    assert_close(actual, expected)


@pytest.mark.parametrize(
    ("size", "stride", "left"),
    [(1, 1, 0), (2, 1, 0), (4, 2, 1), (3, 1, 2), (5, 2, 2)],
)
def test_xla_sees_no_convolution_whose_kernel_has_more_pixels(size, stride, left):
    """It would take the two for each other; `left` are the others of both ways."""

    def image_gradient(images, kernel):
        def loss(images):
            padding = ((1, 1), (1, 1))
            return (project(images, kernel, (stride, stride), padding) ** 2).sum()

        return jax.grad(loss)(images)

    arguments = draw(0, 2, size, size, 4), draw(1, 3, 3, 4, 4)
    program = quick_jit(image_gradient).lower(*arguments).as_text()
    assert program.count("stablehlo.convolution(") == left


def scanned(convolution, strides, padding):
    """A loss of a loop over kernels, each applied to what the last one gave."""

    def loss(images, kernels, last):
        def body(images, kernel):
            images = jnp.tanh(convolution(images, kernel, (1, 1), padding))
            return images, images.mean()

        images, means = lax.scan(body, images, kernels)
        return jnp.sum(convolution(images, last, strides, padding) ** 2) + means.sum()

    return loss


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding"),
    [
        ((3, 3), (1, 1), ((1, 1), (1, 1))),
        ((3, 3), (2, 2), "SAME"),
        ((2, 4), (1, 2), "SAME"),
        ((1, 1), (2, 2), ((1, 1), (2, 0))),
    ],
)
def test_derivatives_do_not_depend_on_onednn(
    monkeypatch, kernel_size, strides, padding
):
    monkeypatch.setattr(compilation, "tracing_for_onednn", lambda: True)
    arguments = draw(0, 2, 7, 5, 3), draw(1, *kernel_size, 3, 4)
    direction = draw(2, 2, 7, 5, 3), draw(3, *kernel_size, 3, 4)
    actual, expected = (
        derivatives(convolution, strides, padding)(arguments, direction)
        for convolution in (project, reference)
    )
    assert_close(actual, expected)


def test_the_form_for_onednn_is_kept_apart_from_the_other():
    images, kernel = draw(0, 2, 8, 8, 3), draw(1, 3, 3, 3, 4)

    def loss(kernel):
        return project(images, kernel, (1, 1), "SAME").sum()

    def traced(onednn: bool) -> str:
        with compilation._traced_for(onednn):
            return jax.jit(jax.grad(loss)).lower(kernel).as_text()

    found = [
        "optimization_barrier" in traced(onednn) for onednn in (False, True, False)
    ]
    assert found == [False, True, False]


def compiled_kernel_gradient(convolution, strides, *arguments):
    """As training compiles it, where no gradient of the images is asked for."""

    def loss(kernel, images, weights):
        return jnp.vdot(weights, convolution(images, kernel, strides, "SAME"))

    one = Parallel.over(jax.devices()[:1], "jit", len(arguments[1]))
    arguments = [one.replicate(argument) for argument in arguments]
    program = one.compile(jax.grad(loss), *arguments)
    return program.result(), program(*arguments)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_kernel_gradient_in_float32_with_all_compiler_options(strides):
    size = 8 // strides[0]
    arguments = [
        draw(seed, *shape).astype(np.float32)
        for seed, shape in enumerate(((3, 3, 8, 8), (4, 8, 8, 8), (4, size, size, 8)))
    ]
    program, actual = compiled_kernel_gradient(project, strides, *arguments)
    _, expected = compiled_kernel_gradient(
        reference, strides, *(argument.astype(np.float64) for argument in arguments)
    )
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())
    assert "__onednn$" not in program.as_text()


@pytest.fixture(params=[False, True], ids=["without", "with"])
def onednn(request, monkeypatch):
    """Gradients as they are for programs that do without oneDNN, and that call it."""
    monkeypatch.setattr(compilation, "tracing_for_onednn", lambda: request.param)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize(("kernel_size", "strides"), [(1, (2, 2)), (3, (2, 2))])
def test_derivatives_in_a_loop_are_those_of_lax(kernel_size, strides):
    arguments = (
        draw(0, 2, 7, 6, 3),
        draw(1, 4, kernel_size, kernel_size, 3, 3),
        draw(2, kernel_size, kernel_size, 3, 5),
    )

    def first_and_second(convolution):
        gradient = jax.grad(scanned(convolution, strides, "SAME"), argnums=(0, 1, 2))

        def slope(*arguments):
            leaves = gradient(*arguments)
            return sum(jnp.vdot(a, jnp.cos(a)) for a in leaves)

        both = quick_jit(
            lambda *x: (gradient(*x), jax.grad(slope, argnums=(0, 1, 2))(*x))
        )
        return both(*arguments)

    assert_close(first_and_second(project), first_and_second(reference), 1e-10)


@pytest.mark.usefixtures("onednn")
def test_gradients_of_each_example_are_those_of_lax():
    images, kernel = draw(0, 3, 6, 6, 2), draw(1, 3, 3, 2, 4)

    def of_each(convolution):
        def loss(kernel, image):
            return jnp.sum(jnp.sin(convolution(image[None], kernel, (2, 2), "SAME")))

        return jax.vmap(jax.grad(loss), (None, 0))(kernel, images)

    assert_close(of_each(project), of_each(reference))


@pytest.mark.parametrize(
    ("channels", "settings"),
    [
        (4, {"feature_group_count": 2}),
        (2, {"rhs_dilation": (2, 2)}),
        (2, {"lhs_dilation": (2, 1)}),
        (2, {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1)}),
        (2, {"feature_group_count": 1, "precision": None}),
    ],
    ids=str,
)
def test_settings_of_nn_conv_are_kept(channels, settings):
    images, kernel = draw(0, 2, 8, 7, channels), draw(1, 3, 3, 2, 4)
    padding = ((1, 1), (0, 1))
    actual, expected = (
        convolution(images, kernel, (1, 1), padding, **settings)
        for convolution in (project, reference)
    )
    assert_close(actual, expected)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_type_of_the_arguments_is_kept(dtype, kernel_size):
    images = jnp.asarray(draw(0, 2, 6, 6, 3), dtype)
    kernel = jnp.asarray(draw(1, kernel_size, kernel_size, 3, 4), dtype)

    def loss(images, kernel):
        output = project(images, kernel, (2, 2), "SAME")
        assert output.dtype == dtype
        return jnp.sum(output.astype(jnp.float32) ** 2)

    gradients = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), images, kernel)
    assert [(g.shape, g.dtype) for g in gradients] == [
        (images.shape, dtype),
        (kernel.shape, dtype),
    ]
