"""The same networks in PyTorch, trained as in its tutorials.

https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html, and for the
settings https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html. Layers
have the names of akamaster/pytorch_resnet_cifar10, as in `resnet_jax.pytorch`.
"""

import contextlib
import os
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from experiments.peers import PROBES, Task, process_memory


def _conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class PadChannels(nn.Module):
    """Option A of He et al. 2015: every second pixel, and new channels of zeros."""

    def __init__(self, new: int):
        super().__init__()
        self.side = new // 2

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.side, self.side))


class Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else PadChannels(width - inputs)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), _conv(inputs, width, 1, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        self.bn3, self.conv3 = nn.BatchNorm2d(width), _conv(width, 4 * width, 1)
        self.shortcut = None
        if inputs != 4 * width:
            self.shortcut = nn.Sequential(_conv(inputs, 4 * width, 1, stride))

    def forward(self, x):
        activated = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + (self.shortcut(activated) if self.shortcut else x)


class ResNet(nn.Module):
    def __init__(self, version: int, depth: int, num_classes: int = 10):
        super().__init__()
        block, layers, factor = ((Basic, 6, 1), (Bottleneck, 9, 4))[version - 1]
        self.conv1 = _conv(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16) if version == 1 else None
        channels, stages = 16, []
        for width in (16, 32, 64):
            blocks = []
            for b in range((depth - 2) // layers):
                blocks.append(block(channels, width, 2 if width > 16 and b == 0 else 1))
                channels = factor * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.bn = nn.BatchNorm2d(channels) if version == 2 else None
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if self.bn1 else x
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn(x)) if self.bn else x
        return self.linear(x.mean((2, 3)))


class Augmented(torch.utils.data.Dataset):
    """Images padded by 4, cropped back and flipped: float32 [3, 32, 32]."""

    def __init__(self, task: Task):
        images = torch.from_numpy(task.images("train")).permute(0, 3, 1, 2)
        self._padded = F.pad(images, (4, 4, 4, 4))
        self._size = images.shape[-2:]
        self._labels = torch.from_numpy(task.labels("train")).long()

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, row):
        (height, width), (top, left) = self._size, torch.randint(9, (2,)).tolist()
        image = self._padded[row, :, top : top + height, left : left + width]
        return image.flip(2) if torch.rand(()) < 0.5 else image, self._labels[row]


def loader(task: Task) -> torch.utils.data.DataLoader:
    """Shuffled, augmented batches, from a worker process for each core."""
    return torch.utils.data.DataLoader(
        Augmented(task),
        task.batch_size,
        shuffle=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        pin_memory=torch.cuda.is_available(),
    )


class Torch:
    def __init__(
        self,
        task: Task,
        channels_last: bool = False,
        bf16: bool = False,
        compiled: bool = False,
    ):
        self._task, self._loader = task, loader(task)
        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        torch.backends.cudnn.benchmark = True
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._layout = {"memory_format": layout}
        self._bf16 = bf16
        self._net = ResNet(task.version, task.depth)
        self._load()
        self._net.to(self._device, **self._layout)
        self._run = self._net
        if compiled:
            mode = "reduce-overhead" if cuda else "default"
            self._run = torch.compile(self._net, mode=mode)
        self._optimizer = torch.optim.SGD(
            self._net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=True
        )
        self._ready = {
            split: self._batches(task.images(split), task.labels(split))
            for split in ("train", "eval")
        }

    def _load(self) -> None:
        state = self._task.weights("torch")
        self._net.load_state_dict(
            {name: torch.from_numpy(array) for name, array in state.items()}
        )

    def _batches(self, images: np.ndarray, labels: np.ndarray) -> list:
        images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        pairs = zip(
            images.split(self._task.batch_size),
            torch.from_numpy(labels).long().split(self._task.batch_size),
            strict=True,
        )
        return [self._place(*pair) for pair in pairs]

    def _place(self, images, labels) -> tuple:
        to = {"device": self._device, "non_blocking": True}
        return images.to(**to, **self._layout), labels.to(**to)

    def _autocast(self):
        if not self._bf16:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def _train(self, batches: Iterable) -> None:
        self._net.train()
        for batch in batches:
            images, labels = self._place(*batch)
            self._optimizer.zero_grad()
            with self._autocast():
                loss = F.cross_entropy(self._run(images), labels)
            loss.backward()
            self._optimizer.step()
        loss.item()

    def first_step(self) -> None:
        self._train(self._ready["train"][:1])

    def in_memory(self) -> None:
        self._train(self._ready["train"])

    def epoch(self) -> None:
        self._train(self._loader)

    @torch.no_grad()
    def evaluate(self) -> float:
        self._net.eval()
        correct = 0
        for images, labels in self._ready["eval"]:
            with self._autocast():
                correct += (self._run(images).argmax(1) == labels).sum()
        return correct.item() / len(self._task.labels("eval"))

    @torch.no_grad()
    def logits(self) -> list:
        self._load()
        self._net.eval()
        with self._autocast():
            return self._run(self._ready["eval"][0][0])[:PROBES].float().tolist()

    def peak_memory(self) -> int:
        """The peak without the loader's workers."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return process_memory()
