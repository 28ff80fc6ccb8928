"""Accuracy in ten minutes: recipe `fast`, a PyTorch script, the Keras example's recipe.

    python -m experiments.minutes [--scale=full]

Claim. On two CPU cores, ten minutes of `fast` beat ten minutes of a plain PyTorch
script and of the Keras example's recipe by at least five points.

Method. Version 1, 20 layers, CIFAR-10, each contender alone in processes of its own.
The clock starts with the process, imports and compilation included. `fast` is the
ordinary command, with as many steps as fit; a shorter run beforehand, which does not
count, measures how long a step takes, and leaves its compiled programs in JAX's cache.
Everything the command does counts, evaluation and report included. The others stop when
the time is up, before their evaluation. PyTorch: SGD, rate 0.1, batch 128, crops and
flips, normalised by channel, as in akamaster/pytorch_resnet_cifar10; Keras on
TensorFlow: the recipe of its example cifar10_resnet.py (Adam, rate 0.001, batch 32,
shifts and flips, He's initialisation) on the same network as the others: shortcuts have
no parameters, and BatchNorm has momentum 0.9. Their learning-rate drops, which are
meant for 200 epochs, come at the same fractions of the ten minutes. They need `pip
install -r requirements-bench.txt`.

Found (smoke, one seed, on a JPEG-compressed copy of CIFAR-10). `fast` reached 82.8%
after 510 seconds and 357,376 images, the PyTorch script 72.0% after 259,728 images and
the Keras example's recipe 71.4% after 206,208, both in 600 seconds: 701, 433 and 344
images per second. The shorter run had been slow, so that `fast` left 90 seconds unused;
in an earlier measurement it took 573 and reached 83.6%. Small images speed `fast` up;
how much of the gain is due to them, and how much to the rest of the recipe, was not
measured.

Cost. Smoke: one seed, half an hour. Full: three seeds.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import study
from experiments.peers import CONTENDERS as PEERS
from experiments.peers import report, require
from experiments.study import STYLES, Study
from resnet_jax import command_line, provenance, workdir

SCALES = {
    "smoke": {"minutes": 10.0, "seeds": (0,)},
    "full": {"minutes": 10.0, "seeds": (0, 1, 2)},
}
CONTENDERS = ("fast", "torch", "keras")
_TITLES = {
    "fast": "ours, fast",
    "torch": "PyTorch script",
    "keras": "Keras example's recipe",
}
# The share of the time to fill, so that a slow moment does not make `fast` exceed it.
_MARGIN = 0.95


def measure(contender: str, minutes: float, seed: int, **settings) -> dict:
    """The test accuracy, and the seconds and images that it took.

    Args:
      contender: one of CONTENDERS.
      minutes: the time that it may take.
      seed: of its weights and batches.
      **settings: more of the config, such as {'dataset.name': 'digits'}.
    """
    with tempfile.TemporaryDirectory() as directory:
        if contender == "fast":
            return _fast(minutes, seed, settings, Path(directory))
        command = [sys.executable, "-m", "experiments.peers.timed", contender]
        command += [str(time.time()), str(60 * minutes), str(seed)]
        command.append(json.dumps(settings))
        result = json.loads(study.run_process(command).splitlines()[-1])
        versions = provenance.versions_and_commit()["versions"] | report.peer_versions()
        return result | {"made_by": {"versions": versions}}


def _fast(minutes: float, seed: int, settings: dict, directory: Path) -> dict:
    # The same share of each image size, and enough steps to time them.
    probe = _trained(seed, settings, 200, directory / "probe")
    a_step = probe["training"] / 200
    steps = max(1, math.floor((60 * minutes * _MARGIN - probe["overhead"]) / a_step))
    result = _trained(seed, settings, steps, directory / "run")
    return {name: result[name] for name in ("accuracy", "seconds", "images")}


def _trained(seed: int, settings: dict, steps: int, directory: Path) -> dict:
    """Runs the command, and returns the time that it and its updates took."""
    command = [sys.executable, "-m", "resnet_jax.main"]
    command += ["--config=configs/v1_20.py:fast", f"--workdir={directory}"]
    settings = settings | {"seed": seed, "steps": steps, "eval_every": 10**6}
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    start = time.perf_counter()
    study.run_process(command, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    summary = workdir.read_summary(directory)
    images = summary["steps"] * workdir.read_config(directory).batch_size
    training = images / summary["images_per_second"]
    return {
        "accuracy": summary["test_accuracy"],
        "seconds": round(seconds, 1),
        "images": images,
        "training": training,
        "overhead": seconds - training,
    }


def run(experiment: Study) -> dict[str, list[dict]]:
    """The results of each contender, by seed."""
    scale = SCALES[experiment.scale]
    return {
        contender: [
            experiment.cell(
                measure, contender=contender, minutes=scale["minutes"], seed=seed
            )
            for seed in scale["seeds"]
        ]
        for contender in CONTENDERS
    }


def table(cells: dict[str, list[dict]]) -> str:
    """Medians over seeds, as text."""
    lines = [f"{'':<24}{'accuracy':>9}{'images':>9}{'seconds':>9}"]
    for contender, results in cells.items():
        accuracy, images, seconds = (
            np.median([result[name] for result in results])
            for name in ("accuracy", "images", "seconds")
        )
        lines.append(
            f"{_TITLES[contender]:<24}{accuracy:>9.2%}{images:>9,.0f}{seconds:>9.0f}"
        )
    return "\n".join(lines)


def draw(cells: dict[str, list[dict]], minutes: float) -> Figure:
    """A bar for each contender; where there are several seeds, a point for each."""
    figure, axes = study.figure(3.2, 2.4)
    for place, (results, style) in enumerate(zip(cells.values(), STYLES, strict=False)):
        values = [100 * result["accuracy"] for result in results]
        bar = axes[0, 0].bar(place, np.median(values), 0.6, color=style["color"])
        axes[0, 0].bar_label(bar, fmt="%.1f", padding=3)
        if len(values) > 1:
            axes[0, 0].plot([place] * len(values), values, "o", color="0.6")
    titles = [_TITLES[name].replace(" ", "\n", 1) for name in cells]
    axes[0, 0].set_xticks(range(len(cells)), titles)
    axes[0, 0].set(ylabel=f"test accuracy after {minutes:g} minutes (%)", ylim=(0, 100))
    axes[0, 0].grid(axis="x", visible=False)
    return figure


def main(argv: list[str]) -> None:
    """Measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    if not experiment.redraw:
        require(*PEERS["torch"].packages, *PEERS["keras_tensorflow"].packages)
    cells = run(experiment)
    print(table(cells))
    experiment.save(draw(cells, SCALES[experiment.scale]["minutes"]))


if __name__ == "__main__":
    command_line.run(main)
