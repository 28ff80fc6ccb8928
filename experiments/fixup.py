"""Training deep residual networks without BatchNorm.

    python -m experiments.fixup [--scale=full]

Claim. BatchNorm is not needed to train deep residual networks, at its learning rate,
if every block begins as the identity: by Fixup (Zhang et al. 2019, arXiv 1901.09321),
or by SkipInit, one number a block (De and Smith 2020, arXiv 2002.10444).

Method. Version 1 with one of KINDS in place of BatchNorm, in equal recipes, at two
learning rates. He: a learnt offset a channel alone. SkipInit: that, and the branch is
multiplied by a learnt number, at first 0. Fixup: branches begin with kernels of 0 in
their last layers and smaller ones by the number of blocks in the others, the classifier
with 0; a learnt number is added before each layer and multiplies the branch.

Cost. Smoke: digits, width 8, ten epochs.
"""

import itertools
from functools import partial

import flax.linen as nn
import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import curves, study
from experiments.arrangements import Block, like
from experiments.study import STYLES, Study
from resnet_jax import command_line, models
from resnet_jax.blocks import Images, Output
from resnet_jax.config import build_network

KINDS = ("BatchNorm", "He", "SkipInit", "Fixup")
SCALES = {
    "smoke": {"depths": (20, 110), "learning_rates": (0.1, 0.01), "epochs": 10},
    "full": {"depths": (20, 56, 110), "learning_rates": (0.1, 0.01), "epochs": 0},
}
SEEDS = (0, 1, 2)


class Offset(nn.Module):
    """Where BatchNorm was: adds a learnt value a channel."""

    @nn.compact
    def __call__(self, x: Images, use_running_average: bool) -> Images:
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class SkipInitBlock(Block):
    """conv-offset-ReLU-conv-offset, times a number, add the shortcut, ReLU."""

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        gain = self.param("gain", nn.initializers.zeros, ())
        y = self._layers(train)("CBR" * (len(self.branch) - 1) + "CB", x)
        return nn.relu(self._resized(x, x, norm=True, train=train) + gain * y)


class FixupBlock(Block):
    """Figure 1, right, of Zhang et al.; `FixupResNet` draws the kernels."""

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        def offset(name: str):
            return self.param(name, nn.initializers.zeros, ())

        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            y = self.conv(features, size, stride, name=f"conv{i}")(
                y + offset(f"offset{i}a")
            )
            if i < len(self.branch):
                y = nn.relu(y + offset(f"offset{i}b"))
        y = y * self.param("gain", nn.initializers.ones, ()) + offset(f"offset{i}b")
        return nn.relu(self._resized(x, x, norm=False, train=train) + y)


class HeResNet(models.ResNet):
    """The standard network with `Offset` in place of BatchNorm."""

    @property
    def _norm(self):
        return Offset


class SkipInitResNet(HeResNet):
    """A network of `SkipInitBlock`s."""

    def _block(self, stage: int, first: bool):
        return partial(SkipInitBlock, *super()._block(stage, first).args)


class FixupResNet(HeResNet):
    """A network of `FixupBlock`s, initialised by section 4.1 of Zhang et al."""

    def _block(self, stage: int, first: bool):
        return partial(FixupBlock, *super()._block(stage, first).args)

    @nn.nowrap
    def init(self, *args, **kwargs) -> dict:
        """As elsewhere, times the paper's factors."""
        layers = 2 if self.block == "basic" else 3
        smaller = sum(self.blocks_per_stage) ** (-1 / (2 * layers - 2))

        def scaled(path, leaf):
            names = [part.key for part in path]
            if "classifier" in names or f"conv{layers}" in names:
                return 0 * leaf
            return smaller * leaf if names[-2].startswith("conv") else leaf

        return jax.tree_util.tree_map_with_path(scaled, super().init(*args, **kwargs))


def without_norm(kind: str, config: ConfigDict, num_classes: int) -> models.ResNet:
    """The config's network with one of KINDS."""
    networks = {"He": HeResNet, "SkipInit": SkipInitResNet, "Fixup": FixupResNet}
    net = build_network(config, num_classes)
    return like(net, networks[kind]) if kind in networks else net


def measure(config: dict, kind: str) -> dict:
    """The curves of one network."""
    none = {"train_error": [], "test_error": []}  # of a run that diverges at once
    if kind == "BatchNorm":
        return none | curves.curves(config)  # a run that other experiments share
    return none | curves.curves(config, kind, partial(without_norm, kind))


def run(study: Study) -> dict[tuple, list[dict]]:
    """The results by kind, learning rate and depth, for each seed."""
    scale, cells = SCALES[study.scale], {}
    choices = itertools.product(KINDS, scale["learning_rates"], scale["depths"])
    for kind, learning_rate, depth in choices:
        for seed in SEEDS:
            config = curves.training(study.scale, 1, depth, seed, scale["epochs"])
            config["optimizer"]["learning_rate"] = learning_rate
            found = study.cell(measure, config=config, kind=kind)
            cells.setdefault((kind, learning_rate, depth), []).append(found)
    return cells


def draw(cells: dict[tuple, list[dict]], scale: dict) -> Figure:
    """By depth: training errors at the first rate above, every last error below."""
    depths, rates = scale["depths"], scale["learning_rates"]
    figure, axes = study.figure(
        2.9 * len(depths) + 0.4, 4.4, nrows=2, ncols=len(depths), sharey="row"
    )
    for column, depth in enumerate(depths):
        curve, errors = axes[:, column]
        for place, (kind, style) in enumerate(zip(KINDS, STYLES, strict=False)):
            results = cells[kind, rates[0], depth]
            curves.plot(curve, results, "train_error", **style, label=kind)
            for rate, fill, below in zip(
                rates, (style["color"], "none"), (-0.15, 0.15), strict=True
            ):
                last = 100 * curves.last(cells[kind, rate, depth], "test_error")
                points = {"linestyle": "none", "markerfacecolor": fill}
                errors.plot(last, [place + below] * len(last), **style | points)
        curve.set(xlabel="epoch", ylim=(0, 100))
        curve.set_title(f"{depth} layers, rate {rates[0]:g}", loc="left")
        errors.set(xlabel="last test error (%)", xlim=(0, 100))
        errors.set_ylim(len(KINDS) - 0.5, -0.5)
        errors.set_yticks(range(len(KINDS)), KINDS)
        errors.set_title(f"rate {rates[0]:g} (filled), {rates[1]:g} (open)", loc="left")
    axes[0, 0].set_ylabel("training error (%)")
    axes[0, 0].legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    named = {
        f"{kind}, rate {rate:g}, {depth} layers": results
        for (kind, rate, depth), results in cells.items()
    }
    print(curves.table(named, ("train_error", "test_error")))
    own.save(draw(cells, SCALES[own.scale]))


if __name__ == "__main__":
    command_line.run(main)
