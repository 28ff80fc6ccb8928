"""TensorFlow stays out of the process, also where it is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from ml_collections import ConfigDict
from resnet_jax import data
from resnet_jax.data import archive

assert not {"tensorflow_datasets", "sklearn", "scipy"} & set(sys.modules)
root = Path(sys.argv[1])
real = archive.official
# The tiny archives pass for the official ones.
archive.official = lambda name: [
    file._replace(sha256=archive.sha256(root / file.name)) for file in real(name)
]

def load(name):
    fields = dict(name=name, data_dir=sys.argv[1], mirror="", image_size=0)
    fields |= dict(path="", split_seed=0, stream="auto")
    splits = dict(train_split="train", validation_split="", eval_split="test")
    return data.load(ConfigDict(fields | splits))

load("digits")
load("fake")
assert "tensorflow_datasets" not in sys.modules
for name in sys.argv[2:]:
    assert len(load(name).train.labels) == 40
    assert len(load(name).eval.labels) == 10
try:
    load("unheard_of")
except data.UserError:
    pass
assert "tensorflow_datasets" in sys.modules
assert not {"tensorflow", "jax"} & set(sys.modules)
"""


@pytest.mark.slow
def test_no_tensorflow(tiny, tmp_path):
    stand_in = tmp_path / "site" / "tensorflow" / "__init__.py"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text("raise SystemExit('tensorflow was imported')")
    names = ("cifar10", "cifar100", "fashion_mnist", "svhn_cropped")
    for name in names:
        tiny(name).write(tmp_path)
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, tmp_path, *names],
        cwd=Path(__file__).parents[2],
        env=os.environ
        | {"PYTHONPATH": str(stand_in.parents[1]), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == len(names)  # One line as each is prepared.
