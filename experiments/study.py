"""Parts that experiments share: cells that are measured once, and figures for a paper.

Each cell of an experiment's grid is a line of OUT/SCALE.jsonl as soon as it is
measured: its settings, seed included, its result, and what computed it. A study that
was stopped resumes after the last line, and a finished one only draws; delete lines to
measure them again. Several processes may measure parts of one study.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import matplotlib
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from configs import common
from resnet_jax import UserError, command_line, provenance, workdir

SEEDS = (0, 1, 2)
# They differ in colour, grey level, line and marker (colours: Okabe and Ito).
STYLES = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#d55e00", "linestyle": "--", "marker": "s"},
    {"color": "#0072b2", "linestyle": "-.", "marker": "^"},
    {"color": "#56b4e9", "linestyle": ":", "marker": "v"},
    {"color": "#009e73", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "D"},
]
_RC = {
    "font.size": 8,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "svg.hashsalt": "resnet_jax",
}


class Study:
    """The cells of one experiment at one scale, and where they are kept."""

    def __init__(self, scale: str, out: Path, redraw: bool = False):
        """With `redraw` nothing is measured: a cell that is not stored is an error."""
        if not redraw:
            workdir.make(out)
        self.scale, self.redraw = scale, redraw
        self.out = out
        self._file = out / f"{scale}.jsonl"
        self._cells = self._read()

    @classmethod
    def of(cls, argv: list[str], doc: str) -> "Study":
        """The study that an experiment's command line asks for."""

        def define(values: flags.FlagValues) -> None:
            flags.DEFINE_enum(
                "scale",
                "smoke",
                ["smoke", "full"],
                "'smoke' takes minutes on two CPU cores; 'full' is for one GPU.",
                flag_values=values,
            )
            flags.DEFINE_string(
                "out",
                str(Path(__file__).parent / "results" / Path(argv[0]).stem),
                "Directory for results and figures.",
                flag_values=values,
            )
            flags.DEFINE_bool(
                "redraw",
                False,
                "Draw only what is stored; measure nothing.",
                flag_values=values,
            )

        values = command_line.parse(argv, doc, define)
        return cls(values.scale, Path(values.out), values.redraw)

    def cell(self, measure: Callable[..., dict], **settings) -> dict:
        """Returns `measure(**settings)`, or what it returned before.

        Settings and result must be valid JSON; see `numbers`. A result's "made_by" says
        what measured it, if not this process just now, and is stored beside the result:
        any of 'device', 'versions', 'git_commit' and 'seconds'.

        Raises:
          UserError: it is not stored, and the study only draws.
          WriteError: the result cannot be written.
        """
        key = _key(settings)
        if key not in self._cells:
            shown = " ".join(
                f"{name}={value}"
                for name, value in settings.items()
                if not isinstance(value, dict | list)
            )
            if self.redraw:
                lacks = shown or ("a training run" if self._cells else "any result")
                raise UserError(
                    f"{self._file} lacks {lacks}: leave out --redraw to measure it"
                )
            print(f"measuring {shown}".strip(), flush=True)
            start = time.perf_counter()
            result = measure(**settings)
            made_by = {
                "seconds": round(time.perf_counter() - start, 2),
                **provenance.versions_and_commit(),
                **result.pop("made_by", {}),
            }
            if "device" not in made_by:  # two processes cannot always share one
                made_by["device"] = jax.devices()[0].device_kind
            self._store(key, {"settings": settings, "result": result, **made_by})
        return self._cells[key]["result"]

    def seeds(self, measure: Callable[..., dict], config: dict, **settings) -> list:
        """The cells of a config, as JSON holds it, with each of SEEDS."""
        return [
            self.cell(measure, config=config | {"seed": seed}, **settings)
            for seed in SEEDS
        ]

    def has(self, **settings) -> bool:
        """Whether the cell is stored."""
        return _key(settings) in self._cells

    def settings(self) -> list[dict]:
        """The settings of all cells that are stored."""
        return [cell["settings"] for cell in self._cells.values()]

    def _store(self, key: str, cell: dict) -> None:
        """Adds a cell to those that this process and others have stored."""
        with _locked(self.out):
            self._cells = self._read() | {key: cell}
            lines = [json.dumps(cell, allow_nan=False) for cell in self._cells.values()]
            workdir.write(self._file, "\n".join(lines) + "\n")

    def _read(self) -> dict[str, dict]:
        """The stored cells. Raises UserError for a line that is not a cell."""
        if not self._file.exists():
            return {}
        cells = {}
        for number, line in enumerate(self._file.read_text().splitlines(), start=1):
            try:
                cell = json.loads(line)
                cells[_key(cell["settings"])] = cell
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._file}, line {number}, is not a measurement: delete the "
                    "line to have its cell measured again"
                ) from None
        return cells

    def made_by(self) -> str:
        """The devices, versions and commits that computed the cells, in words."""
        cells = [*self._cells.values()]
        devices = {cell["device"] for cell in cells}
        versions = {f"jax {cell['versions']['jax']}" for cell in cells}
        commits = {
            f"{commit[:8]}{'-dirty' * ('-dirty' in commit)}"
            for commit in (cell["git_commit"] or "unknown" for cell in cells)
        }
        noun = "commit" if len(commits) == 1 else "commits"
        names = ", ".join(sorted(commits))
        return ", ".join([*sorted(devices), *sorted(versions), f"{noun} {names}"])

    def write_section(self, name: str, title: str, text: str) -> None:
        """Writes OUT/SCALE.md, a part of the README's results.

        Args:
          name: of the experiment, for its command.
          title: of the section.
          text: Markdown.
        """
        command = f"python -m experiments.{name} --scale={self.scale}"
        page = f"### {title} ({self.scale})\n\n{text}\n\n`{command}`\n"
        workdir.write(self.out / f"{self.scale}.md", page)

    def save(self, figure: Figure) -> None:
        """Writes a figure as OUT/SCALE.png and .svg."""
        save(figure, self.out / self.scale)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks other processes out; the lock is freed even if this process dies."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _key(settings: dict) -> str:
    """A key; equal for settings that differ only in config fields added later."""
    if "config" in settings:
        completed = common.completed(settings["config"])
        settings = settings | {"config": workdir.as_json(completed)}
    return json.dumps(settings, sort_keys=True)


def run_process(
    command: list[str], stdout=subprocess.PIPE, env: dict[str, str] | None = None
) -> str | None:
    """Runs a command; returns what it prints, unless that goes elsewhere.

    Args:
      command: the program and its arguments.
      stdout: where it prints to, as `subprocess.run` takes it.
      env: its environment, instead of this process's.

    Raises:
      UserError: it fails; the command itself has printed the reason.
    """
    done = subprocess.run(command, stdout=stdout, text=True, env=env)
    if done.returncode:
        raise UserError(
            f"{' '.join(command[1:3])} ended with status {done.returncode}: see above, "
            "and run the same command again"
        )
    return done.stdout


def numbers(array) -> list:
    """An array as JSON holds it: five digits, and None where it is not finite."""
    if np.ndim(array):
        return [numbers(part) for part in array]
    return float(f"{array:.5g}") if np.isfinite(array) else None


def figure(width: float, height: float, **subplots) -> tuple[Figure, np.ndarray]:
    """A figure for a paper, sized in inches, and its axes [rows, columns]."""
    matplotlib.rcParams.update(_RC)
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(squeeze=False, **subplots)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PATH.png and PATH.svg."""
    for kind, metadata in (("png", {}), ("svg", {"Date": None})):
        file = path.with_name(f"{path.name}.{kind}")
        figure.savefig(file, dpi=160, metadata=metadata)
        if kind == "png":  # a palette makes the file a third as large
            Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)
        print("drew", file)


def plot_seeds(axes: Axes, x, samples, **style) -> None:
    """Draws the median over the first axis of `samples`, the seeds, and their range."""
    samples = np.array(samples, float)
    axes.plot(x, np.median(samples, 0), **style)
    band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
    axes.fill_between(x, samples.min(0), samples.max(0), **band)


def plot_points(axes: Axes, row: float, values, **style) -> None:
    """Draws a point per seed in a row, each a little lower, so that equal ones show."""
    below = 0.1 * (np.arange(len(values)) - (len(values) - 1) / 2)
    axes.plot(values, row + below, **style | {"linestyle": "none"})


def name_rows(axes: Axes, names) -> None:
    """Names the rows 0, 1, ... from above."""
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
