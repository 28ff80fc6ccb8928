"""The output of `experiments.benchmark`: a table and a figure for each result."""

import importlib.util
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path

import jax
from matplotlib.figure import Figure

from experiments import study
from experiments.peers import CONTENDERS
from resnet_jax import provenance

_PEERS = ("torch", "keras", "tensorflow-cpu", "tensorflow")


def rates(result: dict) -> dict[str, dict[str, float]]:
    """The numbers of each contender in the table, from a stored result."""
    images, batch_size = result["images"], result["batch_size"]
    shown = {}
    for name, contender in result["contenders"].items():
        median = {
            method: statistics.median(s) for method, s in contender["seconds"].items()
        }
        step = median["in_memory"] * batch_size / images
        before = median.get("input", max(0, median["epoch"] - median["in_memory"]))
        shown[name] = {
            "step": images / median["in_memory"],
            "epoch": images / median["epoch"],
            "evaluate": result["eval_images"] / median["evaluate"],
            "input": before / median["epoch"],
            "memory": contender["peak_bytes"] / 2**30,
            "compile": max(0, contender["first_step_seconds"] - step),
            "first": contender["first_seconds"],
        }
    return shown


def table(result: dict) -> str:
    """A result as text; 'ours/it' are the ratios of ours to a contender."""
    shown = rates(result)
    ours = shown.get("ours")
    lines = [
        f"{result['network']}, batches of {result['batch_size']}, "
        f"{result['images']:,} images per epoch, {result['dataset']}, "
        f"{result['cores']} cores, {result['device']}",
        f"{'':<20}{'images/s':>10}{'':>20}{'ours/it':>10}{'':>20}{'of epoch':>9}"
        f"{'GiB':>8}{'s':>9}{'s':>9}",
        f"{'':<20}{'step':>10}{'epoch':>10}{'evaluate':>10}{'step':>10}{'epoch':>10}"
        f"{'evaluate':>10}{'input':>9}{'memory':>8}{'compile':>9}{'first':>9}",
    ]
    for name, row in shown.items():
        methods = ("step", "epoch", "evaluate")
        ratios = (
            f"{ours[m] / row[m]:>10.2f}" if ours else f"{'':>10}" for m in methods
        )
        lines.append(
            f"{name:<20}"
            + "".join(f"{row[method]:>10,.0f}" for method in methods)
            + "".join(ratios)
            + f"{row['input']:>9.1%}{row['memory']:>8.2f}{row['compile']:>9.1f}"
            + f"{row['first']:>9.1f}"
        )
    return "\n".join(lines)


def draw(result: dict) -> Figure:
    """Bars: epoch, with the range of the rounds, in front of step."""
    shown = rates(result)
    names = [name for name in CONTENDERS if name in shown]
    titles = [CONTENDERS[name].title for name in names]
    figure, ((axes,),) = study.figure(4.2, 0.8 + 0.3 * len(names))
    axes.barh(titles, [shown[name]["step"] for name in names], color="#c8dcea")
    for title, name in zip(titles, names, strict=True):
        rate, seconds = shown[name]["epoch"], result["contenders"][name]["seconds"]
        ends = [result["images"] / act(seconds["epoch"]) for act in (max, min)]
        axes.barh(
            title,
            rate,
            0.5,
            xerr=[[rate - ends[0]], [ends[1] - rate]],
            color="#d55e00" if name.startswith("ours") else "#0072b2",
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        place = max(ends[1], shown[name]["step"])
        at = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{rate:,.0f}", (place, title), fontsize=7, **at)
    shapes = "epoch (narrow; range of rounds) and step (wide)"
    axes.set_xlabel(f"images per second\n{shapes}")
    axes.set_title(f"{result['network']}, batch {result['batch_size']}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.margins(x=0.15)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    return figure


def peer_versions() -> dict[str, str]:
    """The versions of the peers' packages that are installed."""
    versions = {}
    for name in _PEERS:
        if importlib.util.find_spec(name.removesuffix("-cpu")):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue  # TensorFlow has several names
    return versions


def conditions() -> dict:
    """The conditions of a measurement: device, versions of ours and of the peers."""
    made_by = provenance.versions_and_commit()
    made_by["versions"] |= peer_versions()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        **made_by,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return named[0].strip() if named else platform.processor()
