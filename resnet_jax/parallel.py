"""One program over all devices: under jit on a mesh, or under pmap.

A function to run is written once, for replicated arguments (state, dataset, counts) and
arguments sharded by example. Under 'jit' it sees the whole batch, and XLA divides the
work: BatchNorm is over the batch. Under 'pmap' each device runs it on its own part of
the batch, with BatchNorm over that part, and averages over `axis_name`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from resnet_jax import UserError, compilation, one_line

_AXIS = "data"
# oneDNN gains 13 to 16% of a step on images of 12 to 24 pixels a side, nothing on 8.
_ONEDNN_PIXELS = 12
# One device is 1.1 to 1.45 times as fast as two on images of 8 and 12 pixels a side and
# about as fast on 16. On 24 pixels v1-20 is 1.4 times as fast on two, v2-29 a little
# slower, and on 32 two gain 2 to 6% (but v2-29, -3%; two cores, jax 0.12).
_ONE_DEVICE_PIXELS = 16


def add_cpu() -> None:
    """Adds the CPU if `JAX_PLATFORMS` leaves it out: variables are drawn on it.

    Call before JAX looks for devices, which joining other processes may make it do.
    """
    platforms = (jax.config.jax_platforms or "cpu").split(",")
    if "cpu" not in platforms:
        jax.config.update("jax_platforms", ",".join([*platforms, "cpu"]))


def require_devices() -> None:
    """Looks for devices.

    Raises:
      UserError: those that `JAX_PLATFORMS` names are not here.
    """
    wanted = os.environ.get("JAX_PLATFORMS", "")
    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        raise UserError(
            f"JAX finds no devices ({one_line(error)}): check JAX_PLATFORMS={wanted}"
        ) from None
    # `add_cpu` added the CPU, which JAX uses if it finds none of the others.
    if platform == "cpu" and wanted and "cpu" not in wanted.split(","):
        raise UserError(
            f"JAX_PLATFORMS={wanted}: there is no such device here: correct or unset it"
        )


def split_cpu(batch_size: int, processes: int = 1, image_size: int = 0) -> None:
    """Makes JAX see a CPU as one device per core; call before JAX looks for devices.

    XLA runs reductions and elementwise work on only one core of a device. The number of
    devices is the largest divisor of a process's part of the batch up to the number of
    cores. It is one for small images, and before jax 0.12, where with our options one
    is as fast, and several give wrong results (`compilation.OPTIONS_SPAN_DEVICES`).
    Does nothing if `JAX_NUM_CPU_DEVICES` sets the number, or if JAX has devices
    already. Adds a CPU if there would be none, see `add_cpu`.

    Args:
      batch_size: over all processes.
      processes: how many share the batch.
      image_size: pixels a side; 0: unknown, treated as not small.
    """
    add_cpu()
    if "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    cores, small = 1, 0 < image_size < _ONE_DEVICE_PIXELS
    spans = compilation.OPTIONS_SPAN_DEVICES and not small
    if spans and hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    part = max(1, batch_size // processes)
    devices = max(n for n in range(1, cores + 1) if part % n == 0)
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # JAX is initialised
        return


@dataclasses.dataclass(frozen=True)
class Parallel:
    """Devices, and how functions run on them.

    Attributes:
      mode: 'jit' or 'pmap'.
      mesh: all devices, along one axis.
      allow_onednn: whether programs may call oneDNN.
    """

    mode: str
    mesh: Mesh
    allow_onednn: bool

    @classmethod
    def over(
        cls,
        devices: list,
        mode: str,
        batch_size: int,
        image_shape: tuple[int, int, int] | None = None,
        fast_start: bool = False,
    ) -> "Parallel":
        """Uses `devices`, each of which takes an equal part of a batch.

        Args:
          devices: all, in order.
          mode: 'jit' or 'pmap'.
          batch_size: over all of them.
          image_shape: of the images that programs are for, if they are for images.
          fast_start: whether a fast start matters more than speed, which on a CPU may
            require compiling programs at each start.

        Raises:
          UserError: the batch does not divide evenly.
        """
        count = len(devices)
        if batch_size % count:
            below = batch_size // count * count
            near = [size for size in (below, below + count) if size]
            raise UserError(
                f"config.batch_size={batch_size} does not divide evenly among "
                f"{count} devices: the nearest that do are "
                f"{' and '.join(map(str, near))}"
            )
        mesh = jax.make_mesh(
            (count,), (_AXIS,), axis_types=(AxisType.Auto,), devices=devices
        )
        small = image_shape is not None and max(image_shape[:2]) < _ONEDNN_PIXELS
        return cls(mode, mesh, allow_onednn=not small and not fast_start)

    @property
    def axis_name(self) -> str | None:
        """Axis to average over in a function; None where it sees the whole batch."""
        return _AXIS if self.mode == "pmap" else None

    @property
    def uses_onednn(self) -> bool:
        """Whether programs do call oneDNN."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return on_cpu and self.allow_onednn and compilation.onednn_available()

    @property
    def device_count(self) -> int:
        return self.mesh.size

    def replicate(self, tree: Any) -> Any:
        """Places host arrays whole on every device."""
        if self.mode == "jit":
            return jax.tree.map(self._whole, tree)
        # One copy per device, along a first axis that pmap removes again.
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
        # may overwrite.
        return jax.tree.map(np.array, jax.device_get(tree))

    def compile(
        self,
        function: Callable,
        *args: Any,
        donated: tuple[int, ...] = (),
        inference: bool = False,
    ) -> compilation.Program:
        """Compiles a function for arguments like `args`; its results are replicated.

        It is traced at once and compiled in the background. On a GPU it is then run
        once on these arguments, of which the donated ones are copied first.

        Args:
          function: to run.
          *args: placed by `replicate` or `shard`.
          donated: indices of the arguments whose memory the results may reuse.
          inference: whether it is only a forward pass, which on a CPU is faster without
            XLA's library of loops.
        """
        if self.mode == "pmap":
            jitted = jax.pmap(function, axis_name=_AXIS, donate_argnums=donated)
        else:
            whole = NamedSharding(self.mesh, PartitionSpec())
            jitted = jax.jit(function, out_shardings=whole, donate_argnums=donated)
        return compilation.compile_program(
            jitted,
            args,
            tuple(self.mesh.devices.flat),
            onednn=self.uses_onednn,
            inference=inference,
            donated=donated,
        )
