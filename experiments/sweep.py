r"""Tries every combination of a grid's values, over seeds: which is best on validation?

    python -m experiments.sweep --config=configs/v1_20.py --seeds=3 \
        --grid='optimizer.learning_rate=.05,.1,.2;model.depth=20,56' [--config.x=y]

Each cell and seed is an ordinary run in OUT/CELL/seed<seed>, with its output in
OUT/CELL/seed<seed>.log. Finished runs are skipped, and those that were stopped resume,
so that the same command, or one with a larger grid, measures what is missing. With
several GPUs or TPU chips, each takes one run at a time; on a CPU runs follow one
another. (Several devices are tested only with stand-ins.)

Cells are compared by the last epoch's accuracy on `dataset.validation_split`, by
default a tenth held back from 'train'; the test split plays no part in the choice.
Writes OUT/sweep.json, .md, .png and .svg, and prints the command that trains the best
cell, on that tenth too. Warns if one of its values is at an end of an axis of three or
more, and if other cells' means are within the interval of its mean.
"""

import difflib
import hashlib
import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from experiments import parallel_runs, study
from experiments.parallel_runs import Job
from resnet_jax import UserError, command_line, data, provenance, results, workdir
from resnet_jax.config import flat
from resnet_jax.seeds import accuracy_interval

_HELD_BACK = {
    "dataset.train_split": "train[:90%]",
    "dataset.validation_split": "train[90%:]",
}
# Fields that must be the same in all cells, or are given otherwise.
_NOT_SWEPT = {
    "seed": "give --config.seed (the first) and --seeds",
    "seeds": "give --seeds",
    "dataset.validation_split": "all cells need the same one: set it with --config",
    "dataset.eval_split": "cells are not compared on it",
}


def parse_grid(text: str, fields: dict) -> dict[str, list[str]]:
    """Reads 'field=value,value;field=value': values, as text, by field.

    Values may be tuples in brackets. `fields` are those of a config, by dotted names.

    Raises:
      UserError: a field is unknown or cannot be swept, or something is repeated.
    """
    grid = {}
    for part in text.split(";"):
        field, equals, values = part.strip().partition("=")
        if not equals:
            raise UserError(
                f"--grid={text!r}: {part!r} is not an axis: write FIELD=VALUE,VALUE, "
                "with a semicolon between axes"
            )
        if field not in fields:
            whole = [name for name in fields if name.split(".")[-1] == field]
            close = whole or difflib.get_close_matches(field, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "see configs/common.py"
            raise UserError(f"--grid: {field!r} is not a field of the config: {hint}")
        if field in _NOT_SWEPT:
            raise UserError(f"--grid: {field} cannot be swept: {_NOT_SWEPT[field]}")
        parsed = [value.strip() for value in re.split(r",(?![^(]*\))", values)]
        if field in grid or len(set(parsed)) < len(parsed):
            raise UserError(f"--grid: {part!r} is repeated, or has a value twice")
        grid[field] = parsed
    return grid


class Sweep(NamedTuple):
    """The sweep that a command line asks for."""

    grid: dict[str, list[str]]
    cells: list[tuple[dict[str, str], list[Job]]]  # values by field; a job per seed
    out: Path
    command: list[str]  # that trains what the grid changes
    on_all: bool  # the command trains on what the sweep held back, too

    @property
    def jobs(self) -> list[Job]:
        return [job for _, members in self.cells for job in members]


def parse(argv: list[str]) -> Sweep:
    """Reads the command line, and checks the config of every cell.

    Raises:
      UserError: for anything that would end a run before it trains.
    """

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)
        into = {"flag_values": values}
        flags.DEFINE_string("grid", None, "FIELD=VALUE,VALUE;FIELD=VALUE,...", **into)
        flags.DEFINE_integer("seeds", 3, "Runs per cell.", **into)
        flags.DEFINE_string(
            "out", None, "Directory; by default runs/sweeps/CONFIG-DIGEST.", **into
        )

    values = command_line.parse(argv, __doc__, define)
    base = command_line.checked_config(values)
    if not values.grid:
        raise UserError("--grid is missing: give one, such as 'model.depth=20,56'")
    if values.seeds < 1:
        raise UserError(f"--seeds={values.seeds}: give at least 1")
    if base.seeds > 1:
        raise UserError(f"config.seeds={base.seeds}: give --seeds instead")
    grid = parse_grid(values.grid, flat(base))
    of_runs = "--?(no)?(config[.=]|flagfile=)"
    given = [arg for arg in argv[1:] if re.match(of_runs, arg)]
    shared = given.copy()
    if not base.dataset.validation_split:
        if base.dataset.train_split != "train" or "dataset.train_split" in grid:
            raise UserError(
                "config.dataset.validation_split='': give one that is not part of "
                "dataset.train_split, with --config.dataset.validation_split"
            )
        shared += _changes(_HELD_BACK)
        base.update_from_flattened_dict(_HELD_BACK)
    file = config_flags.get_config_filename(values["config"])
    key = base.to_json(sort_keys=True).encode()
    name = f"{Path(file).stem}-{hashlib.sha256(key).hexdigest()[:8]}"
    out = Path(values.out or Path("runs", "sweeps", name))
    cells = []
    for combination in itertools.product(*grid.values()):
        cell = dict(zip(grid, combination, strict=True))
        title = ",".join(f"{field}={value}" for field, value in cell.items())
        members = []
        for seed in range(base.seed, base.seed + values.seeds):
            arguments = [*shared, *_changes(cell), f"--config.seed={seed}"]
            directory = out / title.replace("/", "-") / f"seed{seed}"
            members.append(Job(directory, _config(arguments), arguments))
            changed = workdir.check(directory, members[-1].config)
            if lengths := results.of_length(changed):
                raise UserError(
                    f"{directory} holds a run of another length ({lengths[0]}), which "
                    "would not compare with new ones: give another --out"
                )
        cells.append((cell, members))
    return Sweep(
        grid, cells, out, ["python", "-m", "resnet_jax.main", *given], shared != given
    )


def _changes(fields: dict[str, str]) -> list[str]:
    return [f"--config.{field}={value}" for field, value in fields.items()]


def _config(arguments: list[str]) -> ConfigDict:
    argv = ["resnet_jax.main", *arguments]

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)

    config = command_line.checked_config(command_line.parse(argv, "", define))
    data.check(config.dataset)
    return config


def outcomes(sweep: Sweep) -> list[dict]:
    """The results of each cell, in the grid's order."""
    cells = []
    for cell, members in sweep.cells:
        found = [parallel_runs.outcome(job) for job in members]
        finished = [result for result in found if result]
        accuracies = [result["validation_accuracy"] for result in finished]
        cells.append(
            {
                "cell": cell,
                "validation_accuracy": accuracies,
                "diverged": len(found) - len(finished),
                **accuracy_interval(accuracies),
                "test_accuracy": [result["test_accuracy"] for result in finished],
                "seconds": [result["seconds"] for result in finished],
                "device": sorted({result["device"] for result in finished}),
            }
        )
    return cells


def best(cells: list[dict]) -> dict:
    """The cell with the highest mean among those with the fewest diverged seeds.

    Raises:
      UserError: all diverged.
    """
    chosen = max(cells, key=lambda cell: (-cell["diverged"], cell["mean"] or 0))
    if chosen["mean"] is None:
        raise UserError("all runs diverged: give lower values of learning_rate")
    return chosen


def at_the_ends(grid: dict[str, list[str]], cell: dict[str, str]) -> list[str]:
    """Sentences about numbers of a cell that are the smallest or largest of their axis.

    Axes of two values have nothing between, and are left out.
    """
    sentences = []
    for field, values in grid.items():
        try:
            *numbers, value = map(float, [*values, cell[field]])
        except ValueError:  # names, brackets, true and false
            continue
        for end, more in ((min(numbers), "smaller"), (max(numbers), "larger")):
            if value == end and len(numbers) > 2:
                sentences.append(
                    f"{field}={cell[field]} is at an end of its axis: try {more} "
                    "values, too"
                )
    return sentences


def as_good(cells: list[dict], chosen: dict) -> int:
    """How many others have a mean within the interval of the chosen one's."""
    means = [cell["mean"] for cell in cells if cell is not chosen]
    low = (chosen["interval"] or [np.inf])[0]
    return sum(mean is not None and mean >= low for mean in means)


def table(cells: list[dict]) -> str:
    """Markdown: a row for each cell."""
    names = [*cells[0]["cell"], "validation accuracy", "deviation", "95% interval"]
    names += ["seeds", "seconds"]
    rows = [names, ["---"] * len(names)]
    for cell in cells:
        count = len(cell["validation_accuracy"])
        low, high = cell["interval"] or (None, None)
        failed = f", {cell['diverged']} diverged" if cell["diverged"] else ""
        rows.append(
            [
                *cell["cell"].values(),
                f"{cell['mean']:.2%}" if count else "-",
                f"{cell['standard_deviation']:.2%}" if count > 1 else "-",
                f"{low:.2%} to {high:.2%}" if count > 1 else "-",
                f"{count}{failed}",
                f"{np.mean(cell['seconds']):,.0f}" if count else "-",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(grid: dict[str, list[str]], cells: list[dict]) -> Figure:
    """Accuracy by the first field; a line for each combination of the others."""
    figure, ((axes,),) = study.figure(4.2, 2.8)
    (first, values), others = next(iter(grid.items())), [*grid][1:]
    lines = {}
    for cell in cells:
        if cell["mean"] is not None:
            label = ", ".join(f"{name}={cell['cell'][name]}" for name in others)
            lines.setdefault(label, []).append(cell)
    for number, (label, members) in enumerate(lines.items()):
        mean = [100 * cell["mean"] for cell in members]
        intervals = [cell["interval"] or [cell["mean"]] * 2 for cell in members]
        low, high = 100 * np.transpose(intervals)
        axes.errorbar(
            # Side by side, so that their bars do not overlap.
            [values.index(cell["cell"][first]) + 0.04 * number for cell in members],
            mean,
            yerr=(mean - low, high - mean),
            capsize=2,
            label=label,
            **study.STYLES[number % len(study.STYLES)],
        )
    axes.set_xticks(range(len(values)), values)
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, 0), min(top, 100))
    axes.set(xlabel=first, ylabel="validation accuracy (%)")
    if others:
        axes.legend()
    return figure


def main(argv: list[str]) -> None:
    """Runs what is missing, and prints which cell is best."""
    sweep = parse(argv)
    missing = [job for job in sweep.jobs if parallel_runs.outcome(job) is None]
    print(f"{len(sweep.jobs)} runs in {sweep.out}, {len(missing)} to train", flush=True)
    workdir.make(sweep.out)
    if missing:
        parallel_runs.run_all(missing, parallel_runs.devices())
    cells = outcomes(sweep)
    content = {"command": shlex.join(["python", "-m", "experiments.sweep", *argv[1:]])}
    content |= {"grid": sweep.grid, "cells": cells, **provenance.versions_and_commit()}
    workdir.write_json(sweep.out / "sweep.json", content)
    workdir.write(sweep.out / "sweep.md", table(cells) + "\n")
    study.save(draw(sweep.grid, cells), sweep.out / "sweep")
    print(table(cells))
    chosen, changes = best(cells), []
    title = sweep.cells[cells.index(chosen)][1][0].directory.parent.name
    if (seeds := len(sweep.cells[0][1])) > 1:
        changes = [f"--config.seeds={seeds}"]
    where = "on all of the training split" if sweep.on_all else "on the same split"
    print(f"\nbest: {chosen['mean']:.2%}; to train it {where}:")
    changes += [f"--workdir={sweep.out / 'best' / title}"]
    print(shlex.join([*sweep.command, *_changes(chosen["cell"]), *changes]))
    for sentence in at_the_ends(sweep.grid, chosen["cell"]):
        print(f"warning   {sentence}")
    if others := as_good(cells, chosen):
        print(
            f"warning   {others} of {len(cells) - 1} other cells are within its 95% "
            "interval: more --seeds would tell them apart"
        )


if __name__ == "__main__":
    command_line.run(main)
