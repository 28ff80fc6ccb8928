from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import attribution, models
from tests.quick import quick_jit

SHAPE = (16, 16, 3)
LABELS = jnp.array([0, 3, 1])
grad_cam = quick_jit(attribution.grad_cam, static_argnums=0, static_argnames="layer")
integrated_gradients = quick_jit(
    attribution.integrated_gradients, static_argnums=0, static_argnames="steps"
)


@pytest.fixture(
    scope="module", params=["v1-8", pytest.param("v2-11", marks=pytest.mark.slow)]
)
def network(request):
    """A network with statistics that are not those of the start, and images."""
    version, depth = map(int, request.param.removeprefix("v").split("-"))
    net = models.resnet(version, depth, 4, width=4, scan=True)
    variables = models.initialize(net, jax.random.key(0), SHAPE)
    images = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    train = partial(net.apply, train=True, mutable=["batch_stats"])
    _, changed = quick_jit(train)(variables, images)
    return net, {**variables, **jax.device_get(changed)}, images


@pytest.mark.slow
def test_grad_cam_is_cam_on_pooled_features(network):
    """Selvaraju et al., section 3.1: with pooling and one linear layer they agree."""
    net, variables, images = network
    capture = partial(net.apply, capture_intermediates=True, mutable=["intermediates"])
    _, kept = quick_jit(capture)(variables, images)
    (features,) = kept["intermediates"]["features"]["__call__"]
    weights = variables["params"]["classifier"]["kernel"][:, LABELS].T
    area = features.shape[1] * features.shape[2]
    cam = np.maximum(np.einsum("nhwc,nc->nhw", features, weights) / area, 0)
    expected = jax.image.resize(cam, (3, 16, 16), "bilinear")
    found = grad_cam(net, variables, images, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert np.max(found) > 0


@pytest.mark.slow
@pytest.mark.parametrize("network", ["v2-11"], indirect=True)
def test_grad_cam_of_a_stage_follows_finite_differences(network):
    """A channel's weight is how the logit rises as the whole channel does."""
    net, variables, images = network

    @quick_jit
    def logits(channel, rise):
        def intercept(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.module.path == ("stage2",):
                kept["maps"] = output
                output = output.at[..., channel].add(rise)
            return output

        kept = {}
        with nn.intercept_methods(intercept):
            found = net.apply(variables, images, train=False)
        return found[jnp.arange(3), LABELS], kept["maps"]

    def risen(channel, rise):
        return np.float64(logits(channel, rise)[0])

    maps = logits(0, 0.0)[1]
    area = maps.shape[1] * maps.shape[2]
    rise = 1e-2
    weights = np.stack(
        [
            (risen(channel, rise) - risen(channel, -rise)) / (2 * rise * area)
            for channel in range(maps.shape[-1])
        ]
    )
    heat = np.maximum(np.einsum("nhwc,cn->nhw", maps, weights), 0)
    expected = np.asarray(jax.image.resize(heat, (3, 16, 16), "bilinear"))
    found = grad_cam(net, variables, images, LABELS, layer="stage2")
    np.testing.assert_allclose(found, expected, atol=0.05 * expected.max())


@pytest.mark.slow
@pytest.mark.parametrize("network", ["v2-11"], indirect=True)
def test_integrated_gradients_are_complete(network):
    net, variables, images = network
    both = quick_jit(net.apply)(
        variables, jnp.concatenate([images, jnp.zeros_like(images)])
    )
    scores = np.asarray(both)[np.arange(6), np.tile(LABELS, 2)]
    difference = scores[:3] - scores[3:]
    worst = []
    for steps in (4, 256):
        found, errors = integrated_gradients(
            net, variables, images, LABELS, steps=steps
        )
        sums = np.asarray(found).sum((1, 2, 3))
        expected = np.abs(sums - difference) / np.abs(difference)
        np.testing.assert_allclose(errors, expected, rtol=0.02, atol=1e-4)
        worst.append(max(errors))
    assert worst[1] < 0.02
    assert worst[1] < worst[0]


@pytest.mark.parametrize("network", ["v2-11"], indirect=True)
def test_integrated_gradients_are_the_mean_gradient_times_the_image(network):
    net, variables, images = network

    def score(images):
        return net.apply(variables, images)[jnp.arange(3), LABELS].sum()

    gradient = quick_jit(jax.grad(score))
    gradients = [gradient(images * k / 2) for k in range(3)]
    mean = (gradients[0] / 2 + gradients[1] + gradients[2] / 2) / 2
    found, _ = integrated_gradients(net, variables, images, LABELS, steps=2)
    np.testing.assert_allclose(found, images * mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("network", ["v2-11"], indirect=True)
def test_layers_are_drawn_anew_from_the_output_down(network):
    net, variables, _ = network
    cascade = attribution.cascading_randomization(net, variables, SHAPE, seed=5)
    fresh = models.initialize(net, jax.random.key(5), SHAPE)
    jax.tree.map(np.testing.assert_array_equal, cascade["all weights"], fresh)
    found = cascade["and stage 2"]["params"]
    for name in found:
        is_new = name.startswith(("classifier", "final", "stage3", "stage2"))
        source = fresh if is_new else variables
        jax.tree.map(np.testing.assert_array_equal, found[name], source["params"][name])


def test_rank_correlation_is_spearmans():
    first, second = np.random.default_rng(0).normal(size=(2, 5, 6, 7))
    second += first
    ranks = [maps.reshape(5, -1).argsort(1).argsort(1) for maps in (first, second)]
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]
    found = attribution.rank_correlation(first, second)
    assert found == pytest.approx(np.mean(expected))
    assert attribution.rank_correlation(first, np.exp(first)) == pytest.approx(1)
    assert attribution.rank_correlation(first, np.zeros_like(first)) == 0


@pytest.mark.parametrize("explain", [grad_cam, integrated_gradients])
def test_networks_in_bfloat16_are_explained_in_float32(network, explain):
    """XLA for CPU can give NaN where it sums a network's bfloat16 over its pixels."""
    net, variables, images = network
    found, expected = (
        explain(each, variables, images, LABELS)
        for each in (net.clone(dtype="bfloat16"), net)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.abs(jax.tree.leaves(found)[0]).max() > 0
