"""The residual blocks, post- (2015) and pre-activation (2016), and how many of them."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from resnet_jax import layers

# Depth counts the stem, the classifier and the convolutions of the blocks' branches.
_CONVS_A_BLOCK = {"basic": 2, "bottleneck": 3}
_CIFAR_STAGES = 3
# He et al. 2015, table 1: each depth has one kind of block.
_IMAGENET = {
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}

Images = Float[Array, "batch height width channels"]
Output = Float[Array, "batch out_height out_width features"]
# What a block's branch is multiplied by, see `layers.stochastic_depth`.
BranchScale = Float[Array, ""]
# A branch's convolutions: (kernel size, features, stride) each.
Branch = tuple[tuple[int, int, int], ...]


def branch_convolutions(
    block: str, width: int, inner: int, stride: int, stem: str
) -> Branch:
    """The convolutions of a block's branch (He 2015, figure 5).

    A basic block has `width` features, a bottleneck `inner` and finally 4 * `width`.
    The first convolution has the stride; with stem 'imagenet', a bottleneck's 3x3 does.
    """
    if block == "basic":
        return (3, width, stride), (3, width, 1)
    s1, s3 = (1, stride) if stem == "imagenet" else (stride, 1)
    return (1, inner, s1), (3, inner, s3), (1, 4 * width, 1)


class FeatureMaps(nn.Module):
    """Identity; gives feature maps a module path that `attribution` can intercept."""

    def __call__(self, x: Images) -> Images:
        return x


class PostActivationBlock(nn.Module):
    """conv-BN-ReLU, ..., conv-BN, add the shortcut, ReLU (He 2015, figures 2 and 5).

    With `zero_init` the branch's last BN starts with scale 0, and the block as the
    identity (Goyal et al. 2017, arXiv 1706.02677, section 5.1). A projection has
    BatchNorm too, but not in the Keras variant (`keras`).
    """

    branch: Branch
    shortcut: str | None
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    keras: bool = False
    zero_init: bool = False

    @nn.compact
    def __call__(
        self, x: Images, train: bool, branch_scale: BranchScale | None = None
    ) -> Output:
        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            y = self.conv(features, size, stride, name=f"conv{i}")(y)
            last = i == len(self.branch)
            scale = (
                {"scale_init": nn.initializers.zeros} if last and self.zero_init else {}
            )
            y = self.norm(name=f"bn{i}", **scale)(y, use_running_average=not train)
            if not last:
                y = layers.relu(y)
        if branch_scale is not None:
            y = (y * branch_scale).astype(y.dtype)
        if self.shortcut:
            features, stride = _output(self.branch)
            if not _changes_shape(x, features, stride):
                y += x
            elif self.shortcut == "A":
                y += layers.zero_padded_shortcut(x, features, stride)
            else:
                x = self.conv(features, 1, stride, name="shortcut_conv")(x)
                if not self.keras:
                    bn = self.norm(name="shortcut_bn")
                    x = bn(x, use_running_average=not train)
                y += x
        return layers.relu(y)


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv, ..., add the shortcut (He 2016, figure 1b and appendix).

    Where the shape changes, the projection also reads the branch's first BN-ReLU, the
    parameter-free shortcut A the block's raw input. With `first_in_network`, however,
    the first BN-ReLU precedes both paths (section 4.1). In the Keras variant (`keras`)
    the projection reads the raw input, and the first block has no first BN-ReLU.

    With `zero_init` it is the branch's last convolution that starts at 0, since a ReLU
    after a BN of scale 0 passes no gradient.
    """

    branch: Branch
    shortcut: str | None
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    keras: bool = False
    first_in_network: bool = False
    zero_init: bool = False

    @nn.compact
    def __call__(
        self, x: Images, train: bool, branch_scale: BranchScale | None = None
    ) -> Output:
        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            if i > 1 or not (self.keras and self.first_in_network):
                y = self.norm(name=f"bn{i}")(y, use_running_average=not train)
                y = layers.relu(y)
            if i == 1:
                preactivation = y
                x = y if self.first_in_network else x
            last = i == len(self.branch)
            kernel = (
                {"kernel_init": nn.initializers.zeros}
                if last and self.zero_init
                else {}
            )
            y = self.conv(features, size, stride, name=f"conv{i}", **kernel)(y)
        if branch_scale is not None:
            y = (y * branch_scale).astype(y.dtype)
        if not self.shortcut:
            return y
        features, stride = _output(self.branch)
        if not _changes_shape(x, features, stride):
            return y + x
        if self.shortcut == "A":
            return y + layers.zero_padded_shortcut(x, features, stride)
        source = x if self.keras else preactivation
        return y + self.conv(features, 1, stride, name="shortcut_conv")(source)


def _output(branch: Branch) -> tuple[int, int]:
    """Features and total stride of a branch."""
    return branch[-1][1], max(stride for _, _, stride in branch)


def _changes_shape(x, features: int, stride: int) -> bool:
    return stride != 1 or x.shape[-1] != features


def require_choice(name: str, value, choices: tuple) -> None:
    """Raises a ValueError that names the choices, unless the value is one of them."""
    if value not in choices:
        raise ValueError(
            f"{name} {value!r} is not one of {', '.join(map(repr, choices))}"
        )


def default_block(version: int, depth: int, stem: str) -> str:
    """The block of a network whose config does not choose one."""
    if stem == "imagenet" and depth in _IMAGENET:
        return _IMAGENET[depth][0]
    return "basic" if version == 1 else "bottleneck"


def blocks_per_stage(block: str, depth: int, stem: str = "cifar") -> tuple[int, ...]:
    """The number of blocks in each stage of a network of this depth.

    After the 'cifar' stem there are n in each of three stages, where the depth is 6n+2
    for basic blocks, 9n+2 for bottlenecks; after 'imagenet', as in He et al. 2015,
    table 1.

    Raises:
      ValueError: the depth does not fit; the sentence gives the rule and the nearest.
    """
    require_choice("block", block, tuple(_CONVS_A_BLOCK))
    require_choice("stem", stem, ("cifar", "imagenet"))
    if stem == "imagenet":
        return _imagenet_blocks(block, depth)
    layers_per_n = _CIFAR_STAGES * _CONVS_A_BLOCK[block]
    n, remainder = divmod(depth - 2, layers_per_n)
    if n >= 1 and not remainder:
        return (n,) * _CIFAR_STAGES
    n = max(n, 1)
    below, above = (m * layers_per_n + 2 for m in (n, n + 1))
    other = ""
    if depth in _IMAGENET:
        other = f", or choose stem 'imagenet' with {_IMAGENET[depth][0]} blocks"
    raise ValueError(
        f"depth {depth} does not fit {block} blocks, whose depths are "
        f"{layers_per_n}n+2: the nearest are {below} and {above}{other}"
    )


def _imagenet_blocks(block: str, depth: int) -> tuple[int, ...]:
    if depth not in _IMAGENET:
        nearest = min(_IMAGENET, key=lambda known: abs(known - depth))
        raise ValueError(
            f"depth {depth} does not fit stem 'imagenet', whose depths are "
            f"{', '.join(map(str, _IMAGENET))}: the nearest is {nearest}"
        )
    own, blocks = _IMAGENET[depth]
    if block != own:
        raise ValueError(
            f"depth {depth} with stem 'imagenet' has {own} blocks, not {block}: leave "
            "block out, or choose another depth"
        )
    return blocks
