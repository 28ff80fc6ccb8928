"""Other residual blocks of He et al. 2016 (arXiv 1603.05027): orders and shortcuts.

They take the place of the blocks of `resnet_jax.blocks` in an otherwise identical
network, and their layers have the same names.
"""

import itertools
from collections.abc import Callable
from functools import partial

import flax.linen as nn
from ml_collections import ConfigDict

from resnet_jax import layers, models
from resnet_jax.blocks import Branch, Images, Output
from resnet_jax.config import build_network
from resnet_jax.convolution import convolve

# Figure 4. Each convolution of a branch but the last, the last, and what follows the
# addition; C is a convolution, B a BatchNorm, R a ReLU.
ORDERS = {
    "original": ("CBR", "CB", "R"),
    "BN after addition": ("CBR", "C", "BR"),
    "ReLU before addition": ("CBR", "CBR", ""),
    "ReLU-only pre-activation": ("RCB", "RCB", ""),
    "full pre-activation": ("BRC", "BRC", ""),
}
# Table 1: what is done to the shortcut and the branch of every block.
SHORTCUTS = {
    "identity": ("constant", 1.0, 1.0),
    "none (plain)": ("constant", 0.0, 1.0),
    "shortcut x 0.5": ("constant", 0.5, 1.0),
    "both x 0.5": ("constant", 0.5, 0.5),
    "exclusive gate, bias -6": ("exclusive gate", -6.0),
    "shortcut gate, bias 0": ("shortcut gate", 0.0),
    "shortcut gate, bias -6": ("shortcut gate", -6.0),
    "1x1 convolution": ("convolution",),
    "dropout 0.5": ("dropout", 0.5),
}


class Block(nn.Module):
    """The common part of these blocks: the fields of the standard ones, and layers."""

    branch: Branch
    shortcut: str | None
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def _layers(self, train: bool) -> Callable[[str, Images], Images]:
        """Builds run(letters, x); the numbering of layers continues across calls."""
        convs, norms = enumerate(self.branch, start=1), itertools.count(1)

        def run(letters: str, x: Images) -> Images:
            for letter in letters:
                if letter == "R":
                    x = nn.relu(x)
                elif letter == "B":
                    bn = self.norm(name=f"bn{next(norms)}")
                    x = bn(x, use_running_average=not train)
                else:
                    i, (size, features, stride) = next(convs)
                    x = self.conv(features, size, stride, name=f"conv{i}")(x)
            return x

        return run

    def _resized(self, x: Images, read: Images, norm: bool, train: bool) -> Images:
        """The shortcut as the standard blocks have it; a projection gets `read`."""
        features = self.branch[-1][1]
        stride = max(stride for _, _, stride in self.branch)
        if stride == 1 and features == x.shape[-1]:
            return x
        if self.shortcut == "A":
            return layers.zero_padded_shortcut(x, features, stride)
        x = self.conv(features, 1, stride, name="shortcut_conv")(read)
        bn = self.norm(name="shortcut_bn") if norm else None
        return bn(x, use_running_average=not train) if norm else x


class OrderedBlock(Block):
    """A block in one of ORDERS.

    A projection reads what the first convolution reads, and has a BatchNorm if the last
    convolution has. The network's first block activates what both its paths
    read, and its last block activates its output if no other layer does (section 4.1).
    """

    order: str
    last_block: str

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        run = self._layers(train)
        each, last, after = ORDERS[self.order]
        before, _, rest = (each * (len(self.branch) - 1) + last).partition("C")
        read = run(before, x)
        y = run("C" + rest, read)
        x = read if self.name == "stage1_block1" else x
        y += self._resized(x, read, norm="B" in last.partition("C")[2], train=train)
        if self.order == "ReLU-only pre-activation" and self.name == self.last_block:
            after = "R"
        return run(after, y)


class ShortcutBlock(Block):
    """The original block with one of SHORTCUTS, also where the shape changes.

    A gate g is the sigmoid of a 1x1 convolution of what the block reads: it scales the
    shortcut by 1 - g and, if it is 'exclusive', the branch by g.
    """

    kind: tuple

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        branch = "CBR" * (len(self.branch) - 1) + "CB"
        y = self._layers(train)(branch, x)
        features, stride = y.shape[-1], x.shape[1] // y.shape[1]
        name, *numbers = self.kind
        if name == "convolution":
            x = self.conv(features, 1, stride, name="shortcut_conv")(x)
            bn = self.norm(name="shortcut_bn")
            return nn.relu(bn(x, use_running_average=not train) + y)
        shortcut = self._resized(x, x, norm=True, train=train)
        if name == "constant":
            shortcut, y = numbers[0] * shortcut, numbers[1] * y
        elif name == "dropout":
            shortcut = nn.Dropout(numbers[0], deterministic=not train)(shortcut)
        else:
            gate = nn.Conv(
                features,
                (1, 1),
                strides=stride,
                kernel_init=layers.he_normal,
                bias_init=nn.initializers.constant(numbers[0]),
                conv_general_dilated=convolve,
                name="gate",
            )(x)
            gate = nn.sigmoid(gate)
            shortcut, y = (1 - gate) * shortcut, gate * y if "excl" in name else y
        return nn.relu(shortcut + y)


def of_order(net: models.ResNet, order: str) -> models.ResNet:
    """The network with `OrderedBlock`s of one of ORDERS."""
    stages = net.blocks_per_stage
    last_block = f"stage{len(stages)}_block{stages[-1]}"
    # In a loop no block would know that it is the last one.
    loops = net.scan and order != "ReLU-only pre-activation"
    block = partial(OrderedBlock, order=order, last_block=last_block)
    return net.clone(block_class=block, activation="post", scan=loops)


def ordered(order: str, config: ConfigDict, num_classes: int) -> models.ResNet:
    """The config's network in one of ORDERS, by the least change to it."""
    net = build_network(config, num_classes)
    if order == "full pre-activation":
        return net.clone(activation="pre")
    return of_order(net, order)


def of_shortcut(net: models.ResNet, kind: tuple) -> models.ResNet:
    """The network with `ShortcutBlock`s of a kind, as SHORTCUTS has them."""
    return net.clone(block_class=partial(ShortcutBlock, kind=kind))


def with_shortcut(kind: str, config: ConfigDict, num_classes: int) -> models.ResNet:
    """The config's network with one of SHORTCUTS."""
    return of_shortcut(build_network(config, num_classes), SHORTCUTS[kind])
