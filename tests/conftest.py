import os
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Programs compiled by one run of the tests serve the next.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest
from jaxtyping import install_import_hook

# Checks the shapes in annotations at every call.
install_import_hook("resnet_jax", "beartype.beartype")


@pytest.fixture
def quick_training(monkeypatch):
    """Trainings on one device that compile fast, where they are not what is tested."""
    from resnet_jax import parallel

    one, options = jax.devices()[:1], {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    monkeypatch.setitem(parallel._COMPILER_OPTIONS, "cpu", options)
