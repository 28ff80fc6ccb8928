"""Pixels that are evidence for a class: Grad-CAM, integrated gradients, and a check.

Grad-CAM: Selvaraju et al. 2017, arXiv 1610.02391. Integrated gradients: Sundararajan et
al. 2017, arXiv 1703.01365. Sanity check: Adebayo et al. 2018, arXiv 1810.03292.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.stats import spearmanr

from resnet_jax import models
from resnet_jax.blocks import Images

LAYERS = ("features", "stage4", "stage3", "stage2", "stage1")
Labels = Int[Array, "batch"]
Maps = Float[Array, "batch height width"]


def grad_cam(
    net: models.ResNet,
    variables: dict,
    images: Images,
    labels: Labels,
    layer: str = "features",
) -> Maps:
    """Non-negative Grad-CAM heat maps for class `labels[i]` of image i.

    The maps are weighted by their gradients' means (equation 1), summed, clipped at
    zero (equation 2), and scaled to the images' size.

    Args:
      net: the network, which computes in float32 here.
      variables: the network's.
      images: normalised.
      labels: the class to explain in each image.
      layer: 'features', the maps that are pooled for the classifier, or the output of a
        stage, such as 'stage2': earlier ones are finer but know less about the class.
    """
    net = models.in_float32(net)

    def score(change):
        outputs = []

        def intercept(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.module.path != (layer,):
                return output
            outputs.append(output)
            return output if change is None else output + change

        with nn.intercept_methods(intercept):
            logits = net.apply(variables, images, train=False)
        return _class_scores(logits, labels).sum(), outputs[0]

    _, shape = jax.eval_shape(lambda: score(None))
    zeros = jnp.zeros(shape.shape, shape.dtype)
    gradients, maps = jax.grad(score, has_aux=True)(zeros)
    weights = gradients.mean((1, 2), keepdims=True)
    heat = nn.relu((weights * maps).sum(-1))
    return jax.image.resize(heat, images.shape[:3], "bilinear")


def integrated_gradients(
    net: models.ResNet,
    variables: dict,
    images: Images,
    labels: Labels,
    steps: int = 64,
) -> tuple[Images, Float[Array, "batch"]]:
    """How much each pixel adds to the logits of `labels`, relative to the mean.

    The path is a straight line from zeros to the image. Zeros are the mean that images
    are normalised by, a uniform colour if it is per channel. The integral is computed
    by the trapezoidal rule with `steps` intervals.

    Returns:
      Attributions, and each image's completeness error: how far the attributions' sum
      is from the logit's difference between both ends (proposition 1), relative to that
      difference.
    """
    net = models.in_float32(net)

    def score(images):
        scores = _class_scores(net.apply(variables, images, train=False), labels)
        return scores.sum(), scores

    def add(step, sums):
        total, first, _ = sums
        trapezoid_weight = jnp.where((step == 0) | (step == steps), 0.5, 1.0)
        gradient, scores = jax.grad(score, has_aux=True)(images * (step / steps))
        first = jnp.where(step == 0, scores, first)
        return total + trapezoid_weight * gradient, first, scores

    zeros = jnp.zeros(len(labels))
    sums = (jnp.zeros_like(images), zeros, zeros)
    total, first, last = jax.lax.fori_loop(0, steps + 1, add, sums)
    attributions = images * total / steps
    error = jnp.abs(attributions.sum((1, 2, 3)) - (last - first))
    return attributions, error / jnp.maximum(jnp.abs(last - first), 1e-6)


def _class_scores(logits, labels):
    return jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]


def cascading_randomization(
    net: models.ResNet, variables: dict, image_shape: tuple[int, int, int], seed: int
) -> dict[str, dict]:
    """Variables in which more and more layers are redrawn, from the output down.

    Returns:
      Variables by the part redrawn last, such as 'classifier' or 'and stage 3': the
      cascading randomisation of Adebayo et al., section 3.1.
    """
    fresh = models.initialize(net, jax.random.key(seed), image_shape)
    groups = {"classifier": ("classifier", "final_bn")}
    for stage in range(len(net.blocks_per_stage), 0, -1):
        groups[f"and stage {stage}"] = (f"stage{stage}_",)
    groups["all weights"] = ("",)
    cascade, mixed = {}, variables
    for title, prefixes in groups.items():
        mixed = {
            kind: {
                name: fresh[kind][name] if name.startswith(prefixes) else old
                for name, old in tree.items()
            }
            for kind, tree in mixed.items()
        }
        cascade[title] = mixed
    return cascade


def rank_correlation(
    first: Float[np.ndarray, "batch height width"],
    second: Float[np.ndarray, "batch height width"],
) -> float:
    """The mean over images of Spearman's rank correlation of two sets of maps.

    A map whose pixels are all equal counts as 0.
    """
    correlations = []
    for a, b in zip(first, second, strict=True):
        flat = np.ptp(a) == 0 or np.ptp(b) == 0
        correlations.append(0.0 if flat else spearmanr(a, b, axis=None).statistic)
    return float(np.mean(correlations))
