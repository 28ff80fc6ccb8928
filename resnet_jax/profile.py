"""Where a call's time goes: a trace for XProf or TensorBoard, and its costliest parts.

python -m resnet_jax.main --config=configs/v2_56.py --config.profile=true
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

from resnet_jax import bucket, hosts
from resnet_jax.trainer import Trainer

# Loops and calls, whose parts are traced separately.
_CONTAINERS = re.compile(r"(while|conditional|call)(\.\d+)?")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program.

    Attributes:
      name: in the program, such as 'fusion.12'.
      seconds: its total time.
      count: how often it ran, on all devices.
    """

    name: str
    seconds: float
    count: int


@contextlib.contextmanager
def traced(trainer: Trainer, directory: Path, start: int, stop: int) -> Iterator[None]:
    """Writes a trace of a call of `trainer.train` to DIRECTORY/profile.

    Prints the ten costliest operations.
    """
    directory /= "profile"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
        yield
    # Traces are in folders named by the time.
    file = max(directory.glob("plugins/profile/*/*.xplane.pb"))
    place = bucket.display_path(directory)
    hosts.print_once(f"profile   of steps {start + 1:,} to {stop:,}: {place}")
    program = trainer.programs[trainer.plan.image_size(start)].result().as_text()
    hosts.print_once(table(operations(file), sources(program)))


def operations(file: Path) -> list[Operation]:
    """The operations that ran on the devices according to a trace, costliest first.

    Time in which several run is divided among them, so that all add up to the time in
    which any ran.
    """
    starts, ends, ended = {}, {}, {}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                # On a TPU, events of this line are operations; elsewhere, they say so.
                if line.name == "XLA Ops":
                    name = event.name.partition(" = ")[0].lstrip("%")
                else:
                    name = dict(event.stats).get("hlo_op")
                if name and not _CONTAINERS.fullmatch(name):
                    starts.setdefault(name, []).append(event.start_ns)
                    ends.setdefault(name, []).append(event.end_ns)
                elif event.name.startswith("end: "):
                    name = event.name.removeprefix("end: ")
                    ended.setdefault(name, []).append(event.start_ns)
    edges = []
    for name in starts:
        # On a CPU an event may only start what other threads do until its "end: ".
        apart = len(ended.get(name, ())) == len(starts[name])
        edges += [(time, 1, name) for time in starts[name]]
        edges += [(time, -1, name) for time in (ended if apart else ends)[name]]
    seconds, shared, running, before = dict.fromkeys(starts, 0.0), 0.0, 0, 0
    for time, change, name in sorted(edges):
        shared += (time - before) / 1e9 / running if running else 0.0
        seconds[name] -= change * shared
        running, before = running + change, time
    ordered = sorted(seconds, key=seconds.get, reverse=True)
    return [Operation(name, seconds[name], len(starts[name])) for name in ordered]


def sources(program: str) -> dict[str, str]:
    """Where in the network a program's operations come from, by its HLO text.

    For example 'stage1_block1/conv1/conv_general_dilated, backward'; for a fusion that
    of its last part.
    """
    places = {}
    named = r'^\s*(?:ROOT )?%?(\S+) = .*metadata=\{.*?op_name="([^"]+)"'
    for name, path in re.findall(named, program, re.MULTILINE):
        backward = ", backward" if "transpose(" in path else ""
        _, network, inside = path.rpartition("ResNet")
        parts = (inside if network else path).strip(")/").split("/")
        kept = [part for part in parts if part not in ("while", "body")]
        if network:  # not the functions that its layers call
            kept = [part for part in kept if not part.startswith("jit(")]
        places[name] = "/".join(kept[-4:]) + backward
    return places


def table(found: list[Operation], places: dict[str, str], count: int = 10) -> str:
    """The first operations, their shares of the time, and their places."""
    total = sum(operation.seconds for operation in found) or 1.0
    lines = [f"{'share':>9}{'ms each':>10}{'times':>8}  operation"]
    for operation in found[:count]:
        each = 1000 * operation.seconds / operation.count
        # XLA appends what it calls: custom-call.3__onednn$convolution.
        place = places.get(operation.name.partition("__onednn$")[0], "")
        lines.append(
            f"{operation.seconds / total:>9.1%}{each:>10.3f}{operation.count:>8,}  "
            f"{operation.name}  {place}".rstrip()
        )
    return "\n".join(lines)
