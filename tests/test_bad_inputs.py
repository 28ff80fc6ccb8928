"""Mistakes of every kind: status 2, one sentence with the way out, nothing touched."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from resnet_jax import command_line, evaluate, main, summary
from resnet_jax.data import archive, prepare
from resnet_jax.train import train_and_evaluate
from resnet_jax.trainer import Trainer
from tests.data.conftest import Tiny
from tests.quick import quick_training

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"
V1_20 = f"--config={ROOT}/configs/v1_20.py"
NEW = "--workdir=new"


def changes(text: str) -> list[str]:
    return [f"--config.{change}" for change in text.split()]


# What `run` was trained with, and what would train on the set in `sets`.
SMALL = [DIGITS, *changes("model.version=1 model.depth=8 model.width=4 steps=2")]
CIFAR = [V1_20, *changes("model.depth=8 batch_size=8 dataset.data_dir=sets"), NEW]
SET = "sets/cifar10/3.0.2"
TRAIN_FILE = f"{SET}/cifar10-train.array_record-00000-of-00001"
ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run, a prepared set of 40 and 10 images, and files of other kinds."""
    world = tmp_path_factory.mktemp("world")
    argv = ["main", *SMALL, f"--workdir={world / 'run'}"]
    with pytest.MonkeyPatch.context() as patch, quick_training():
        patch.setattr(main, "run", train_and_evaluate)  # without its report
        assert command_line.call(main.main, argv) == 0
    with pytest.MonkeyPatch.context() as patch:
        temporary = tmp_path_factory.mktemp("tmp")  # TFDS leaves directories in it
        patch.setattr(tempfile, "tempdir", str(temporary))
        Tiny("cifar10", patch).write(world / "sets")
        prepare.prepare("cifar10", world / "sets", "")
    (world / "sets" / ARCHIVE).unlink()
    (world / "file").write_text("mine")
    (world / "empty").mkdir()
    (world / "thesis").mkdir()
    (world / "thesis" / "chapter.tex").write_text("mine")
    return world


@pytest.fixture
def place(world, tmp_path, tmp_path_factory, monkeypatch):
    """A copy of `world`, which is the current directory; HOME is empty."""
    shutil.copytree(world, tmp_path / "here")
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
    # Files of one name would be one module, with what the last one left in it.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)

    def forbidden(*_, **__):
        raise AssertionError("not refused")

    monkeypatch.setattr(archive, "download", forbidden)
    monkeypatch.setattr(Trainer, "compile", forbidden)
    return tmp_path / "here"


def snapshot(directory: Path) -> dict:
    """Every directory, and every file with its time, size and content.

    But for ~/.cache, where what was read of a data set is kept.
    """
    found = {}
    for path in directory.rglob("*"):
        if ".cache" in path.parts:
            continue
        found[path] = None
        if path.is_file():
            stat = path.stat()
            found[path] = stat.st_mtime_ns, stat.st_size, path.read_bytes()
    return found


def assert_one_sentence(error: str, named) -> None:
    assert error.startswith("error: ")
    assert error.endswith("\n")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    for text in named:
        assert text in error


@pytest.fixture
def refused(place, capsys):
    """Runs a command that must fail as bad use does; returns its sentence."""

    def run(command, arguments, named=()):
        before = snapshot(place.parent)
        assert command_line.call(command, ["command", *arguments]) == 2
        error = capsys.readouterr().err
        assert_one_sentence(error, named)
        assert snapshot(place.parent) == before
        return error

    return run


# The first change is the one refused: the sentence has its field and value, and this.
FIELDS = [
    ("seed=-1", "at least 0"),
    ("seed=4294967296", "at most 4294967295"),
    ("seed=1.5", "give a whole number"),
    ("seeds=0", "at least 1"),
    ("epochs=-1", "at least 0"),
    ("epochs=0 steps=0", "set init_from to weights to evaluate"),
    ("epochs=99999999", "at most 1000000"),
    ("epochs=ten", "give a whole number"),
    ("epochs=1e3", "give a whole number"),
    ("epochs=", "give a whole number"),
    ("steps=-2", "at least 0"),
    ("steps=inf", "give a whole number"),
    ("batch_size=0", "at least 1"),
    ("batch_size=-8", "at least 1"),
    ("batch_size=64.0", "give a whole number"),
    ("batch_size=1440", "1,437 examples: choose a smaller one"),
    ("batch_size=64 dataset.train_split=train[:10]", "10 examples: choose a smaller"),
    ("batch_size=63", "8 devices: the nearest that do are 56 and 64"),
    ("batch_size=63 parallel=pmap", "8 devices: the nearest that do are 56 and 64"),
    ("batch_size=7", "the nearest that do are 8"),
    ("steps_per_call=-1", "at least 0"),
    ("eval_every=0", "at least 1"),
    ("parallel=pjit", "'jit', 'pmap'"),
    ("parallel=", "'jit', 'pmap'"),
    ("label_smoothing=1", "at most 0.999"),
    ("label_smoothing=-0.1", "at least 0"),
    ("label_smoothing=nan", "at least 0"),
    ("model.version=3", "choose one of 1, 2"),
    (
        "model.depth=57",
        "basic blocks, whose depths are 6n+2: the nearest are 56 and 62",
    ),
    ("model.depth=57 model.version=2", "9n+2: the nearest are 56 and 65"),
    ("model.depth=57 model.block=bottleneck", "9n+2: the nearest are 56 and 65"),
    ("model.depth=-1", "the nearest are 8 and 14"),
    ("model.depth=8.5", "give a whole number"),
    ("model.variant=kears", "'paper', 'keras'"),
    ("model.variant=keras model.block=basic", "fixes block"),
    ("model.variant=keras model.shortcut=B", "and stem: leave them out"),
    ("model.block=botleneck", "'basic', 'bottleneck'"),
    ("model.activation=prae", "'post', 'pre'"),
    ("model.shortcut=C", "'A', 'B'"),
    ("model.residual=maybe", "give true or false"),
    ("model.scan=2", "give true or false"),
    ("model.width=-1", "at least 0"),
    ("model.stem=stl10", "choose one of 'cifar', 'imagenet'"),
    ("model.depth=20 model.stem=imagenet", "18, 34, 50, 101, 152"),
    ("model.width=wide", "give a whole number"),
    ("model.dtype=float16", "'float32', 'bfloat16'"),
    ("dataset.image_size=-1", "at least 0"),
    ("dataset.image_size=5000", "at most 4096"),
    ("dataset.mirror=example.org", "begin it with https://"),
    ("dataset.train_split=", "write for example train"),
    ("dataset.train_split=train[", "write for example train"),
    ("dataset.train_split=train[:-1x]", "write for example train"),
    ("dataset.train_split=train[10]", "write for example train"),
    ("dataset.train_split=train[5:90%]", "write for example train"),
    ("dataset.train_split=trian", "did you mean 'train'?"),
    ("dataset.train_split=train[5:5]", "is empty: give a first bound below the last"),
    ("dataset.train_split=train[:2000]", "the 1437 examples of 'train': give bounds"),
    ("dataset.validation_split=valid", "choose one of train, test"),
    ("dataset.validation_split=train[1:2", "write for example train"),
    ("dataset.eval_split=tset", "did you mean 'test'?"),
    ("dataset.eval_split=test[:120%]", "the 360 examples of 'test': give bounds"),
    ("augment.normalization=minmax", "'mean', 'mean_std', 'pixel_mean'"),
    ("augment.crop=4", "at most 1"),
    ("augment.crop=nan", "at least 0"),
    ("augment.shift=-0.1 augment.crop=0", "at least 0"),
    ("augment.shift=0.1", "set it or augment.crop to 0"),
    ("augment.flip=sometimes", "give true or false"),
    ("optimizer.name=sdg", "'sgd'"),
    ("optimizer.learning_rate=0", "more than 0"),
    ("optimizer.learning_rate=-0.1", "more than 0"),
    ("optimizer.learning_rate=nan", "more than 0"),
    ("optimizer.learning_rate=inf", "at most"),
    ("optimizer.learning_rate=fast", "give a number"),
    ("optimizer.momentum=1.5", "at most 1"),
    ("optimizer.nesterov=", "give true or false"),
    ("optimizer.epsilon=0", "more than 0"),
    ("optimizer.weight_decay=-0.1", "at least 0"),
    ("optimizer.decay=l2", "'coupled', 'decoupled'"),
    ("optimizer.decay_on=kernel", "'kernels'"),
    ("optimizer.freeze=(stem", "give a regular expression"),
    ("optimizer.freeze=nothing", "matches no parameter"),
    ("optimizer.backbone_factor=0", "more than 0"),
    ("init_from=nowhere", "no such file or directory"),
    ("init_from=file", "cannot be read as safetensors"),
    ("init_from=empty", "holds no run"),
    ("optimizer.clip_norm=-1", "at least 0"),
    ("optimizer.bn_bias_factor=-1", "at least 0"),
    ("optimizer.ema=1", "at most 0.999999"),
    ("optimizer.accumulate=0", "at least 1"),
    ("optimizer.accumulate=3", "a divisor of batch_size (64)"),
    ("model.stochastic_depth=1", "at most 0.999"),
    ("model.zero_init=True model.residual=False", "or model.residual to True"),
    ("model.stochastic_depth=0.5 model.residual=False", "set it to 0.0, or"),
    ("augment.mean=(0.5,2) augment.std=(0.2,0.2)", "from 0 to 1"),
    ("augment.mean=(0.2,)", "as many as augment.std, one per channel"),
    ("augment.mean=(0.5,0.4) augment.std=(0.2,0.2)", "each of the 1 channels"),
    ("augment.cutout=2", "at most 1"),
    (
        "augment.cutout=0.05",
        "less than a pixel in images of 8 pixels: give 0.125 or more",
    ),
    (
        "augment.crop=0.05",
        "less than a pixel in images of 8 pixels: give 0.125 or more",
    ),
    ("augment.mixup=-1", "at least 0"),
    ("augment.mixup=1 augment.cutmix=1", "set it or augment.cutmix to 0"),
    ("augment.plain_epochs=-1", "at least 0"),
    ("augment.flip=False augment.alternating_flip=true", "to False, too"),
    ("augment.sizes=(4,)", "pixels, 8 or more"),
    ("augment.size_ends=() augment.sizes=(16,)", "for each of the 1 sizes"),
    ("augment.sizes=(8,) augment.size_ends=(0.5,)", "below the 8 pixels"),
    ("augment.size_ends=(0.5,0.2) augment.sizes=(16,16)", "in increasing order"),
    ("augment.size_ends=(1.5,) augment.sizes=(16,)", "between 0 and 1"),
    ("schedule.name=cos", "'cosine'"),
    ("schedule.boundaries=(0.75,0.5)", "in increasing order"),
    ("schedule.boundaries=(0.5,1.5)", "fractions between 0 and 1"),
    ("schedule.boundaries=(0.5,x)", "fractions between 0 and 1"),
    ("schedule.boundaries=", "fractions between 0 and 1"),
    ("schedule.factors=(0.1,0.01) schedule.boundaries=()", "of the 0 boundaries"),
    ("schedule.factors=()", "one number, 0 or more, for each of the 2 boundaries"),
    ("schedule.factors=(0.1,-1)", "0 or more, for"),
    ("schedule.warmup=cosine", "'linear', 'constant'"),
    ("schedule.warmup_epochs=-1", "at least 0"),
    ("schedule.warmup_epochs=nan", "at least 0"),
    ("schedule.warmup_epochs=5 schedule.name=onecycle", "set it to 0"),
    ("schedule.warmup_factor=2", "at most 1"),
    ("checkpoint.every=0", "at least 1"),
    ("checkpoint.every_minutes=-1", "at least 0"),
    ("checkpoint.keep=0", "at least 1"),
]


@pytest.mark.parametrize(("given", "fix"), FIELDS, ids=[row[0] for row in FIELDS])
def test_value_of_a_field(refused, given, fix):
    sentence = refused(main.main, [*SMALL, *changes(given), NEW], [fix])
    field, _, value = given.split()[0].partition("=")
    shown = sentence.replace("'", "").replace(" ", "")
    assert f"config.{field}=" in shown
    assert value in shown.split(f"config.{field}=")[1]


START = """
from configs import common
from ml_collections import ConfigDict

def get_config():
    config = common.get_config("smoke", version=1, depth=8)
"""
CONFIG_FILES = {
    "syntax error": ("def get_config(:\n", ["SyntaxError", "mine.py, line 1"]),
    "bytes": (bytes(range(256)), ["mine.py", "SyntaxError"]),
    "a picture": (b"\x89PNG\r\n\x1a\n", ["mine.py", "SyntaxError"]),
    "nothing": ("", ["mine.py", "does not define get_config()"]),
    "no get_config": (
        "def getconfig():\n    pass\n",
        ["not define get_config(): fix it"],
    ),
    "import": ("import not_a_module\n", ["mine.py", "'not_a_module'"]),
    "raises": (START + "    raise ValueError('too wide')\n", ["mine.py", "too wide"]),
    "ends the process": ("raise SystemExit\n", ["mine.py", "it calls exit"]),
    "returns a dict": (
        "def get_config():\n    return {'epochs': 3}\n",
        ["mine.py", "return a ConfigDict: fix it"],
    ),
    "returns nothing": (START, ["mine.py", "return a ConfigDict: fix it"]),
    "a group alone": (
        START + "    return config.model\n",
        ["config.activation is not a field", "did you mean config.model.activation?"],
    ),
    "an empty ConfigDict": (
        START + "    return ConfigDict()\n",
        ["config.augment is missing: set it, as in configs/common.py"],
    ),
}
# Set in a file, where no flag's parser is in between.
FILE_FIELDS = [
    ("epoch = 3", ["config.epoch is not a field", "did you mean 'epochs'?"]),
    ("model.dept = 8", ["config.model.dept", "did you mean 'depth'?"]),
    ("optimizer.learningrate = 0.2", ["did you mean 'learning_rate'?"]),
    ("xyz = 3", ["config.xyz is not a field", "see configs/common.py"]),
    ("model = ConfigDict({'depth': 8})", ["model.activation is missing: set it"]),
    ("model = 8", ["config.model=8", "the fields of"]),
    ("epochs = 'ten'", ["config.epochs='ten'", "give a whole number"]),
    ("epochs = None", ["config.epochs=None", "give a whole number"]),
    ("epochs = 2.5", ["config.epochs=2.5", "give a whole number"]),
    ("seed = True", ["config.seed=True", "give a whole number"]),
    ("batch_size = 64.0", ["config.batch_size=64.0", "give a whole number"]),
    ("model.depth = '8'", ["config.model.depth='8'", "give a whole number"]),
    ("model.residual = 'no'", ["config.model.residual='no'", "True or False"]),
    ("model.scan = 1", ["config.model.scan=1", "True or False"]),
    ("dataset.name = 5", ["config.dataset.name=5", "give a string"]),
    ("dataset.data_dir = None", ["config.dataset.data_dir=None", "give a string"]),
    ("optimizer.name = ['sgd']", ["config.optimizer.name=['sgd']", "give a string"]),
    (
        "optimizer.name = ConfigDict({'sgd': 1})",
        ["config.optimizer.name={'sgd': 1}", "give a string"],
    ),
    ("optimizer.learning_rate = '1'", ["learning_rate='1'", "give a number"]),
    ("schedule.boundaries = 0.5", ["boundaries=0.5", "give a tuple of numbers"]),
    ("schedule.boundaries = '0.5'", ["boundaries='0.5'", "give a tuple"]),
    ("model.depth = 9", ["config.model.depth=9", "8 and 14"]),
    ("augment.crop = float('nan')", ["config.augment.crop=nan", "at least 0"]),
]
CONFIG_FILES |= {
    line: (
        f"{START}    with config.ignore_type():\n        config.{line}\n"
        "    return config\n",
        named,
    )
    for line, named in FILE_FIELDS
}


@pytest.mark.parametrize(("content", "named"), CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_config_file(refused, place, content, named):
    content = content if isinstance(content, bytes) else content.encode()
    (place / "mine.py").write_bytes(content)
    refused(main.main, ["--config=mine.py", NEW], named)


# What to do to the copy of the world before, if anything.
def remove(name):
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def write(name, text):
    return lambda: Path(name).write_text(text)


def cut(name):
    return lambda: os.truncate(name, Path(name).stat().st_size // 2)


def wrong_archive():
    shutil.rmtree(SET)
    Path("sets", ARCHIVE).write_text("mine")


def directory_for_archive():
    shutil.rmtree(SET)
    Path("sets", ARCHIVE).mkdir()


def edit(**dataset):
    def change():
        config = json.loads(Path("run/config.json").read_text())
        config["dataset"] |= dataset
        Path("run/config.json").write_text(json.dumps(config))

    return change


def directory_for(path):
    def change():
        Path(path).unlink()
        Path(path).mkdir()

    return change


def data(change, *named, before=None):
    return main.main, [*CIFAR, *changes(change)], list(named), before


def train(*arguments, named, before=None):
    return main.main, list(arguments), named, before


def judge(*arguments, named, before=None):
    return evaluate.main, list(arguments), named, before


def show(*arguments, named):
    return summary.main, list(arguments), named, None


COMMANDS = {
    # Config files that cannot be, and recipes.
    "no config": train(NEW, named=["--config is missing", "--config=configs/"]),
    "config not there": train("--config=v2_65.py", named=["v2_65.py", "configs/"]),
    "config a directory": train("--config=thesis", named=["--config=thesis"]),
    "config without value": train("--config", named=["--config=FILE"]),
    "config behind a space": train("--config", "file", named=["--config=FILE"]),
    "unknown recipe": train(
        f"{V1_20}:kears",
        named=[
            "recipe 'kears'",
            "did you mean 'keras'?",
            "paper, keras, strong, fast, smoke",
        ],
    ),
    "recipe like no other": train(f"{V1_20}:zz", named=["'zz'", "choose one of paper"]),
    "empty recipe": train(f"{V1_20}:", named=["recipe ''", "choose one of paper"]),
    # Flags.
    "misspelt field": train(
        DIGITS,
        "--config.bach_size=8",
        named=["--config.bach_size", "did you mean 'batch_size'?"],
    ),
    "misspelt group": train(
        DIGITS, "--config.modle.depth=8", named=["modle.depth", "mean 'model'?"]
    ),
    "field like no other": train(
        DIGITS, "--config.zzz=8", named=["--config.zzz", "see configs/common.py"]
    ),
    "field like no other of a group": train(
        DIGITS,
        "--config.dataset.test_split=test",
        named=["--config.dataset.test_split", "that group has", "eval_split"],
    ),
    "field of a field": train(
        DIGITS, "--config.epochs.x=8", named=["--config.epochs.x", "configs/common.py"]
    ),
    "misspelt flag": train(
        DIGITS,
        "--wrkdir=new",
        named=["--wrkdir is not a flag", "did you mean --workdir?"],
    ),
    "unknown flag": train(DIGITS, "--zzz=1", NEW, named=["--zzz is not", "--help"]),
    "stray argument": train(DIGITS, NEW, "go", named=["'go'", "--FLAG=VALUE"]),
    "false behind a space": train(
        DIGITS, NEW, "--config.model.scan", "false", named=["'false'", "equals sign"]
    ),
    "field without dashes": train(
        DIGITS, NEW, "epochs=3", named=["'epochs=3'", "--FLAG=VALUE"]
    ),
    "dash of a word processor": train(
        DIGITS, "\u2014-workdir=new", named=["\u2014-workdir=new", "--FLAG=VALUE"]
    ),
    "empty workdir": train(DIGITS, "--workdir=", named=["--workdir=", "directory"]),
    "workdir without value": train(DIGITS, "--workdir", named=["--workdir=VALUE"]),
    "field without value": train(
        DIGITS, NEW, "--config.epochs", named=["--config.epochs=VALUE"]
    ),
    # Fields that exclude each other.
    "too many steps": train(
        *SMALL,
        "--config.steps=1000000000",
        NEW,
        named=["config.steps=1,000,000,000 makes", "lower it"],
    ),
    "overlapping splits": train(
        *SMALL,
        "--config.dataset.validation_split=train[1400:]",
        NEW,
        named=[
            "config.dataset.train_split and config.dataset.validation_split share 37",
            "give for example config.dataset.train_split=train[:1400]",
        ],
    ),
    "one split for both": train(
        *SMALL,
        "--config.dataset.validation_split=train",
        NEW,
        named=["share 1437 examples", "config.dataset.validation_split=train[90%:]"],
    ),
    "without workdir": train(
        *SMALL, "--config.dataset.eval_split=tset", named=["'tset'", "'test'"]
    ),
    # Working directories.
    "workdir a file": train(
        *SMALL, "--workdir=file", named=["--workdir=file", "give a directory"]
    ),
    "workdir below a file": train(
        *SMALL, "--workdir=file/a/b", named=["file/a/b: file is a file", "directory"]
    ),
    "two workdirs": train(
        *SMALL, "--workdir=a", "--workdir=b", named=["--workdir=a and --workdir=b"]
    ),
    "workdir with other files": train(
        *SMALL, "--workdir=thesis", named=["--workdir=thesis", "new or empty directory"]
    ),
    "workdir of another config": train(
        *SMALL,
        "--config.seed=1",
        "--config.model.width=16",
        "--workdir=run",
        named=["model.width 4 -> 16; seed 0 -> 1", "give another --workdir"],
    ),
    "workdir of a longer run": train(
        *SMALL,
        "--config.steps=1",
        "--workdir=run",
        named=["--workdir=run is at step 2", "ends the run at 1: give more"],
    ),
    "workdir whose config is damaged": train(
        *SMALL,
        "--workdir=run",
        named=["run/config.json is damaged", "restore or delete it"],
        before=cut("run/config.json"),
    ),
    "workdir whose summary is damaged": train(
        *SMALL,
        "--workdir=run",
        named=["run/summary.json is damaged", "restore or delete it"],
        before=cut("run/summary.json"),
    ),
    "workdir whose summary is a directory": train(
        *SMALL,
        "--workdir=run",
        named=["run/summary.json is damaged", "restore or delete it"],
        before=directory_for("run/summary.json"),
    ),
    "workdir whose metrics have no step": train(
        *SMALL,
        "--config.steps=3",
        "--workdir=run",
        named=["run/metrics.jsonl is damaged (a line without a step)", "delete it"],
        before=lambda: Path("run/metrics.jsonl").write_text('{"step": null}\n'),
    ),
    "workdir whose checkpoint is damaged": train(
        *SMALL,
        "--config.steps=3",
        "--workdir=run",
        named=["run/checkpoints: every checkpoint is damaged", "restore one"],
        before=cut("run/checkpoints/2/record/metadata"),
    ),
    "bad field in the workdir of a run": train(
        *SMALL, "--config.epochs=-1", "--workdir=run", named=["config.epochs=-1"]
    ),
    "bad data in an empty workdir": train(
        *SMALL,
        "--config.dataset.eval_split=tset",
        "--workdir=empty",
        named=["'tset'", "did you mean 'test'?"],
    ),
    "flagfile not there": train(*SMALL, "--flagfile=nowhere", named=["nowhere"]),
    "workdir with a name too long": train(
        *SMALL, f"--workdir={'x' * 300}", named=["--workdir=xxx", "another directory"]
    ),
    "workdir that cannot be made": train(
        *SMALL, "--workdir=/proc/x", named=["--workdir=/proc/x", "another directory"]
    ),
    "accumulate under pmap": train(
        *SMALL,
        "--config.parallel=pmap",
        "--config.optimizer.accumulate=64",
        NEW,
        named=["config.optimizer.accumulate=64", "choose a divisor"],
    ),
    # Evaluation.
    "evaluate: config without fields": judge(
        "--workdir=run",
        named=["config.", "is missing", "set it"],
        before=write("run/config.json", "{}"),
    ),
    "evaluate: no workdir": judge(named=["--workdir is missing", "directory of a run"]),
    "evaluate: workdir a word": judge(
        "run", named=["'run' does not belong to a flag", "did you mean --workdir=run?"]
    ),
    "evaluate: not a run": judge(
        "--workdir=thesis", named=["--workdir=thesis holds no run", "directory of one"]
    ),
    "evaluate: workdir a file": judge(
        "--workdir=file", named=["--workdir=file holds no run", "directory of one"]
    ),
    "evaluate: part of a run": judge(
        "--workdir=run/checkpoints", named=["--workdir=run/checkpoints holds no run"]
    ),
    "evaluate: misspelt workdir": judge(
        "--workdir=rnu", named=["--workdir=rnu holds no run", ", such as run"]
    ),
    "evaluate: config cut off": judge(
        "--workdir=run",
        named=["run/config.json is damaged", "restore or delete it"],
        before=cut("run/config.json"),
    ),
    "evaluate: config empty": judge(
        "--workdir=run",
        named=["run/config.json is damaged", "restore or delete it"],
        before=write("run/config.json", ""),
    ),
    "evaluate: config a list": judge(
        "--workdir=run",
        named=["run/config.json is damaged", "restore or delete it"],
        before=write("run/config.json", "[]"),
    ),
    "evaluate: no checkpoint": judge(
        "--workdir=run",
        named=["--workdir=run has no latest checkpoint", "none yet"],
        before=remove("run/checkpoints"),
    ),
    "evaluate: checkpoint damaged": judge(
        "--workdir=run",
        named=["run/checkpoints: every checkpoint is damaged", "restore one"],
        before=cut("run/checkpoints/2/record/metadata"),
    ),
    "evaluate: no best": judge(
        "--workdir=run",
        "--checkpoint=best",
        named=["--workdir=run has no best checkpoint", "no validation split"],
    ),
    "evaluate: checkpoint=worst": judge(
        "--workdir=run",
        "--checkpoint=worst",
        named=["--checkpoint=worst", "give latest, best, or the step of one"],
    ),
    "evaluate: checkpoint of another step": judge(
        "--workdir=run",
        "--checkpoint=7",
        named=["--workdir=run has no checkpoint of step 7", "give one of 2"],
    ),
    "evaluate: checkpoint without value": judge(
        "--workdir=run", "--checkpoint", named=["--checkpoint"]
    ),
    "evaluate: data set gone": judge(
        "--workdir=run",
        named=["config.dataset.data_dir=gone is not a directory", "mkdir -p"],
        before=edit(name="cifar10", data_dir="gone"),
    ),
    "evaluate: data set renamed": judge(
        "--workdir=run",
        named=["config.dataset.name=digit ", "did you mean 'digits'?"],
        before=edit(name="digit"),
    ),
    # The summary of a network.
    "summary: no config": show(named=["--config is missing", "--config=configs/"]),
    "summary: depth": show(
        DIGITS, "--config.model.depth=57", named=["model.depth=57", "56 and 65"]
    ),
    "summary: image_size=0": show(
        DIGITS, "--image_size=0", named=["--image_size='0'", "positive integer"]
    ),
    "summary: classes": show(
        DIGITS, "--num_classes=many", named=["--num_classes='many'"]
    ),
    # Data sets.
    "data: misspelt name": data(
        "dataset.name=cifr10",
        "config.dataset.name=cifr10",
        "did you mean 'cifar10'?",
    ),
    "data: name like no other": data(
        "dataset.name=qqqqq", "config.dataset.name=qqqqq", "cifar100", "digits and fake"
    ),
    "data: a path for a name": data("dataset.name=../sets", "name=../sets", "digits"),
    "data: needs TensorFlow": data(
        "dataset.name=stl10", "config.dataset.name=stl10", "tfds build stl10"
    ),
    "data: other version": data(
        "dataset.name=cifar10:3.0.1", "name=cifar10:3.0.1", "data_dir=DIR"
    ),
    "data: data_dir not there": data(
        "dataset.data_dir=gone", "config.dataset.data_dir=gone", "mkdir -p"
    ),
    "data: data_dir of no user": data(
        "dataset.data_dir=~nobody-here/x", "data_dir=~nobody-here/x", "no such user"
    ),
    "data: data_dir a file": data(
        "dataset.data_dir=file", "config.dataset.data_dir=file", "not a directory"
    ),
    "data: unknown split": data(
        "dataset.eval_split=valid", "eval_split='valid'", "choose one of train, test"
    ),
    "data: beyond the end": data(
        "dataset.train_split=train[:41]", "train_split='train[:41]'", "40 examples"
    ),
    "data: batch too large": data("batch_size=48", "batch_size=48", "40 examples"),
    "data: records cut off": data(
        "seed=0", SET, "array_record", "run again", before=cut(TRAIN_FILE)
    ),
    "data: records missing": data(
        "seed=0", SET, "array_record", "run again", before=remove(TRAIN_FILE)
    ),
    "data: info cut off": data(
        "seed=0",
        "dataset_info.json",
        "delete it",
        before=cut(f"{SET}/dataset_info.json"),
    ),
    "data: features missing": data(
        "seed=0", "features.json", "delete it", before=remove(f"{SET}/features.json")
    ),
    "data: archive a directory": data(
        "seed=0",
        f"sets/{ARCHIVE} is not the official archive",
        "delete it",
        before=directory_for_archive,
    ),
    "data: wrong archive": data(
        "seed=0",
        f"sets/{ARCHIVE} is not the official archive (it has 4 of 170052171 bytes",
        "put the right one there",
        before=wrong_archive,
    ),
}


@pytest.mark.parametrize(
    ("command", "arguments", "named", "before"), COMMANDS.values(), ids=COMMANDS
)
@pytest.mark.usefixtures("place")
def test_command(refused, command, arguments, named, before):
    if before:
        before()
    refused(command, arguments, named)


def test_data_directory_of_the_environment(refused, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gone")
    without = [argument for argument in CIFAR if "data_dir" not in argument]
    refused(main.main, without, ["TFDS_DATA_DIR=gone is not a directory", "mkdir -p"])


def test_rows_are_many_and_differ():
    rows = [*FIELDS, *CONFIG_FILES, *COMMANDS]
    assert len(rows) > 180
    assert len({row[0] for row in FIELDS}) == len(FIELDS)


@pytest.mark.parametrize(
    ("module", "arguments", "named"),
    [
        ("main", ["--config=nope.py"], ["--config=nope.py", "configs/"]),
        pytest.param(
            "main",
            [*SMALL, "--config.batch_size=63", NEW],
            ["batch_size=63", "56 and 64"],
            marks=pytest.mark.slow,
        ),
        # Opens the checkpoints, of which libraries might tell more on stderr.
        ("evaluate", ["--workdir=run", "--checkpoint=best"], ["no validation split"]),
        ("summary", [DIGITS, "--config.model.depth=57"], ["depth=57", "56 and 65"]),
    ],
    ids=["main", "main, with devices", "evaluate", "summary"],
)
def test_process(place, module, arguments, named):
    before = snapshot(place)
    ended = subprocess.run(
        [sys.executable, "-m", f"resnet_jax.{module}", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert_one_sentence(ended.stderr, named)
    assert snapshot(place) == before
