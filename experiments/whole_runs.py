"""Whole runs: how long they take, and what takes the time.

    python -m experiments.whole_runs [--scale=full]

Claim. The longer a run, the more of its time goes into updates: what a run of seconds
spends on starting and on its report hardly counts in one of minutes.

Method. The ordinary command in a process of its own, with nothing compiled before, from
its start until it has drawn its report. 'training' and 'evaluation' are the times in
which their programs run, 'compiling' that in which the start waits for them; 'rest of
the run' is reading the data, tracing the programs, initial weights and checkpoints, and
'imports, report' what comes before and after. Full: 200 epochs of v1-20 and v2-56 on
CIFAR-10, evaluated after each, and one epoch of v2-1001, all with batch 128 in
bfloat16. Smoke: v1-20 and v2-56 by the recipe `smoke`.

Found (smoke, each run once; two cores of a shared machine): training takes 24% of the
22 seconds of v1-20 and 38% of the 40 seconds of v2-56, imports and the report 47% and
37%. At this scale the start and the report decide; runs of minutes have not been
measured.

Cost. Smoke: a minute and a half on two cores. Full: for one GPU.
"""

import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import curves, study
from experiments.study import STYLES, Study
from resnet_jax import command_line

_HALF = "--config.model.dtype=bfloat16"
# The arguments of `resnet_jax.main`, by what is drawn beside its bar.
SCALES = {
    "smoke": {
        "v1-20, digits, 20 epochs": "--config=configs/v1_20.py:smoke",
        "v2-56, digits, 20 epochs": "--config=configs/v2_56.py:smoke",
    },
    "full": {
        "v1-20, 200 epochs": f"--config=configs/v1_20.py --config.epochs=200 {_HALF}",
        "v2-1001, 1 epoch": f"--config=configs/v2_1001.py --config.epochs=1 {_HALF}",
        "v2-56, 200 epochs": f"--config=configs/v2_56.py --config.epochs=200 {_HALF}",
    },
}
PARTS = ("training", "evaluation", "compiling", "rest of the run", "imports, report")


def measure(arguments: str) -> dict:
    """Trains in a process of its own; returns its 'seconds', by part, and results."""
    command = [sys.executable, "-m", "resnet_jax.main", *shlex.split(arguments)]
    study.run_process([*command, "--help"])  # so that the packages' files are at hand
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{directory}/cache"}
        start = time.perf_counter()
        study.run_process([*command, f"--workdir={directory}/run"], env=environment)
        total = time.perf_counter() - start
        summary = json.loads(Path(directory, "run", "summary.json").read_text())
    seconds = {
        "training": summary["train_seconds"],
        "evaluation": summary["evaluation_seconds"],
        "compiling": summary["compile_seconds"],
    }
    seconds["rest of the run"] = round(summary["seconds"] - sum(seconds.values()), 1)
    seconds["imports, report"] = round(total - summary["seconds"], 1)
    kept = ("epochs", "images_per_second", "test_accuracy", "dataset")
    return {
        "seconds": seconds,
        **{name: summary[name] for name in kept},
        "mfu": summary.get("mfu"),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        **curves.made_by(summary),
    }


def run(experiment: Study) -> dict[str, dict]:
    """The measurement of each run, by its title."""
    return {
        title: experiment.cell(measure, arguments=arguments)
        for title, arguments in SCALES[experiment.scale].items()
    }


def table(runs: dict[str, dict]) -> str:
    """Seconds by part, and results, as text."""
    width = max(map(len, runs))
    heads = "".join(f"{part:>17}" for part in PARTS)
    lines = [f"{'seconds':<{width}}{heads}{'total':>9}{'images/s':>11}{'accuracy':>10}"]
    for title, found in runs.items():
        seconds = [found["seconds"][part] for part in PARTS]
        lines.append(
            f"{title:<{width}}"
            + "".join(f"{each:>17.1f}" for each in seconds)
            + f"{sum(seconds):>9.1f}{found['images_per_second']:>11,.0f}"
            + f"{found['test_accuracy']:>10.2%}"
        )
    return "\n".join(lines)


def draw(runs: dict[str, dict]) -> Figure:
    """A bar for each run, divided into PARTS."""
    figure, ((axes,),) = study.figure(5.0, 1.1 + 0.35 * len(runs))
    places, left = np.arange(len(runs)), np.zeros(len(runs))
    for part, style in zip(PARTS, STYLES, strict=True):
        seconds = np.array([found["seconds"][part] for found in runs.values()])
        axes.barh(places, seconds, 0.6, left, color=style["color"], label=part)
        left += seconds
    axes.set_yticks(places, list(runs))
    axes.invert_yaxis()
    axes.set(xlabel="seconds")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def main(argv: list[str]) -> None:
    """Trains what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    runs = run(experiment)
    print(table(runs))
    experiment.save(draw(runs))


if __name__ == "__main__":
    command_line.run(main)
