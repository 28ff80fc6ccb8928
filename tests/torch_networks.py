"""The networks again, in PyTorch and from the papers, to compare ours with."""

import re

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class PadChannels(nn.Module):
    """Option A: every second pixel, new channels of zeros around the old ones."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride, self.pad = stride, (outputs - inputs) // 2

    def forward(self, x):
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """He 2015, figure 5 left."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.shortcut = post_shortcut(inputs, planes, stride, option)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """He 2015, figure 5 right."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__()
        outputs = 4 * planes
        self.conv1, self.bn1 = conv1x1(inputs, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv1x1(planes, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = post_shortcut(inputs, outputs, stride, option)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return F.relu(out)


class StridedIn3x3(Bottleneck):
    """Torchvision's bottleneck, called version 1.5: the stride is in the 3x3."""

    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__(inputs, planes, stride, option)
        self.conv1.stride, self.conv2.stride = (1, 1), (stride, stride)


def post_shortcut(inputs: int, outputs: int, stride: int, option: str | None):
    if option is None:
        return None
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    if option == "A":
        return PadChannels(inputs, outputs, stride)
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class PreActBlock(nn.Module):
    """He 2016, figure 1b, with two 3x3 convolutions."""

    expansion = 1
    opens = False  # section 4.1: a network's first block activates before it splits

    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.option = option
        self.project = pre_shortcut(inputs, planes, stride, option)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        return add_pre_shortcut(self, out, x, activated)


class PreActBottleneck(nn.Module):
    """He 2016, appendix, as in resnet-1k-layers."""

    expansion = 4
    opens = False

    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__()
        outputs = 4 * planes
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv1x1(inputs, planes, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(planes), conv3x3(planes, planes)
        self.bn3, self.conv3 = nn.BatchNorm2d(planes), conv1x1(planes, outputs)
        self.option = option
        self.project = pre_shortcut(inputs, outputs, stride, option)

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        out = self.conv1(activated)
        out = self.conv2(F.relu(self.bn2(out)))
        out = self.conv3(F.relu(self.bn3(out)))
        return add_pre_shortcut(self, out, x, activated)


class PreActStridedIn3x3(PreActBottleneck):
    def __init__(self, inputs: int, planes: int, stride: int, option: str | None):
        super().__init__(inputs, planes, stride, option)
        self.conv1.stride, self.conv2.stride = (1, 1), (stride, stride)


def pre_shortcut(inputs: int, outputs: int, stride: int, option: str | None):
    if option is None or (stride == 1 and inputs == outputs):
        return None
    if option == "A":
        return PadChannels(inputs, outputs, stride)
    return conv1x1(inputs, outputs, stride)


def add_pre_shortcut(block, out, x, activated):
    if block.option is None:
        return out
    x = activated if block.opens else x
    if block.project is None:
        return out + x
    return out + block.project(activated if block.option == "B" else x)


class ResNet(nn.Module):
    """Three stages of n blocks; option None is the plain network."""

    def __init__(self, block, n: int, option: str | None, num_classes: int = 10):
        super().__init__()
        self.pre = issubclass(block, PreActBlock | PreActBottleneck)
        self.conv1 = conv3x3(3, 16)
        if not self.pre:
            self.bn = nn.BatchNorm2d(16)
        inputs, stages = 16, []
        for planes, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for i in range(n):
                blocks.append(block(inputs, planes, stride if i == 0 else 1, option))
                inputs = planes * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.layer1[0].opens = True
        if self.pre:
            self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        if not self.pre:
            x = F.relu(self.bn(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        if self.pre:
            x = F.relu(self.bn(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def our_name(self, name: str) -> str:
        """The path in our variables of a parameter or a statistic."""
        name = re.sub(r"^layer(\d)\.(\d+)", next_block, name)
        name = re.sub(r"^conv1", "stem_conv", name)
        name = re.sub(r"^bn\b", "final_bn" if self.pre else "stem_bn", name)
        name = name.replace("shortcut.0", "shortcut_conv")
        name = name.replace("shortcut.1", "shortcut_bn")
        name = name.replace("project", "shortcut_conv")
        return name.replace("fc", "classifier")


class ImageNetResNet(ResNet):
    """He 2015, table 1, narrower: a 7x7 convolution, max pooling and four stages."""

    def __init__(self, block, blocks: tuple[int, ...], width: int):
        super().__init__(block, 1, "B")
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        if not self.pre:
            self.bn = nn.BatchNorm2d(width)
        inputs = width
        for stage, n in enumerate(blocks):
            planes, layers = width * 2**stage, []
            for i in range(n):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(block(inputs, planes, stride, "B"))
                inputs = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.layer1[0].opens = True
        if self.pre:
            self.bn = nn.BatchNorm2d(inputs)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x):
        x = self.conv1(x)
        x = x if self.pre else F.relu(self.bn(x))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = F.relu(self.bn(x)) if self.pre else x
        return self.fc(x.mean((2, 3)))


def next_block(match: re.Match) -> str:
    return f"stage{match[1]}_block{int(match[2]) + 1}"


class SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: what is odd goes to the bottom and the right."""

    def forward(self, x):
        sides = []
        for size, k, stride in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + k - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(F.pad(x, sides))


class KerasLayer(nn.Module):
    """`resnet_layer` of the Keras example: convolution, BatchNorm and ReLU."""

    def __init__(
        self, inputs, outputs, size=3, stride=1, relu=True, bn=True, conv_first=True
    ):
        super().__init__()
        self.relu, self.conv_first = relu, conv_first
        self.conv = SameConv(inputs, outputs, size, stride=stride)
        channels = outputs if conv_first else inputs
        self.bn = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01) if bn else None

    def forward(self, x):
        x = self.conv(x) if self.conv_first else x
        x = self.bn(x) if self.bn is not None else x
        x = F.relu(x) if self.relu else x
        return x if self.conv_first else self.conv(x)


class KerasBlock(nn.Module):
    def __init__(self, branch: list[KerasLayer], shortcut: KerasLayer | None, relu):
        super().__init__()
        self.branch, self.shortcut = nn.Sequential(*branch), shortcut
        self.relu = relu

    def forward(self, x):
        out = self.branch(x) + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(out) if self.relu else out


class KerasResNet(nn.Module):
    """`resnet_v1` and `resnet_v2` of keras-team/keras, examples/cifar10_resnet.py."""

    def __init__(self, version: int, n: int, num_classes: int = 10):
        super().__init__()
        self.version = version
        self.stem = KerasLayer(3, 16)
        blocks, inputs = {}, 16
        build = self.block_v1 if version == 1 else self.block_v2
        for stage in range(3):
            for i in range(n):
                block, inputs = build(stage, i, inputs)
                blocks[f"stage{stage + 1}_block{i + 1}"] = block
        self.blocks = nn.ModuleDict(blocks)
        self.final = nn.BatchNorm2d(inputs, eps=1e-3) if version == 2 else None
        self.fc = nn.Linear(inputs, num_classes)

    def block_v1(self, stage: int, i: int, inputs: int):
        filters = 16 * 2**stage
        shrink = stage > 0 and i == 0
        stride = 2 if shrink else 1
        branch = [
            KerasLayer(inputs, filters, stride=stride),
            KerasLayer(filters, filters, relu=False),
        ]
        shortcut = (
            KerasLayer(inputs, filters, 1, stride, relu=False, bn=False)
            if shrink
            else None
        )
        return KerasBlock(branch, shortcut, relu=True), filters

    def block_v2(self, stage: int, i: int, inputs: int):
        inner, outputs = ((16, 64), (64, 128), (128, 256))[stage]
        stride = 2 if stage > 0 and i == 0 else 1
        start = stage == 0 and i == 0
        branch = [
            KerasLayer(
                inputs, inner, 1, stride, relu=not start, bn=not start, conv_first=False
            ),
            KerasLayer(inner, inner, conv_first=False),
            KerasLayer(inner, outputs, 1, conv_first=False),
        ]
        shortcut = (
            KerasLayer(inputs, outputs, 1, stride, relu=False, bn=False)
            if i == 0
            else None
        )
        return KerasBlock(branch, shortcut, relu=False), outputs

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        if self.final is not None:
            x = F.relu(self.final(x))
        return self.fc(x.mean((2, 3)))

    def our_name(self, name: str) -> str:
        """The path in our variables of a parameter or a statistic."""
        name = name.removeprefix("blocks.")
        name = re.sub(
            r"branch\.(\d)\.(conv|bn)", lambda m: f"{m[2]}{int(m[1]) + 1}", name
        )
        name = re.sub(r"^stem\.", "stem_", name).replace(
            "shortcut.conv", "shortcut_conv"
        )
        return name.replace("final", "final_bn").replace("fc", "classifier")


def our_path(net: nn.Module, name: str, tensor: torch.Tensor) -> tuple[str, ...]:
    """Where our variables hold what a PyTorch network holds under a name."""
    *module, leaf = net.our_name(name).split(".")
    if leaf.startswith("running_"):
        return ("batch_stats", *module, leaf.removeprefix("running_"))
    if leaf == "weight":
        leaf = "scale" if tensor.ndim == 1 else "kernel"
    return ("params", *module, leaf)


def our_values(net: nn.Module) -> dict[tuple[str, ...], np.ndarray]:
    """A PyTorch network's parameters and statistics, as ours hold them."""
    values = {}
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        array = tensor.detach().numpy().copy()
        if array.ndim == 4:  # [out, in, height, width]
            array = array.transpose(2, 3, 1, 0)
        elif array.ndim == 2:
            array = array.T
        path = our_path(net, name, tensor)
        assert path not in values
        values[path] = array
    return values


def load_ours(net: nn.Module, flat: dict[tuple[str, ...], np.ndarray]) -> None:
    """Copies our variables, as {path: array}; each must have its place."""
    state, used = {}, set()
    for name, tensor in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = tensor
            continue
        path = our_path(net, name, tensor)
        array = np.asarray(flat[path])
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        state[name] = torch.tensor(array.copy())
        used.add(path)
    assert used == flat.keys()
    net.load_state_dict(state)
