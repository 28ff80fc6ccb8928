"""One program over all devices: under jit on a mesh, or under pmap.

A function to run is written once, of replicated arguments (state, dataset, counts) and
of arguments sharded by example. Under 'jit' it sees the whole batch, and XLA divides
the work: BatchNorm is over the batch. Under 'pmap' each device runs it on its own part
of the batch, with BatchNorm over that part, and averages by `axis_name`.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from resnet_jax import UserError

_AXIS = "data"
_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
# On images of 8 pixels a side it gains nothing, and 13 to 16% of a step on 12 to 24.
_ONEDNN_PIXELS = 12
_YNN = "xla_cpu_experimental_ynn_fusion_type"
_COMPILER_OPTIONS = {
    # Loops by XLA's library of kernels, which are faster than those it compiles, and
    # convolutions and matrix products by oneDNN; see `Parallel.over` and `compile` for
    # what does without.
    "cpu": {
        _YNN: "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE",
        _ONEDNN: True,
    },
    # All steps of a call are one CUDA graph: by default convolutions and the loop are
    # left to the host, which starts kernels more slowly than they end. And kernels that
    # do not need each other run at once. A step of v1-20, batch 128, on an H100: 1.63
    # ms by default, 1.43 as a graph, 1.05 with both.
    "gpu": {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,"
            "DYNAMIC_SLICE_FUSION,CONVOLUTION,WHILE"
        ),
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    },
}


def split_cpu(batch_size: int, processes: int = 1) -> None:
    """Makes JAX see a CPU as one device a core; call before JAX looks for devices.

    XLA leaves reductions and elementwise work on one core of a device. Takes the
    largest divisor of a process's part of the batch up to the number of cores. Does
    nothing where `JAX_NUM_CPU_DEVICES` says how many, or where JAX has devices already.
    A CPU that `JAX_PLATFORMS` leaves out is added behind: variables are drawn on it.
    """
    platforms = (jax.config.jax_platforms or "cpu").split(",")
    if "cpu" not in platforms:
        jax.config.update("jax_platforms", ",".join([*platforms, "cpu"]))
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    part = max(1, batch_size // processes)
    devices = max(n for n in range(1, cores + 1) if part % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX is initialised
        return


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, in ~/.cache/resnet_jax.

    `JAX_COMPILATION_CACHE_DIR` names another place.
    """
    if not jax.config.jax_compilation_cache_dir:
        directory = Path.home() / ".cache" / "resnet_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices, and how functions run on them.

    Attributes:
      mode: 'jit' or 'pmap'.
      mesh: all devices, along one axis.
      onednn: whether programs may call oneDNN.
    """

    mode: str
    mesh: Mesh
    onednn: bool

    @classmethod
    def over(
        cls,
        devices: list,
        mode: str,
        batch_size: int,
        image_shape: tuple[int, int, int] | None = None,
        brief: bool = False,
    ) -> "Parallel":
        """Uses `devices`, each of which takes an equal part of a batch.

        Args:
          devices: all, in order.
          mode: 'jit' or 'pmap'.
          batch_size: over all of them.
          image_shape: of the images that programs are for, if they are for images.
          brief: a soon start counts for more than speed, which on a CPU may need that
            programs are compiled at each start.

        Raises:
          UserError: the batch does not divide.
        """
        count = len(devices)
        if batch_size % count:
            below = batch_size // count * count
            near = [size for size in (below, below + count) if size]
            raise UserError(
                f"config.batch_size={batch_size} does not divide among {count} "
                f"devices: the nearest that do are {' and '.join(map(str, near))}"
            )
        mesh = jax.make_mesh(
            (count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices
        )
        small = image_shape is not None and max(image_shape[:2]) < _ONEDNN_PIXELS
        return cls(mode, mesh, onednn=not small and not brief)

    @property
    def axis_name(self) -> str | None:
        """Axis to average over in a function; None where it sees the whole batch."""
        return _AXIS if self.mode == "pmap" else None

    @property
    def calls_onednn(self) -> bool:
        """Whether programs do call oneDNN."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return on_cpu and self.onednn and has_onednn()

    @property
    def device_count(self) -> int:
        return self.mesh.size

    def replicate(self, tree: Any) -> Any:
        """Places host arrays whole on every device."""
        if self.mode == "jit":
            return jax.tree.map(self._whole, tree)
        # One copy a device, along a first axis that pmap takes away again.
        return jax.tree.map(self._copies, tree)

    def _whole(self, leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        sharding = NamedSharding(self.mesh, PartitionSpec())
        return jax.make_array_from_callback(leaf.shape, sharding, lambda _: leaf)

    def _copies(self, leaf: ArrayLike) -> jax.Array:
        leaf = np.asarray(leaf)
        shape = (self.device_count, *leaf.shape)
        sharding = NamedSharding(self.mesh, PartitionSpec(_AXIS))
        return jax.make_array_from_callback(shape, sharding, lambda _: leaf[None])

    def shard(self, array: np.ndarray) -> jax.Array:
        """Places a host array, its first axis (examples) spread over the devices."""
        if self.mode == "pmap":
            array = array.reshape(self.device_count, -1, *array.shape[1:])
        sharding = NamedSharding(self.mesh, PartitionSpec(_AXIS))
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    def fetch(self, tree: Any) -> Any:
        """Copies a replicated tree to the host."""
        if self.mode == "pmap":
            tree = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data[0], tree)
        # On a CPU `device_get` may return the device's own memory, which a later call
        # is free to write over.
        return jax.tree.map(np.array, jax.device_get(tree))

    def compile(
        self,
        function: Callable,
        *args: Any,
        sharded: tuple[int, ...] = (),
        donated: tuple[int, ...] = (),
        inference: bool = False,
    ) -> Callable:
        """Compiles a function for arguments like `args`; its results are replicated.

        On a GPU it is run with them, of which the donated ones stay.

        Args:
          function: to run.
          *args: placed by `replicate` or `shard`.
          sharded: numbers of the arguments that `shard` placed.
          donated: numbers of the arguments whose memory the results may take.
          inference: it is a forward pass alone, which on a CPU is faster without the
            library's elementwise loops.
        """
        platform = self.mesh.devices.flat[0].platform
        options = dict(_COMPILER_OPTIONS.get(platform, {}))
        if not self.calls_onednn:
            options.pop(_ONEDNN, None)
        if _YNN in options and inference:
            # They would take the products and convolutions before them along, in a
            # slower form. v2-56: 1.2 times as fast on jax 0.10.2, 1.5 on 0.12.0.1.
            options[_YNN] = "LIBRARY_FUSION_TYPE_REDUCE"
        if self.mode == "pmap":
            jitted = jax.pmap(function, axis_name=_AXIS, donate_argnums=donated)
        else:
            whole = NamedSharding(self.mesh, PartitionSpec())
            parts = NamedSharding(self.mesh, PartitionSpec(_AXIS))
            placed = tuple(
                parts if number in sharded else whole for number in range(len(args))
            )
            jitted = jax.jit(
                function,
                in_shardings=placed,
                out_shardings=whole,
                donate_argnums=donated,
            )
        with _traced_for(onednn=_ONEDNN in options):
            lowered = jitted.lower(*args)
        if _ONEDNN in options:
            compiled = _compile_once(lowered, options, tuple(self.mesh.devices.flat))
        else:
            compiled = _compile(lowered, options)
        if platform == "gpu":
            return _warmed_up(compiled, lowered, args, donated)
        return compiled


_compiled: dict[tuple, Callable] = {}  # the last few, by what made them


def _compile_once(
    lowered: jax.stages.Lowered, options: dict, devices: tuple
) -> Callable:
    """Compiles what the compilation cache cannot keep, or finds it in this process."""
    program = hashlib.sha256(lowered.as_text().encode()).digest()
    key = (program, lowered.in_tree, lowered.out_tree, *options.items(), devices)
    if key not in _compiled:
        with _uncached():
            _compiled[key] = _compile(lowered, options)
        if len(_compiled) > 8:
            del _compiled[next(iter(_compiled))]
    return _compiled[key]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Within, the compilation cache keeps nothing: XLA cannot save calls of oneDNN."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


_calls_onednn = contextvars.ContextVar("calls_onednn", default=False)


@contextlib.contextmanager
def _traced_for(onednn: bool) -> Iterator[None]:
    token = _calls_onednn.set(onednn)
    try:
        yield
    finally:
        _calls_onednn.reset(token)


def calls_onednn() -> bool:
    """Whether the program that is being traced will call oneDNN."""
    return _calls_onednn.get()


@functools.cache
def has_onednn() -> bool:
    """Whether XLA for CPU can call oneDNN here: from jaxlib 0.11 on, on x86."""
    one = jax.ShapeDtypeStruct((1, 3, 3, 1), jnp.float32)
    lowered = jax.jit(lambda x: jax.lax.conv(x, x, (1, 1), "SAME")).lower(one)
    with _uncached():
        try:
            program = lowered.compile(compiler_options={_ONEDNN: True})
        except jax.errors.JaxRuntimeError:  # no such option
            return False
    return "__onednn$" in program.as_text()


def _compile(lowered: jax.stages.Lowered, options: dict) -> Callable:
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not options or "option" not in str(error):
            raise  # anything but a jaxlib that does not know the option
        print(f"note      no compiler options here, which is slower ({_brief(error)})")
    return lowered.compile()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:100]


def _warmed_up(
    graph: Callable, lowered: jax.stages.Lowered, args: tuple, donated: tuple[int, ...]
) -> Callable:
    """Runs a CUDA graph, and returns it, or what does the same where it fails.

    A convolution's kernel is loaded when it first runs, which must not be while the
    graph is recorded. XLA's trials of algorithms see to that, unless their outcome is
    in the compilation cache. So a program that is no graph runs before.
    """

    def run(program: Callable) -> None:
        copies = (
            jax.tree.map(jnp.copy, arg) if number in donated else arg
            for number, arg in enumerate(args)
        )
        jax.block_until_ready(program(*copies))

    plain = lowered.compile()
    run(plain)
    try:
        run(graph)
    except jax.errors.JaxRuntimeError as error:
        print(f"note      no CUDA graph here, which is slower ({_brief(error)})")
        return plain
    return graph
