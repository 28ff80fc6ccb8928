"""How XLA compiles programs: its options by platform, and what caches the results.

It compiles in the background, so that programs are compiled while others are traced. On
a CPU, convolutions may be calls to oneDNN, which the compilation cache cannot keep. On
a GPU, programs are CUDA graphs.
"""

import contextlib
import contextvars
import functools
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax import one_line

_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
_YNN = "xla_cpu_experimental_ynn_fusion_type"
OPTIONS = {
    # Loops from XLA's library of kernels, which are faster than those it compiles, and
    # convolutions and matrix products from oneDNN. `Parallel.over` and
    # `compile_program` say which programs go without.
    "cpu": {
        _YNN: "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_ELTWISE",
        _ONEDNN: True,
    },
    # All steps of a call form one CUDA graph: by default convolutions and the loop are
    # left to the host, which launches kernels more slowly than they finish. And
    # independent kernels run concurrently. A step of v1-20, batch 128, on an H100: 1.63
    # ms by default, 1.43 as a graph, 1.05 with both.
    "gpu": {
        "xla_gpu_enable_command_buffer": (
            "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,"
            "DYNAMIC_SLICE_FUSION,CONVOLUTION,WHILE"
        ),
        "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
    },
}

# Seen on jaxlib 0.10.2: a program over two devices that is compiled with YNN's option,
# even an empty one, gives wrong results from some iteration of a loop on: about the
# 25th or the 52nd evaluated batch, or between the 20th and 80th update. Without
# options, on one device, or on 0.12.0.1 they are right.
OPTIONS_SPAN_DEVICES = jax.__version_info__ >= (0, 12)


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, in ~/.cache/resnet_jax.

    `JAX_COMPILATION_CACHE_DIR` names another place.
    """
    if not jax.config.jax_compilation_cache_dir:
        directory = Path.home() / ".cache" / "resnet_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


_threads = futures.ThreadPoolExecutor(4, thread_name_prefix="compile")
_running: set[futures.Future] = set()


def is_busy() -> bool:
    """Whether a program is being compiled."""
    return bool(_running)


class Program:
    """A program that is compiled in the background. Calling it waits for that."""

    def __init__(
        self, compile_it: Callable[[], Callable], finish: Callable[[Callable], Callable]
    ):
        """Calls `compile_it` in a thread, and later `finish` with what it returned."""
        self._compiling, self._finish = _threads.submit(compile_it), finish
        _running.add(self._compiling)
        self._compiling.add_done_callback(_running.discard)

    def __call__(self, *args: Any) -> Any:
        return self.result()(*args)

    def result(self) -> Callable:
        """What JAX compiled. Raises JaxRuntimeError where XLA cannot."""
        if self._compiling:
            self._compiled = self._finish(self._compiling.result())
            self._compiling = self._finish = None  # they keep the arguments alive
        return self._compiled

    @staticmethod
    def wait(programs: Iterable["Program"]) -> None:
        """Waits for programs. On a GPU, none runs until all are compiled."""
        programs = list(programs)
        futures.wait([each._compiling for each in programs if each._compiling])
        for program in programs:
            program.result()


def compile_program(
    jitted: Callable,
    args: tuple,
    devices: tuple,
    onednn: bool,
    inference: bool,
    donated: tuple[int, ...],
) -> Program:
    """Traces a function for arguments like `args`, and begins to compile it.

    On a GPU it is then run once on `args`, of which the donated ones are copied first.

    Args:
      jitted: the function, under `jax.jit` or `jax.pmap`.
      args: its arguments, placed on the devices.
      devices: those that it runs on.
      onednn: whether it calls oneDNN, which must then be available.
      inference: whether it is only a forward pass, which on a CPU is faster without
        XLA's library of loops.
      donated: indices of the arguments whose memory the results may reuse.
    """
    platform = devices[0].platform
    options = dict(OPTIONS.get(platform, {}))
    if platform == "cpu" and len(devices) > 1 and not OPTIONS_SPAN_DEVICES:
        options = {}
    if _YNN in options and inference:
        # The library's loops would absorb the products and convolutions before them,
        # in a slower form. v2-56: 1.2 times as fast without them on jax 0.10.2, 1.5 on
        # 0.12.0.1.
        options[_YNN] = ""
    if not onednn:
        options.pop(_ONEDNN, None)
    with _traced_for(onednn=_ONEDNN in options):
        lowered = jitted.lower(*args)
    if _YNN in options and "bf16" in lowered.as_text():
        options[_YNN] = ""  # the library handles no elementwise loops in bfloat16

    def compile_it() -> Callable:
        if _ONEDNN in options:
            return _compile_once(lowered, options, devices)
        return _compile(lowered, options)

    def finish(compiled: Callable) -> Callable:
        on_gpu = platform == "gpu"
        return _warmed_up(compiled, lowered, args, donated) if on_gpu else compiled

    return Program(compile_it, finish)


_compiled: dict[tuple, Callable] = {}  # the last few, by what they were compiled from


def _compile_once(
    lowered: jax.stages.Lowered, options: dict, devices: tuple
) -> Callable:
    """Compiles what the compilation cache cannot keep, unless this process has it."""
    program = hashlib.sha256(lowered.as_text().encode()).digest()
    key = (program, lowered.in_tree, lowered.out_tree, *options.items(), devices)
    compiled = _compiled.get(key)
    if compiled is None:
        with _uncached():
            compiled = _compile(lowered, options)
        with _lock:
            _compiled[key] = compiled
            if len(_compiled) > 8:
                del _compiled[next(iter(_compiled))]
    return compiled


_lock, _saved_thresholds = threading.Lock(), []


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Within this context the compilation cache keeps nothing, in any thread.

    XLA cannot save calls to oneDNN.
    """
    name = "jax_persistent_cache_min_compile_time_secs"
    with _lock:
        _saved_thresholds.append(getattr(jax.config, name))
        jax.config.update(name, math.inf)
    try:
        yield
    finally:
        with _lock:
            # The last to leave restores what the first found.
            jax.config.update(name, _saved_thresholds.pop())


# Not an argument, since it is read where Flax calls `convolve`.
_calls_onednn = contextvars.ContextVar("calls_onednn", default=False)


@contextlib.contextmanager
def _traced_for(onednn: bool) -> Iterator[None]:
    token = _calls_onednn.set(onednn)
    try:
        yield
    finally:
        _calls_onednn.reset(token)


def tracing_for_onednn() -> bool:
    """Whether the program that is being traced will call oneDNN."""
    return _calls_onednn.get()


@functools.cache
def onednn_available() -> bool:
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
    """Compiles with those of the options that this jaxlib knows."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        unknown = {name for name in options if name in str(error)}
        if not unknown:
            raise
        names = ", ".join(sorted(unknown))
        print(f"note      slower, as XLA rejects {names} ({one_line(error, 100)})")
    known = {name: options[name] for name in options.keys() - unknown}
    return _compile(lowered, known)


def _warmed_up(
    graph: Callable,
    lowered: jax.stages.Lowered,
    args: tuple,
    donated: tuple[int, ...],
) -> Callable:
    """Runs a CUDA graph and returns it or, if it fails, a program that does the same.

    A convolution's kernel is loaded when it first runs, which must not happen while the
    graph is captured. XLA's autotuning sees to that, unless its outcome is in the
    compilation cache. Then the same program runs once without a graph, and the graph
    again: XLA discards what it has captured of it when it compiles another.
    """

    def run(program: Callable) -> None:
        copies = (
            jax.tree.map(jnp.copy, arg) if number in donated else arg
            for number, arg in enumerate(args)
        )
        jax.block_until_ready(program(*copies))

    try:
        run(graph)
        return graph
    except jax.errors.JaxRuntimeError:
        plain = lowered.compile()
        run(plain)
    try:
        run(graph)
        return graph
    except jax.errors.JaxRuntimeError as error:
        print(f"note      slower, without a CUDA graph ({one_line(error, 100)})")
        return plain
