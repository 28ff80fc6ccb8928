"""Time to the first update: with nothing compiled, and the second time.

    python -m experiments.startup [--scale=full]

Claim. On two CPU cores the first update of 56 layers on digits is done within 12
seconds of starting the command, and within 6 if the same command has run before.

Method. The ordinary command with `--config.steps=1` in a process of its own, from its
start until it prints the line of its only epoch: imports, data, weights, compilation,
one update, and the evaluation of the test split. The first time it has an empty
compilation cache, the second what the first left there; such pairs are run five times.
One command before these, which does not count, makes sure that the packages' files have
been read.

Found (smoke; medians of five, ranges in brackets; two cores of a shared x86 machine):
- All five runs meet both: 9.9 seconds (9.6 to 10.3) and 5.0 (5.0 to 5.4).

Cost. Smoke: two minutes on two cores. Full: 56 layers on CIFAR-10.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from experiments import study
from experiments.study import STYLES, Study
from resnet_jax import UserError, command_line

SCALES = {"smoke": "configs/digits.py", "full": "configs/v2_56.py"}
ROUNDS = 5
TIMES = {"cold": "nothing compiled", "warm": "second start"}


def measure(file: str, round: int) -> dict:
    """Seconds until the first update is evaluated, without and with compiled programs.

    Args:
      file: as `--config` takes it.
      round: distinguishes one measurement from the next.
    """
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory, "cache")
        if round == 0:
            seconds_to_first_update(file, cache)
            cache = Path(directory, "another cache")
        return {name: seconds_to_first_update(file, cache) for name in TIMES}


def seconds_to_first_update(config: str, cache: Path, *changes: str) -> float:
    """Runs the training command until its first line about an epoch.

    Raises:
      UserError: it ends without one.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "resnet_jax.main", f"--config={config}"]
    with tempfile.TemporaryDirectory() as directory:
        command += ["--config.steps=1", *changes, f"--workdir={directory}/run"]
        start = time.perf_counter()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            for line in process.stdout:
                if line.startswith("epoch "):
                    seconds = time.perf_counter() - start
                    process.kill()
                    return round(seconds, 2)
    raise UserError("resnet_jax.main ended before its first update: see above")


def run(experiment: Study) -> list[dict]:
    """The seconds of each round."""
    file = SCALES[experiment.scale]
    return [
        experiment.cell(measure, file=file, round=number) for number in range(ROUNDS)
    ]


def table(rounds: list[dict]) -> str:
    """Medians over rounds with their ranges, as text."""
    lines = [f"{'':<18}{'seconds':>8}"]
    for name, title in TIMES.items():
        seconds = [each[name] for each in rounds]
        lines.append(
            f"{title:<18}{np.median(seconds):>8.1f} "
            f"({min(seconds):.1f} to {max(seconds):.1f})"
        )
    return "\n".join(lines)


def draw(rounds: list[dict]) -> Figure:
    """A row for each of TIMES, with a point for each round and a line at the median."""
    figure, ((axes,),) = study.figure(4.0, 1.4)
    for place, (name, style) in enumerate(zip(TIMES, STYLES[1:], strict=False)):
        seconds = [each[name] for each in rounds]
        points = style | {"linestyle": "none", "alpha": 0.6}
        axes.plot(seconds, [place] * len(seconds), **points)
        axes.vlines(np.median(seconds), place - 0.3, place + 0.3, style["color"])
    axes.set_yticks(range(len(TIMES)), TIMES.values())
    axes.set(xlabel="seconds to the first update and its evaluation", ylim=(1.5, -0.5))
    axes.set_xlim(left=0)
    return figure


def main(argv: list[str]) -> None:
    """Measures what is missing, and draws the figure."""
    experiment = Study.of(argv, __doc__)
    rounds = run(experiment)
    print(table(rounds))
    experiment.save(draw(rounds))


if __name__ == "__main__":
    command_line.run(main)
