"""The residual blocks, post- (2015) and pre-activation (2016), and how many of them."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from resnet_jax import layers

STAGES = 3
# Depth counts the stem, the classifier and the convolutions of the blocks' branches.
_CONVS_A_BLOCK = {"basic": 2, "bottleneck": 3}

Images = Float[Array, "batch height width channels"]
Output = Float[Array, "batch out_height out_width features"]
# A branch's convolutions: (kernel size, features, stride) each.
Branch = tuple[tuple[int, int, int], ...]


class PostActivationBlock(nn.Module):
    """conv-BN-ReLU, ..., conv-BN, add the shortcut, ReLU (He 2015, figures 2 and 5)."""

    branch: Branch
    shortcut: str | None
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    projection_norm: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            y = self.conv(features, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, use_running_average=not train)
            if i < len(self.branch):
                y = nn.relu(y)
        if self.shortcut:
            features, stride = _output(self.branch)
            if not _changes_shape(x, features, stride):
                y += x
            elif self.shortcut == "A":
                y += layers.zero_padded_shortcut(x, features, stride)
            else:
                x = self.conv(features, 1, stride, name="shortcut_conv")(x)
                if self.projection_norm:
                    bn = self.norm(name="shortcut_bn")
                    x = bn(x, use_running_average=not train)
                y += x
        return nn.relu(y)


class PreActivationBlock(nn.Module):
    """BN-ReLU-conv, ..., add the shortcut (He 2016, figure 1b and appendix).

    Where the shape changes, the projection reads the branch's first BN-ReLU too
    (`shared_preactivation`) or, in the Keras variant, the block's raw input. The
    parameter-free shortcut A always reads the raw input.
    """

    branch: Branch
    shortcut: str | None
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    first_preactivation: bool = True
    shared_preactivation: bool = True

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            if i > 1 or self.first_preactivation:
                y = self.norm(name=f"bn{i}")(y, use_running_average=not train)
                y = nn.relu(y)
            if i == 1:
                preactivation = y
            y = self.conv(features, size, stride, name=f"conv{i}")(y)
        if not self.shortcut:
            return y
        features, stride = _output(self.branch)
        if not _changes_shape(x, features, stride):
            return y + x
        if self.shortcut == "A":
            return y + layers.zero_padded_shortcut(x, features, stride)
        source = preactivation if self.shared_preactivation else x
        return y + self.conv(features, 1, stride, name="shortcut_conv")(source)


def _output(branch: Branch) -> tuple[int, int]:
    """Features and total stride of a branch."""
    return branch[-1][1], max(stride for _, _, stride in branch)


def _changes_shape(x, features: int, stride: int) -> bool:
    return stride != 1 or x.shape[-1] != features


def require_choice(name: str, value, choices: tuple) -> None:
    """Raises a ValueError that names them, unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name} {value!r} is not one of {', '.join(map(repr, choices))}"
        )


def blocks_per_stage(block: str, depth: int) -> int:
    """The n of the depth rules: 6n+2 for basic blocks, 9n+2 for bottlenecks.

    Raises:
      ValueError: no n fits; the sentence gives the rule and the nearest depths.
    """
    require_choice("block", block, tuple(_CONVS_A_BLOCK))
    layers_per_n = STAGES * _CONVS_A_BLOCK[block]
    n, remainder = divmod(depth - 2, layers_per_n)
    if n >= 1 and not remainder:
        return n
    n = max(n, 1)
    below, above = (m * layers_per_n + 2 for m in (n, n + 1))
    raise ValueError(
        f"depth {depth} does not fit {block} blocks, whose depths are "
        f"{layers_per_n}n+2: the nearest are {below} and {above}"
    )
