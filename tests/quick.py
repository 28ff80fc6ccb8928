"""What compiles fast and runs slowly, for what runs once or is not what is tested."""

import contextlib
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
import pytest

from resnet_jax import compilation, models

_LEVEL = {"xla_backend_optimization_level": 0}
_OPTIONS = dict(_LEVEL)
if jax.__version_info__ < (0, 11):  # later ones compile loops in one way alone
    # Sooner, but what several programs compute alike is rounded less alike.
    _OPTIONS["xla_cpu_use_fusion_emitters"] = False
# For processes whose devices are not what is tested.
ENVIRONMENT = {
    "JAX_NUM_CPU_DEVICES": "1",
    "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in _OPTIONS.items()),
}

quick_jit = partial(jax.jit, compiler_options=_LEVEL)


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Trainings within are on one device."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        yield


@contextlib.contextmanager
def quick_compilation() -> Iterator[None]:
    """Trainings within compile fast, over any devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compilation.OPTIONS, "cpu", _OPTIONS)
        patch.setattr(compilation, "OPTIONS_SPAN_DEVICES", True)
        yield


@contextlib.contextmanager
def quick_training() -> Iterator[None]:
    """Trainings within compile fast, and are on one device."""
    with one_device(), quick_compilation():
        yield


def random_variables(net: models.ResNet, image_shape, dtype=np.float32) -> dict:
    """Values unlike any initial ones, so that no two leaves can be taken for another's.

    NumPy arrays, in the unrolled form.
    """
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(dtype)
        fan_in = max(np.prod(leaf.shape[:-1]), 8)
        return rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape).astype(dtype)

    shapes = declared_shapes(net.clone(scan=False), image_shape)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def declared_shapes(net: models.ResNet, image_shape: tuple[int, int, int]) -> dict:
    """The shapes and types that the network itself declares, in its own form."""
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return jax.eval_shape(net.init, jax.random.key(0), images)
