"""Several processes, on one host or many, that train one network together.

All of them compute; process 0 alone prepares the data, reads and writes the run's
directory and prints. What it finds, errors included, goes to the others through
`run_on_first`, so that no other process needs the directory, nor the data unless they
are streamed.
"""

import importlib.util
import itertools
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from jax.experimental import multihost_utils

from resnet_jax import UserError, compilation, one_line
from resnet_jax.preemption import Interrupt

T = TypeVar("T")

_JOIN_SECONDS = 300  # for all to start
_MAKE_SECONDS = 86400  # for process 0 to prepare what the others wait for
_CHUNK = 2**28  # bytes sent at once: they are counted in 31 bits
_SILENT_SECONDS = 30  # without a sign of life from another process
# How Slurm's srun and Open MPI's mpirun tell a process how many processes there are,
# and which of them it is.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK")

_count = 1
_made = itertools.count()


class LostError(UserError):
    """Another process was lost, and computing cannot continue."""

    exit_status = 1


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags for what `join` takes."""
    own = {"flag_values": values}
    flags.DEFINE_string(
        "coordinator",
        None,
        "HOST:PORT of process 0, when several processes train together. TPU pods, "
        "Slurm and Open MPI need none of these three flags.",
        **own,
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes.", **own)
    flags.DEFINE_integer("process_id", None, "Index of this process, from 0.", **own)


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Joins the other processes, if there are any; call before JAX looks for devices.

    Raises:
      UserError: the three contradict each other, or process 0 cannot listen there.
        If the others do not come, the process itself ends with such a sentence.
    """
    global _count
    given = (coordinator, num_processes, process_id)
    alone = given == (None, None, None)
    if alone:
        num_processes = next(
            (int(os.environ[n]) for n in _LAUNCHERS if n in os.environ), 1
        )
        if num_processes == 1 and not _on_tpu_vm():
            return
    else:
        _check(*given)
    who = f"{num_processes} processes" if num_processes > 1 else "all processes"
    where = f"at {coordinator}" if coordinator else "where their launcher says"
    port = f"port {coordinator.rpartition(':')[2]}" if coordinator else "its port"
    ranks = (int(os.environ[n]) for n in _RANKS if n in os.environ)
    if (next(ranks, 0) if alone else process_id) == 0:
        print(f"waiting   for {who} {where}", flush=True)

    def give_up() -> None:
        print(
            f"error: {who} did not meet {where} within {_JOIN_SECONDS} s: start them "
            f"all, check that process 0 runs there, and open {port} in the firewall "
            "between them",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # JAX would keep waiting

    timer = threading.Timer(_JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    # JAX's own handling of SIGTERM would replace ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=10 * _JOIN_SECONDS,
            heartbeat_timeout_seconds=_SILENT_SECONDS,
            shutdown_timeout_seconds=_SILENT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        if alone and num_processes == 1 and isinstance(error, ValueError):
            return  # a single TPU VM, in no cluster
        reason = one_line(error)
        raise UserError(
            f"{who} cannot meet {where} ({reason}): give --coordinator=HOST:PORT, the "
            "address of process 0 with a port that is free there"
        ) from None
    finally:
        timer.cancel()
    # On TPU VMs only JAX knows the number; looking for devices does no harm there.
    unknown = alone and num_processes == 1
    _count = jax.process_count() if unknown else num_processes


def _check(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    if missing := [name for name, value in given.items() if value is None]:
        raise UserError(
            f"{missing[0]} is missing: give --coordinator, --num_processes and "
            "--process_id together"
        )
    found = re.fullmatch(r".+:([1-9]\d{0,4})", coordinator)
    if not found or int(found[1]) > 65535:
        raise UserError(
            f"--coordinator={coordinator} is not an address: write HOST:PORT of "
            "process 0, such as 10.0.0.2:8476"
        )
    if num_processes < 1:
        raise UserError(f"--num_processes={num_processes}: give at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is not one of {num_processes} processes: give "
            f"0 to {num_processes - 1}"
        )


def _on_tpu_vm() -> bool:
    chips = [*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def count() -> int:
    """How many processes train together."""
    return _count


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return _count == 1 or jax.process_index() == 0


def print_once(line: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(line, flush=True)


def run_on_first(make: Callable[[], T]) -> T:
    """Returns (or raises) in every process what `make` does in the first one.

    The others wait, for up to a day. What is returned must be picklable.

    Raises:
      UserError: `make` raised one, or a signal came meanwhile.
    """
    if _count == 1:
        return make()
    made = failed = None
    if is_first():
        try:
            made = make()
        except (UserError, Interrupt) as raised:
            error = raised.error if isinstance(raised, Interrupt) else raised
            failed = str(error), error.exit_status, error.label
    # Waits on the devices themselves give up after half a minute.
    everyone = {"timeout": _MAKE_SECONDS, "processes": set(range(_count))}
    ocp.multihost.sync_global_processes(f"made{next(_made)}", **everyone)
    content = np.frombuffer(pickle.dumps((made, failed)), np.uint8)
    whole, rest = multihost_utils.broadcast_one_to_all(
        np.int32(divmod(content.size, _CHUNK))
    )
    size = int(whole) * _CHUNK + int(rest)
    if not is_first():
        content = np.zeros(size, np.uint8)
    for start in range(0, size, _CHUNK):
        part = content[start : start + _CHUNK]
        sent = multihost_utils.broadcast_one_to_all(part)
        if not is_first():
            part[:] = sent
    made, failed = pickle.loads(content)
    if failed:
        text, status, label = failed
        error = UserError(text)
        error.exit_status, error.label = status, label
        raise error
    return made


def max_over_processes(number: int) -> int:
    """The largest of the numbers that the processes give, in every process."""
    if _count == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def exit_process(status: int) -> None:
    """Ends the process.

    After an error it waits neither for other processes nor for running compilations.
    """
    alone = _count > 1 and status in (1, 2)
    if alone or (status and compilation.is_busy()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
