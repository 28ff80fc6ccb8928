import os
from pathlib import Path

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Programs compiled by one run of the tests serve the next.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest
from jaxtyping import install_import_hook

# Checks the shapes in annotations at every call.
install_import_hook("resnet_jax", "beartype.beartype")


@pytest.fixture
def float64():
    """JAX computes in float64 where it is given float64."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_compilation():
    """Trainings that compile fast, where compiled programs are not what is tested."""
    from tests import quick

    with quick.quick_compilation():
        yield


@pytest.fixture
def quick_training():
    """The same on one device, where devices are not what is tested either."""
    from tests import quick

    with quick.quick_training():
        yield


@pytest.fixture(scope="module")
def quick_trainings():
    """The same for a module, and the fixtures that ask for it."""
    from tests import quick

    with quick.quick_training():
        yield


# Their long tests, or what is trained for them, come first: at the end of a run one
# process would be left alone with them.
_LONG = (
    *("test_tour", "test_train", "test_hosts", "test_seeds", "test_streaming"),
    *("test_bucket", "test_experiments_", "test_faults", "test_page", "test_explain"),
    *("test_export", "test_predict", "test_finetune", "test_evaluate"),
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.name.startswith(_LONG))
