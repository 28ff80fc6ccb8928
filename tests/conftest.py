import os
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Programs compiled by one run of the tests serve the next.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook

# Checks the shapes in annotations at every call.
install_import_hook("resnet_jax", "beartype.beartype")
