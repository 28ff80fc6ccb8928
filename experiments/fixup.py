"""Training deep residual networks without BatchNorm.

    python -m experiments.fixup [--scale=full]

Claim. Deep residual networks can be trained without BatchNorm, at its learning rate, if
every block begins as the identity: by Fixup (Zhang et al. 2019, arXiv 1901.09321), or
by SkipInit, one scalar per block (De and Smith 2020, arXiv 2002.10444).

Method. Version 1 with one of KINDS in place of BatchNorm, all with the same recipe. No
norm: only a learnt offset for each channel ('He' in the stored cells). SkipInit: also a
learnt scalar, initially 0, that multiplies the branch. Fixup: each branch's last kernel
and the classifier begin at 0, and a branch's other kernels are divided by the square
root of the number of blocks; a learnt scalar is added before and after each
convolution, and one multiplies the branch.

Cost. Smoke: digits, width 8, 15 epochs at rate 0.1; four minutes from scratch on two
cores of a shared x86 machine. Full: CIFAR-10, the paper's recipe at rates 0.1 and 0.01,
72 runs.

Found (smoke; medians of seeds 0, 1, 2, ranges in brackets; percent):
- 56 layers that merely leave BatchNorm out diverge within ten updates, in every seed.
  With SkipInit they train to a training error of 5.0 (4.2-8.0) and a test error of 6.1
  (3.3-7.2), with Fixup to 4.1 (4.0-12.9) and 5.8 (4.2-8.6).
- 20 layers can train with neither, to training errors of 7.7 and 12, but in one of
  three seeds they end at chance. (In an earlier measurement of the same seeds none
  did.) SkipInit has 6.3 (4.2-24.9) and 6.4 (4.4-14.7), Fixup 7.1 (6.9-10.3) and 6.4
  (4.4-6.9).
- So both do what they are made for, which is to make depth trainable, and the ranges do
  not show which does it better. BatchNorm does more: training errors of 0.9 and 1.9,
  and 10 to 32 in the fourth epoch, where theirs are still 77 to 83.
"""

import dataclasses
import itertools
from functools import partial

import flax.linen as nn
import jax
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from experiments import curves, study
from experiments.arrangements import Block
from experiments.study import STYLES, Study
from resnet_jax import command_line, models
from resnet_jax.blocks import Images, Output
from resnet_jax.config import build_network

KINDS = ("BatchNorm", "He", "SkipInit", "Fixup")
LABELS = {"He": "no norm,\noffset only"}  # where a kind's name does not say it
SCALES = {
    "smoke": {"depths": (20, 56), "learning_rates": (0.1,), "epochs": 15},
    "full": {"depths": (20, 56, 110), "learning_rates": (0.1, 0.01), "epochs": 0},
}


class Offset(nn.Module):
    """Takes the place of BatchNorm: adds a learnt value per channel."""

    @nn.compact
    def __call__(self, x: Images, use_running_average: bool) -> Images:
        return x + self.param("bias", nn.initializers.zeros, x.shape[-1:])


class SkipInitBlock(Block):
    """conv-offset-ReLU-conv-offset, times a learnt scalar, plus the shortcut, ReLU."""

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        gain = self.param("gain", nn.initializers.zeros, (1,))
        y = self._layers(train)("CBR" * (len(self.branch) - 1) + "CB", x)
        return nn.relu(self._resized(x, x, norm=True, train=train) + gain * y)


class FixupBlock(Block):
    """Figure 1, right, of Zhang et al.; `FixupResNet` initialises the kernels.

    Its scalars get a tenth of the learning rate, as in the authors' code, where they
    also get a tenth of the weight decay.
    """

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        def number(name: str, start: float = 0.0):
            # Scaling the parameter by sqrt(0.1) scales gradient descent's steps by 0.1.
            factor = 0.1**0.5
            initial = nn.initializers.constant(start / factor)
            return factor * self.param(name, initial, (1,))

        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            conv = self.conv(features, size, stride, name=f"conv{i}")
            y = conv(y + number(f"offset{i}a"))
            if i == len(self.branch):
                y *= number("gain", 1.0)
            y += number(f"offset{i}b")
            if i < len(self.branch):
                y = nn.relu(y)
        return nn.relu(self._resized(x, x, norm=False, train=train) + y)


class FixupResNet(models.ResNet):
    """A network initialised as in section 4.1 of Zhang et al."""

    @nn.nowrap
    def init(self, *args, **kwargs) -> dict:
        """Initialises like the standard network, times the paper's factors."""
        layers = 2 if self.block == "basic" else 3
        smaller = sum(self.blocks_per_stage) ** (-1 / (2 * layers - 2))

        def scaled(path, leaf):
            names = [part.key for part in path]
            if "classifier" in names or f"conv{layers}" in names:
                return 0 * leaf
            return smaller * leaf if names[-2].startswith("conv") else leaf

        return jax.tree.map_with_path(scaled, super().init(*args, **kwargs))


def without_norm(kind: str, config: ConfigDict, num_classes: int) -> models.ResNet:
    """The config's network with one of KINDS in place of BatchNorm."""
    net = build_network(config, num_classes)
    blocks = {"He": None, "SkipInit": SkipInitBlock, "Fixup": FixupBlock}
    net = net.clone(norm_class=Offset, block_class=blocks[kind])
    if kind != "Fixup":
        return net
    names = {field.name for field in dataclasses.fields(net)} - {"parent", "name"}
    return FixupResNet(**{name: getattr(net, name) for name in names})


def measure(config: dict, kind: str) -> dict:
    """The curves of one network."""
    if kind == "BatchNorm":
        return curves.curves(config)  # a run that other experiments share
    return curves.curves(config, kind, partial(without_norm, kind))


def run(experiment: Study) -> dict[tuple, list[dict]]:
    """The results by kind, learning rate and depth, for each seed."""
    scale, cells = SCALES[experiment.scale], {}
    choices = itertools.product(KINDS, scale["learning_rates"], scale["depths"])
    for kind, learning_rate, depth in choices:
        config = curves.run_config(experiment.scale, 1, depth, scale["epochs"])
        config["optimizer"]["learning_rate"] = learning_rate
        results = experiment.seeds(measure, config, kind=kind)
        cells[kind, learning_rate, depth] = results
    return cells


def draw(cells: dict[tuple, list[dict]], scale: dict) -> Figure:
    """By depth: training errors at the first rate above, every final error below."""
    depths, rates = scale["depths"], scale["learning_rates"]
    figure, axes = study.figure(
        2.9 * len(depths) + 0.4, 4.4, nrows=2, ncols=len(depths), sharey="row"
    )
    for column, depth in enumerate(depths):
        curve, errors = axes[:, column]
        epochs = max(
            len(result.get("train_error", []))
            for kind in KINDS
            for result in cells[kind, rates[0], depth]
        )
        for place, (kind, style) in enumerate(zip(KINDS, STYLES, strict=False)):
            results = cells[kind, rates[0], depth]
            style = style | {"label": LABELS.get(kind, kind)}
            curves.plot(curve, results, "train_error", epochs=epochs, **style)
            fills = (style["color"], "none")
            for below, (rate, fill) in enumerate(zip(rates, fills, strict=False)):
                last = 100 * curves.last(cells[kind, rate, depth], "test_error")
                points = style | {"markerfacecolor": fill}
                study.plot_points(errors, place + 0.4 * below, last, **points)
        failed = [
            LABELS.get(kind, kind).partition(",")[0]
            for kind in KINDS
            if all("diverged" in result for result in cells[kind, rates[0], depth])
        ]
        told = f" ({', '.join(failed)}: diverged, drawn at chance)" if failed else ""
        curve.set(xlabel=f"epoch{told}", ylim=(0, 100))
        curve.xaxis.set_major_locator(MaxNLocator(integer=True))
        curve.set_title(f"{depth} layers, rate {rates[0]:g}", loc="left")
        curves.percent_axis(errors, "x")
        errors.set(xlabel="final test error (%)")
        study.name_rows(errors, [LABELS.get(kind, kind) for kind in KINDS])
        marks = zip(rates, ("filled", "open"), strict=False)
        shown = ", ".join(f"rate {rate:g} {mark}" for rate, mark in marks)
        shown = shown if len(rates) > 1 else f"rate {rates[0]:g}"
        errors.set_title(f"{depth} layers, {shown}", loc="left")
    axes[0, 0].set_ylabel("training error (%)")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(KINDS))
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    cells = run(experiment)
    named = {
        f"{kind}, rate {rate:g}, {depth} layers": results
        for (kind, rate, depth), results in cells.items()
    }
    print(curves.table(named, ("train_error", "test_error")))
    experiment.save(draw(cells, SCALES[experiment.scale]))


if __name__ == "__main__":
    command_line.run(main)
