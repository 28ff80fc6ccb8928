"""How XLA compiles programs: its options by platform, and what keeps the results.

On a CPU, convolutions may be oneDNN's, of which the compilation cache keeps nothing. On
a GPU, programs are CUDA graphs.
"""

import contextlib
import contextvars
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
_YNN = "xla_cpu_experimental_ynn_fusion_type"
OPTIONS = {
    # Loops by XLA's library of kernels, which are faster than those it compiles, and
    # convolutions and matrix products by oneDNN. `Parallel.over` and `compile_program`
    # say what does without.
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


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, in ~/.cache/resnet_jax.

    `JAX_COMPILATION_CACHE_DIR` names another place.
    """
    if not jax.config.jax_compilation_cache_dir:
        directory = Path.home() / ".cache" / "resnet_jax"
        jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compile_program(
    jitted: Callable,
    args: tuple,
    devices: tuple,
    onednn: bool,
    inference: bool,
    donated: tuple[int, ...],
) -> Callable:
    """Compiles a function under `jax.jit` or `jax.pmap` for arguments like `args`.

    On a GPU it is run with them, of which the donated ones stay.

    Args:
      jitted: the function.
      args: its arguments, placed.
      devices: that it is placed on.
      onednn: whether it calls oneDNN, which there must be.
      inference: it is a forward pass alone, which on a CPU is faster without the
        library's elementwise loops.
      donated: numbers of the arguments whose memory the results may take.
    """
    platform = devices[0].platform
    options = dict(OPTIONS.get(platform, {}))
    if _YNN in options and inference:
        # They would take the products and convolutions before them along, in a
        # slower form. v2-56: 1.2 times as fast on jax 0.10.2, 1.5 on 0.12.0.1.
        options[_YNN] = "LIBRARY_FUSION_TYPE_REDUCE"
    if not onednn:
        options.pop(_ONEDNN, None)
    with _traced_for(onednn=_ONEDNN in options):
        lowered = jitted.lower(*args)
    if _ONEDNN in options:
        compiled = _compile_once(lowered, options, devices)
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
    """Compiles with those of the options that this jaxlib knows."""
    try:
        return lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        unknown = {name for name in options if name in str(error)}
        if not unknown:
            raise
        names = ", ".join(sorted(unknown))
        print(f"note      slower without {names} ({_brief(error)})")
    known = {name: options[name] for name in options.keys() - unknown}
    return _compile(lowered, known)


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
