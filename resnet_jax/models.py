"""ResNet versions 1 and 2 of any depth; blocks.py has their blocks.

Version 1: He et al. 2015, "Deep Residual Learning for Image Recognition",
arXiv 1512.03385, section 4.2. Version 2: He et al. 2016, "Identity Mappings in Deep
Residual Networks", arXiv 1603.05027, as in KaimingHe/resnet-1k-layers. The 'keras'
variant: keras-team/keras, examples/cifar10_resnet.py.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax import layers
from resnet_jax.blocks import (
    FeatureMaps,
    Images,
    PostActivationBlock,
    PreActivationBlock,
    blocks_per_stage,
    branch_convolutions,
    default_block,
    require_choice,
)
from resnet_jax.convolution import convolve
from resnet_jax.stacking import stack as stack
from resnet_jax.stacking import unstack


class ResNet(nn.Module):
    """A residual network; build it with `resnet`.

    The stages' blocks are named `stage<s>_block<b>`, counted from 1. Under `scan` the
    blocks of a stage after its first, which are identical, are stacked along a new
    first axis of each array in `stage<s>_blocks`; `stack` and `unstack` convert. Under
    `stochastic_depth`, training draws from the RNG stream of that name.

    `net.clone(block_class=..., norm_class=...)` has other blocks, and other modules in
    place of BatchNorm. `block_class` is called like `PostActivationBlock`, with its
    first four fields, and what it returns with the block's arguments; `zero_init` then
    has no effect. `norm_class` is called with a `name`, and with a `scale_init` where
    a post-activation block needs one for `zero_init`.
    """

    block: str
    activation: str
    shortcut: str | None
    blocks_per_stage: tuple[int, ...]
    num_classes: int
    width: int
    stem: str
    keras: bool
    stochastic_depth: float
    zero_init: bool
    dtype: DTypeLike
    scan: bool
    remat: bool
    block_class: Callable[..., nn.Module] | None = None
    norm_class: Callable[..., nn.Module] | None = None

    @nn.compact
    def __call__(
        self, images: Images, train: bool = False
    ) -> Float[Array, "batch classes"]:
        x = images.astype(self.dtype)
        size, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = self._conv(self.width, size, stride, name="stem_conv")(x)
        if self.activation == "post" or self.keras:
            x = self._norm(name="stem_bn")(x, use_running_average=not train)
            x = layers.relu(x)
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        scales = self._branch_scales(train)
        for stage, blocks in enumerate(self.blocks_per_stage):
            name = f"stage{stage + 1}_block"
            x = self._block(stage, first=True)(name=f"{name}1")(
                x, train, *(each[0] for each in scales[stage])
            )
            block = self._block(stage, first=False)
            if self.scan and blocks > 1:
                rest = [each[1:] for each in scales[stage]]
                x = _scan(block(name=f"{name}s"), x, train, blocks - 1, *rest)
            else:
                for b in range(1, blocks):
                    x = block(name=f"{name}{b + 1}")(
                        x, train, *(each[b] for each in scales[stage])
                    )
            x = FeatureMaps(name=f"stage{stage + 1}")(x)
        if self.activation == "pre":
            x = self._norm(name="final_bn")(x, use_running_average=not train)
            x = layers.relu(x)
        x = FeatureMaps(name="features")(x)
        x = layers.spatial_mean(x)
        kernel_init = layers.keras_he_normal if self.keras else layers.torch_uniform
        return nn.Dense(self.num_classes, kernel_init=kernel_init, name="classifier")(x)

    @property
    def _conv(self):
        default = layers.keras_he_normal if self.keras else layers.he_normal

        def conv(features, size, stride, name, kernel_init=default):
            return nn.Conv(
                features,
                (size, size),
                strides=stride,
                # Torch pads both sides alike, Keras only the far side at stride 2.
                padding="SAME" if self.keras else size // 2,
                use_bias=self.keras,
                dtype=self.dtype,
                kernel_init=kernel_init,
                conv_general_dilated=convolve,
                name=name,
            )

        return conv

    @property
    def norm_momentum(self) -> float:
        """The share of BatchNorm's running statistics that a training batch keeps."""
        return 0.99 if self.keras else 0.9

    @property
    def _norm(self):
        if self.norm_class:
            return self.norm_class
        epsilon = 1e-3 if self.keras else 1e-5
        return partial(
            layers.batch_norm(),
            momentum=self.norm_momentum,
            epsilon=epsilon,
            dtype=self.dtype,
        )

    def _branch_scales(self, train: bool) -> list[list[Float[Array, "blocks"]]]:
        """For each stage, the stochastic-depth scales of its blocks; empty when off.

        The blocks' survival probabilities fall linearly with depth, from the first on
        (Huang et al. 2016, eq. 4). All scales are drawn at once, so that they do not
        depend on `scan`.
        """
        if not (train and self.stochastic_depth):
            return [[] for _ in self.blocks_per_stage]
        count = sum(self.blocks_per_stage)
        place = np.arange(1, count + 1, dtype=np.float32) / count
        survival = jnp.asarray(1 - self.stochastic_depth * place)
        scales = layers.stochastic_depth(survival, self.make_rng("stochastic_depth"))
        ends = np.cumsum(self.blocks_per_stage)[:-1]
        return [[each] for each in jnp.split(scales, ends)]

    def _block(self, stage: int, first: bool):
        """The constructor of a stage's first block, or of its others."""
        stride = 2 if first and stage > 0 else 1
        width = self.width * 2**stage
        inner = 2 * width if self.keras and stage > 0 else width
        branch = branch_convolutions(self.block, width, inner, stride, self.stem)
        standard = {"pre": PreActivationBlock, "post": PostActivationBlock}
        build = partial(
            self.block_class or standard[self.activation],
            branch,
            self.shortcut,
            self._conv,
            self._norm,
        )
        if self.remat:
            # Inside a loop, XLA cannot undo remat.
            looped = self.scan and not first and self.blocks_per_stage[stage] > 2
            again = nn.remat(build.func, static_argnums=(2,), prevent_cse=not looped)
            build = partial(again, *build.args, **build.keywords)
        if self.block_class:
            return build
        build = partial(build, keras=self.keras, zero_init=self.zero_init)
        if self.activation == "pre":
            build = partial(build, first_in_network=first and stage == 0)
        return build


def _scan(block: nn.Module, x: Images, train: bool, length: int, *each) -> Images:
    """Runs `length` identical blocks; the n-th also gets item n of each of `each`."""
    x, _ = nn.scan(
        lambda block, x, each: (block(x, train, *each), None),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        length=length,
    )(block, x, each)
    return x


def resnet(
    version: int,
    depth: int,
    num_classes: int,
    *,
    variant: str = "paper",
    shortcut: str | None = None,
    residual: bool = True,
    activation: str | None = None,
    block: str | None = None,
    stem: str = "cifar",
    width: int = 0,
    stochastic_depth: float = 0.0,
    zero_init: bool = False,
    dtype: DTypeLike = jnp.float32,
    scan: bool = False,
    remat: bool = False,
) -> ResNet:
    """Builds a network: `net.apply(variables, images, train=...)` gives its logits.

    Args:
      version: 1 (basic blocks, post-activation, shortcut A) or 2 (bottleneck blocks,
        pre-activation, shortcut B). Later arguments change this one by one.
      depth: layers with weights on the longest path; see `blocks_per_stage`.
      num_classes: length of the logits.
      variant: 'paper', or 'keras' for the network of the Keras example.
      shortcut: 'A' (subsample, pad channels with zeros) or 'B' (1x1 projection: with
        BatchNorm in post-activation networks, plain on the shared pre-activation in
        the others), where the shape changes; elsewhere it is the identity.
      residual: False leaves all shortcuts out (the plain network).
      activation: 'post' or 'pre'.
      block: 'basic' (two 3x3) or 'bottleneck' (1x1, 3x3, 1x1).
      stem: 'cifar' (3x3 convolution, three stages) or 'imagenet' (7x7 convolution and
        pooling, each of stride 2, four stages, shortcut B; bottlenecks from depth 50,
        with the stride in the 3x3 convolution, as in torchvision: "version 1.5").
      width: channels of the stem; 0: the papers' 16, or 64 with stem 'imagenet'.
      stochastic_depth: probability in training that the last block's branch is dropped
        for a batch; it rises linearly from the first block's (Huang et al. 2016). The
        branch is computed all the same, and updates its BatchNorm's statistics.
      zero_init: each block starts as the identity, or as its shortcut.
      dtype: of the computation. Parameters, BatchNorm statistics and logits are
        float32 all the same (float64 logits where `dtype` is float64).
      scan: identical blocks run in a loop that compiles once, for very deep networks.
      remat: a block's activations are recomputed in the backward pass, not kept; XLA
        for CPU undoes this outside the loops of `scan`.

    Returns:
      A linen module. Images are float [batch, height, width, channels] of any size
      from 8x8 up and any number of channels; logits float32 [batch, num_classes].

    Raises:
      ValueError: a choice is not one of those above, or the depth does not fit.
    """
    require_choice("version", version, (1, 2))
    require_choice("variant", variant, ("paper", "keras"))
    keras = variant == "keras"
    require_choice("stem", stem, ("cifar", "imagenet"))
    imagenet = stem == "imagenet"
    if keras and (block or activation or shortcut or imagenet):
        raise ValueError(
            "variant 'keras' fixes block, activation, shortcut and stem: leave them "
            "out, or choose variant 'paper'"
        )
    block = block or default_block(version, depth, stem)
    activation = activation or ("post" if version == 1 else "pre")
    shortcut = shortcut or ("A" if version == 1 and not (keras or imagenet) else "B")
    width = width or (64 if imagenet else 16)
    require_choice("activation", activation, ("post", "pre"))
    require_choice("shortcut", shortcut, ("A", "B"))
    if width < 1:
        raise ValueError(f"width {width} is not a positive number of channels")
    return ResNet(
        block=block,
        activation=activation,
        shortcut=shortcut if residual else None,
        blocks_per_stage=blocks_per_stage(block, depth, stem),
        num_classes=num_classes,
        width=width,
        stem=stem,
        keras=keras,
        stochastic_depth=stochastic_depth,
        zero_init=zero_init,
        dtype=dtype,
        scan=scan,
        remat=remat,
    )


def in_float32(net: ResNet) -> ResNet:
    """The network, computing in float32 at least.

    For gradients in programs that `compilation` does not compile: in bfloat16, XLA for
    CPU can give NaN for them (jaxlib 0.12).
    """
    return net.clone(dtype=jnp.promote_types(jnp.float32, net.dtype))


def describe(net: ResNet) -> str:
    """A network in a few words: 'bottleneck blocks, pre-activation, shortcut B'."""
    variant = ", Keras variant" if net.keras else ""
    block = _name(net.block_class) if net.block_class else net.block
    norm = f", {_name(net.norm_class)} for BatchNorm" if net.norm_class else ""
    shortcut = f"shortcut {net.shortcut}" if net.shortcut else "no shortcuts"
    stem = ", ImageNet stem" if net.stem == "imagenet" else ""
    return (
        f"{block} blocks, {net.activation}-activation, {shortcut}{variant}{stem}{norm}"
    )


def _name(build: Callable) -> str:
    """The name of a class or function, with the arguments bound to it."""
    if not isinstance(build, partial):
        return build.__name__
    given = ", ".join(f"{name}={value!r}" for name, value in build.keywords.items())
    return f"{_name(build.func)}({given})"


def initialize(net: ResNet, key: Array, image_shape: tuple[int, int, int]) -> dict:
    """Draws a network's variables for images of shape [height, width, channels].

    Always draws them on a CPU and for the stacked blocks, whatever `net.scan` is: the
    program compiles in seconds at any depth, and the values do not depend on the
    accelerator or on `scan`.

    Returns:
      {'params': ..., 'batch_stats': ...} of float32 NumPy arrays, named as in `net`.
    """
    with _on_cpu():
        variables = jax.device_get(_init(net.clone(scan=True), key, tuple(image_shape)))
    return variables if net.scan else unstack(variables)


def _on_cpu():
    return jax.default_device(jax.local_devices(backend="cpu")[0])


@partial(
    jax.jit,
    static_argnums=(0, 2),  # compiled once for all seeds
    # Random-number code is long and runs once: compile it without optimisation.
    compiler_options={"xla_backend_optimization_level": 0},
)
def _init(net: ResNet, key: Array, image_shape: tuple[int, int, int]) -> dict:
    variables = net.init(key, jnp.zeros((1, *image_shape), net.dtype))
    return {"batch_stats": {}, **variables}  # without BatchNorm there are none


def zeros(net: ResNet, image_shape: tuple[int, int, int]) -> dict:
    """The unrolled network's variables, all zero: nothing is computed.

    They also serve as shapes, at any size: memory never written to takes no space.
    """
    stacked = net.clone(scan=True)  # traces identical blocks once
    with _on_cpu():  # as in `initialize`, which then need not trace again
        shapes = _init.eval_shape(stacked, jax.random.key(0), tuple(image_shape))
    return unstack(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes))
