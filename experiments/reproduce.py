"""Published tables of CIFAR-10 accuracies, trained again and compared.

    python -m experiments.reproduce --table=he2015 [--seeds=3] [--networks=v1-20,v1-56]
    python -m experiments.reproduce --table=keras --epochs=15    # a smaller budget
    python -m experiments.reproduce --table=he2015 --recipe=strong --dtype=bfloat16
    python -m experiments.reproduce --table=he2015 --redraw      # only what is stored

Ours is the last epoch's test accuracy, the mean over seeds 0, 1, ...; published values
are mostly those of the best epoch on the test set, so our best epoch is also shown. The
difference is given in standard errors, s * sqrt(1 / n + 1 / m), s being the standard
deviation over our n seeds and m the number of runs behind the published value, but not
if the data are a copy with other pixels, since accuracies on it are not comparable. The
table has everything that is stored, including networks and seeds not asked for.

Writes TABLE.json, .md, .png and .svg to --out, and each run's result to TABLE.jsonl as
soon as it has ended. With --recipe, --epochs and --dtype the files are called
TABLE-RECIPE-Nepochs-bfloat16.
"""

import functools
import json
import math
from pathlib import Path

import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from configs import common
from experiments import curves, study
from experiments.published import TABLES, Published, Table
from experiments.study import Study
from resnet_jax import UserError, command_line, data, workdir
from resnet_jax.seeds import mean_and_interval

# Means of the training images' channels: re-encoded copies of CIFAR-10 have others.
_CIFAR10_MEAN = (125.306918, 122.950394, 113.865383)


def run_config(
    table: Table, network: str, seed: int, epochs: int, dtype: str = "float32"
) -> dict:
    """The config of a run, as JSON holds it. `epochs` 0 leaves the recipe's."""
    version, depth = map(int, network.removeprefix("v").split("-")[:2])
    deep = depth >= 1000
    model = {"scan": deep, "remat": deep} | (table.networks[network].model or {})
    config = common.get_config(table.recipe, version, depth, dtype=dtype, **model)
    config.update_from_flattened_dict(table.changes or {})
    config.seed = seed
    if epochs:
        curves.shorten(config, epochs)
    config.checkpoint.keep = 1
    return workdir.as_json(config)


def measure(config: dict) -> dict:
    """The result of one run."""
    rows, summary, diverged = curves.run(config)
    if diverged:
        return {"diverged": diverged}
    names = ("test_accuracy", "test_examples", "params", "epochs", "seconds")
    names += ("images_per_second",)
    return {
        **{name: summary[name] for name in names},
        "best_test_accuracy": max(row.get("test_accuracy", 0) for row in rows),
        "dataset": dataset_name(json.dumps(config["dataset"])),
        **curves.made_by(summary),
    }


@functools.cache
def dataset_name(settings: str) -> str:
    """The data set's name in a table: 'CIFAR-10' only with the original pixels."""
    dataset = data.load(ConfigDict(json.loads(settings)))
    if dataset.name == "cifar10":
        mean = dataset.train.images.mean((0, 1, 2), dtype=np.float64)
        if not np.allclose(mean, _CIFAR10_MEAN, atol=1e-4):
            return "CIFAR-10, pixels not the original (as of a JPEG copy)"
        return "CIFAR-10"
    return dataset.name


def compare(published: Published, results: list[dict]) -> dict:
    """Compares ours with a published value, in percent.

    'standard_errors' needs two seeds, and 'difference' CIFAR-10's original pixels.
    """
    finished = [result for result in results if "diverged" not in result]
    ours = [100 * result["test_accuracy"] for result in finished]
    row = {
        "published": published.percent,
        "accuracies": ours,
        "diverged": len(results) - len(ours),
        **mean_and_interval(ours),
        "best_epoch": None,
        "difference": None,
        "standard_errors": None,
    }
    if ours:
        best = [100 * result["best_test_accuracy"] for result in finished]
        row["best_epoch"] = mean_and_interval(best)["mean"]
        if all(result["dataset"] == "CIFAR-10" for result in finished):
            row["difference"] = row["mean"] - published.percent
        row["seconds"] = float(np.median([result["seconds"] for result in finished]))
        row |= {name: finished[0][name] for name in ("params", "epochs", "dataset")}
    if row["standard_deviation"] and row["difference"] is not None:
        error = math.sqrt(1 / len(ours) + 1 / published.runs)
        error *= row["standard_deviation"]
        row["standard_errors"] = row["difference"] / error
    return row


def markdown(
    table: Table, rows: dict[str, dict], made_by: str, dtype: str = "float32"
) -> str:
    """The comparison as a table, with its conditions and what computed it."""
    names = ["network", "parameters", "published", "ours"]
    names += ["standard deviation", "seeds", "best epoch"]
    names += ["difference", "in standard errors", "seconds per run"]
    lines = [names, ["---", *["--:"] * (len(names) - 1)]]
    for network, row in rows.items():
        failed = f", {row['diverged']} diverged" if row["diverged"] else ""
        lines.append(
            [
                network,
                _number(row.get("params"), ","),
                _number(row["published"], ".2f"),
                _number(row["mean"], ".2f"),
                _number(row["standard_deviation"], ".2f"),
                f"{len(row['accuracies'])}{failed}",
                _number(row["best_epoch"], ".2f"),
                _number(row["difference"], "+.2f"),
                _number(row["standard_errors"], "+.1f"),
                _number(row.get("seconds"), ",.0f"),
            ]
        )
    trained = [row for row in rows.values() if row["accuracies"]]
    datasets = ", ".join(sorted({row["dataset"] for row in trained}))
    epochs = ", ".join(sorted({f"{row['epochs']:.4g}" for row in trained}))
    why = (
        " No difference is given: the pixels are not the original CIFAR-10's, so it "
        "would confound data and training."
    )
    why = why if any(row["difference"] is None for row in trained) else ""
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"Published: {table.source}. Ours: recipe `{table.recipe}`, {datasets}, "
            f"test accuracy (%) after the last of {epochs} epochs; {dtype}, {made_by}."
            f"{why}",
        ]
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def draw(rows: dict[str, dict]) -> Figure:
    """Ours with 95% intervals, and the published values; hollow if of other data."""
    figure, ((axes,),) = study.figure(4.6, 1.0 + 0.35 * len(rows))
    for place, row in enumerate(rows.values()):
        alike = row["mean"] is None or row["difference"] is not None
        style = study.STYLES[0] | {"linestyle": "none"}
        if not alike:
            style |= {"color": "0.5", "markerfacecolor": "none"}
        label = "published" if alike else "published (original CIFAR-10)"
        axes.plot(row["published"], place, **style, label=label)
        if row["mean"] is None:
            continue
        low = (row["interval"] or [row["mean"]])[0]
        axes.errorbar(
            row["mean"],
            place,
            xerr=row["mean"] - low,
            capsize=2,
            **study.STYLES[1] | {"linestyle": "none"},
            label="ours, 95% interval" if row["interval"] else "ours, one seed",
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set(xlabel="test accuracy (%)", ylim=(len(rows) - 0.5, -0.5))
    handles, labels = axes.get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    figure.legend(named.values(), named, loc="outside upper center", ncols=2)
    return figure


def main(argv: list[str]) -> None:
    """Trains the missing runs of a table, and compares."""

    def define(values: flags.FlagValues) -> None:
        into = {"flag_values": values}
        flags.DEFINE_enum("table", None, list(TABLES), "Table to reproduce.", **into)
        flags.DEFINE_list(
            "networks", [], "Networks of the table; by default, all.", **into
        )
        flags.DEFINE_integer("seeds", 3, "Runs per network.", **into)
        flags.DEFINE_integer(
            "epochs",
            0,
            "Epochs per run; warm-up and final plain epochs are scaled to match. "
            "0: the recipe's.",
            **into,
        )
        recipes = ["", "paper", "keras", "strong", "fast"]
        flags.DEFINE_enum(
            "recipe", "", recipes, "Recipe to train with; '': the table's own.", **into
        )
        flags.DEFINE_enum(
            "dtype",
            "float32",
            ["float32", "bfloat16"],
            "Data type of the computation.",
            **into,
        )
        flags.DEFINE_string(
            "out",
            str(Path(__file__).parent / "results" / "reproduce"),
            "Directory for the results.",
            **into,
        )
        flags.DEFINE_bool("redraw", False, "Only show what is stored.", **into)

    values = command_line.parse(argv, __doc__, define)
    if values.table is None:
        raise UserError(f"--table is missing: give one of {', '.join(TABLES)}")
    table = TABLES[values.table]
    networks = list(dict.fromkeys(values.networks)) or list(table.networks)
    if unknown := [name for name in networks if name not in table.networks]:
        raise UserError(
            f"--networks={unknown[0]}: --table={values.table} has "
            f"{', '.join(table.networks)}"
        )
    others = [name for name in networks if table.networks[name].model]
    if values.recipe == "keras" and others:
        raise UserError(
            f"--recipe=keras trains networks of its own, not {others[0]} of "
            f"--table={values.table}: leave out --recipe, or give other --networks"
        )
    for name, least in (("seeds", 1), ("epochs", 0)):
        if values[name].value < least:
            raise UserError(f"--{name}={values[name].value}: give at least {least}")
    if values.recipe:
        table = table._replace(recipe=values.recipe, changes=None)
    given = {"recipe": values.recipe, "epochs": values.epochs, "dtype": values.dtype}
    given = {flag: x for flag, x in given.items() if x and x != "float32"}
    words = [f"{x} epochs" if flag == "epochs" else x for flag, x in given.items()]
    name = "-".join([values.table, *words]).replace(" ", "")
    words = [f"recipe {x}" if x == values.recipe else x for x in words]
    # Another recipe or budget does not reproduce the table.
    title = f"### Published table {values.table}"
    if words:
        title = f"### Networks of table {values.table}, {', '.join(words)}"
    experiment = Study(name, Path(values.out), values.redraw)

    def config_of(network: str, seed: int) -> dict:
        return run_config(table, network, seed, values.epochs, values.dtype)

    if not values.redraw:
        for seed in range(values.seeds):  # so that every network soon has a result
            for network in networks:
                experiment.cell(measure, config=config_of(network, seed))
    rows = {}
    seeds = sorted({settings["config"]["seed"] for settings in experiment.settings()})
    for network, published in table.networks.items():
        if values.recipe == "keras" and published.model:
            continue
        configs = [config_of(network, seed) for seed in seeds]
        stored = [config for config in configs if experiment.has(config=config)]
        if stored:
            found = [experiment.cell(measure, config=config) for config in stored]
            rows[network] = compare(published, found)
    if not rows:
        raise UserError(f"{values.out} has no results of {name}: measure them first")
    text = markdown(table, rows, experiment.made_by(), values.dtype)
    given = {"table": values.table, "networks": ",".join(rows)} | given
    given["seeds"] = len(seeds)
    command = ["python -m experiments.reproduce"]
    command = " ".join(command + [f"--{flag}={x}" for flag, x in given.items()])
    content = {"command": command, "source": table.source, "networks": rows}
    workdir.write_json(experiment.out / f"{name}.json", content)
    workdir.write(experiment.out / f"{name}.md", f"{title}\n\n{text}\n\n`{command}`\n")
    experiment.save(draw(rows))
    print(text)


if __name__ == "__main__":
    command_line.run(main)
