"""TODO."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from experiments import curves, study
from experiments.arrangements import Block, like
from experiments.study import STYLES, Study
from resnet_jax import command_line, models
from resnet_jax.blocks import STAGES, Images, Output
from resnet_jax.config import build_network

SCALES = {
    "smoke": {"depth": 56, "epochs": 100, "train_split": "train[:300]"},
    "full": {"depth": 110, "epochs": 500, "train_split": "train"},
}
# Of the last block; 1 is the ordinary network.
SURVIVALS = (1.0, 0.8, 0.5)
SEEDS = (0, 1, 2)


class StochasticBlock(Block):
    """A post-activation block whose branch is there with a probability, `survival`.

    In training a draw for the whole batch keeps it or leaves it out; afterwards it is
    multiplied by the probability. (Here what is left out is computed all the same, and
    counts for the statistics of its BatchNorms.)
    """

    survival: float

    @nn.compact
    def __call__(self, x: Images, train: bool) -> Output:
        branch = "CBR" * (len(self.branch) - 1) + "CB"
        y = self._layers(train)(branch, x)
        shortcut = self._resized(x, x, norm=True, train=train)
        if train:
            y *= jax.random.bernoulli(self.make_rng("dropout"), self.survival)
        else:
            y *= self.survival
        return nn.relu(shortcut + y)


def survival(number: int, blocks: int, last: float) -> float:
    """Of block `number`, counted from 1: falls linearly to that of the last one."""
    return 1 - number / blocks * (1 - last)


class StochasticResNet(models.ResNet):
    """A network of `StochasticBlock`s, outside loops, since no two are alike."""

    last_survival: float

    def _block(self, stage: int, first: bool) -> Callable[..., nn.Module]:
        arguments, n = super()._block(stage, first).args, self.blocks_per_stage

        def build(name: str) -> StochasticBlock:
            # Where variables are drawn, equal blocks are in a loop, without a number.
            number = name.partition("_block")[2].replace("s", str(n))
            place = stage * n + int(number)
            chance = survival(place, STAGES * n, self.last_survival)
            return StochasticBlock(*arguments, chance, name=name)

        return build


def stochastic(
    last_survival: float, config: ConfigDict, num_classes: int
) -> models.ResNet:
    """The config's network, with stochastic depth."""
    net = build_network(config, num_classes)
    return like(net, StochasticResNet, last_survival=last_survival, scan=False)


def measure(config: dict, survival: float) -> dict:
    """The curves of one network."""
    build = partial(stochastic, survival)
    return curves.curves(config, f"survival {survival}", build)


def run(study: Study) -> dict[str, list[dict]]:
    """The results by the last block's survival, for each seed."""
    scale, cells = SCALES[study.scale], {}
    for last in SURVIVALS:
        cells[f"survival {last:g}"] = []
        for seed in SEEDS:
            config = curves.training(
                study.scale, 1, scale["depth"], seed, scale["epochs"]
            )
            config["dataset"]["train_split"] = scale["train_split"]
            result = study.cell(measure, config=config, survival=last)
            cells[f"survival {last:g}"].append(result)
    return cells


def draw(cells: dict[str, list[dict]]) -> Figure:
    """Training and test error by epoch."""
    figure, (panels,) = study.figure(6.0, 2.6, ncols=2)
    for (name, results), style in zip(cells.items(), STYLES, strict=False):
        curves.plot(panels[0], results, "train_error", **style | {"label": name})
        curves.plot(panels[1], results, "test_error", **style | {"label": name})
    for panel, name in zip(panels, ("training error", "test error"), strict=True):
        panel.set(xlabel="epoch", ylabel=f"{name} (%)", yscale="log")
    panels[0].legend()
    return figure


def main(argv: list[str]) -> None:
    """Trains what is not trained yet, and draws the figure."""
    own = Study.of(argv, __doc__)
    cells = run(own)
    print(curves.table(cells, ("train_error", "test_error")))
    own.save(draw(cells))


if __name__ == "__main__":
    command_line.run(main)
