"""TODO."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import curves, study
from experiments.arrangements import Block, like
from experiments.study import STYLES, Study
from resnet_jax import command_line, layers, models
from resnet_jax.blocks import STAGES, Images, Output
from resnet_jax.config import build_network

SCALES = {
    "smoke": {"depths": (20, 56, 110), "epochs": 10, "learning_rate": 0.02},
    "full": {"depths": (20, 56, 110), "epochs": 0, "learning_rate": 0.1},
}
METHODS = ("BatchNorm", "nothing", "SkipInit", "Fixup")
SEEDS = (0, 1, 2)


class Bias(nn.Module):
    """Adds a learnt number; stands where a BatchNorm would."""

    @nn.compact
    def __call__(self, x: Images, use_running_average: bool = False) -> Images:
        return x + self.param("bias", nn.initializers.zeros, ())


class NormFreeBlock(Block):
    """conv-ReLU-conv, scale, add, ReLU, with a bias before each of these.

    `scale` is where the learnt number that multiplies the branch begins; None: there is
    none.
    """

    scale: float | None

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        y = x
        for i, (size, features, stride) in enumerate(self.branch, start=1):
            y = self.conv(features, size, stride, name=f"conv{i}")(Bias()(y))
            if i < len(self.branch):
                y = nn.relu(Bias()(y))
        if self.scale is not None:
            y *= self.param("scale", nn.initializers.constant(self.scale), ())
        return nn.relu(Bias()(y) + self._resized(x, x, norm=False, train=train))


class NormFreeResNet(models.ResNet):
    """A post-activation network without BatchNorm, by one of METHODS."""

    method: str

    @property
    def _norm(self):
        return Bias

    @property
    def _conv(self):
        def conv(features, size, stride, name):
            return nn.Conv(
                features,
                (size, size),
                strides=stride,
                padding=size // 2,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=self._kernel_init(name),
                conv_general_dilated=layers.convolve,
                name=name,
            )

        return conv

    def _kernel_init(self, name: str) -> Callable:
        """He's; under Fixup smaller in branches, and 0 in their last convolution."""
        convs = 2 if self.block == "basic" else 3
        if self.method != "Fixup" or not name.startswith("conv"):
            return layers.he_normal
        if name == f"conv{convs}":
            return nn.initializers.zeros
        blocks = STAGES * self.blocks_per_stage
        # The standard deviation is multiplied by blocks^(-1 / (2 convs - 2)).
        variance = 2.0 * blocks ** (-1 / (convs - 1))
        return nn.initializers.variance_scaling(variance, "fan_out", "normal")

    def _block(self, stage: int, first: bool):
        scale = {"nothing": None, "SkipInit": 0.0, "Fixup": 1.0}[self.method]
        return partial(NormFreeBlock, *super()._block(stage, first).args, scale)


def norm_free(method: str, config: ConfigDict, num_classes: int) -> models.ResNet:
    """The config's network by one of METHODS."""
    net = build_network(config, num_classes)
    return net if method == "BatchNorm" else like(net, NormFreeResNet, method=method)


def measure(config: dict, method: str) -> dict:
    """The curves of one network."""
    return curves.curves(config, method, partial(norm_free, method))


def run(study: Study) -> dict[str, dict[int, list[dict]]]:
    """The results by method and depth, for each seed."""
    scale, cells = SCALES[study.scale], {}
    for method in METHODS:
        for depth in scale["depths"]:
            results = cells.setdefault(method, {}).setdefault(depth, [])
            for seed in SEEDS:
                config = curves.training(study.scale, 1, depth, seed, scale["epochs"])
                config["optimizer"]["learning_rate"] = scale["learning_rate"]
                results.append(study.cell(measure, config=config, method=method))
    return cells


def draw(cells: dict[str, dict[int, list[dict]]]) -> Figure:
    """Training error of the deepest by epoch, and the last errors by depth."""
    figure, (panels,) = study.figure(6.8, 2.6, ncols=3)
    for (method, by_depth), style in zip(cells.items(), STYLES, strict=False):
        style = style | {"label": method}
        depths = [*by_depth]
        curves.plot(panels[0], by_depth[depths[-1]], "train_error", **style)
        for panel, name in zip(panels[1:], ("train_error", "test_error"), strict=True):
            errors = [100 * curves.last(by_depth[depth], name) for depth in depths]
            study.plot_seeds(panel, depths, list(zip(*errors, strict=True)), **style)
    panels[0].set(xlabel="epoch", ylabel="training error (%)", ylim=(0, 100))
    panels[0].set_title(f"(a) {depths[-1]} layers", loc="left")
    for panel, letter, name in zip(panels[1:], "bc", ("training", "test"), strict=True):
        panel.set(xlabel="depth", ylabel=f"last {name} error (%)", ylim=(0, 100))
        panel.set_title(f"({letter})", loc="left")
    panels[2].legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    named = {
        f"{method} {depth}": results
        for method, by_depth in cells.items()
        for depth, results in by_depth.items()
    }
    print(curves.table(named, ("train_error", "test_error")))
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
