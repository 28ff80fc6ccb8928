import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from absl import flags

from configs import common
from resnet_jax import UserError, command_line, data, evaluate, main, summary

ROOT = Path(__file__).parents[1]
DIGITS = f"--config={ROOT}/configs/digits.py"
V1_20 = f"--config={ROOT}/configs/v1_20.py"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty current directory, and a home with nothing in it."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    # Files of one name would be one module, with what the last one left in it.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    return directory


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs the command, which must fail as bad use does; returns its sentence."""

    def run(*arguments, command=main.main):
        before = sorted(tmp_path.rglob("*"))
        assert command_line.call(command, ["command", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.endswith("\n")
        assert error.count("\n") == 1
        assert "Traceback" not in error
        # Python's own ways of writing strings and errors, which are no sentences.
        for debris in ("\\n", "\\'", "<class", "object has no attribute"):
            assert debris not in error
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return run


def assert_names(sentence, *texts):
    for text in texts:
        assert text in sentence


@pytest.mark.parametrize("file", ["nope.py", "configs/v2_65.py:keras", "."])
def test_config_file_that_is_not_there(refused, file):
    assert_names(refused(f"--config={file}"), f"--config={file}")


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("def get_config():\n    return 1 / 0\n", "division by zero"),
        ("def get_config(recipe='paper'):\n    return 1 / 0\n", "division by zero"),
        ("def get_config():\n    raise ValueError('too wide')\n", "too wide"),
        ("def get_config(recipe):\n    pass\n", "'recipe'"),
        ("def get_config(:\n", "line 1"),
        ("import not_a_module\n", "not_a_module"),
        ("settings = 3\n", "get_config"),
        ("open('missing.txt')\n", "missing.txt"),
        ("def get_config():\n    return None\n", ""),
        ("def get_config():\n    return 3\n", ""),
    ],
    ids=[
        "error",
        "error in a recipe",
        "error with a sentence",
        "recipe needed",
        "syntax",
        "import",
        "no get_config",
        "file that it reads",
        "returns None",
        "returns a number",
    ],
)
def test_config_file_with_an_error_in_it(refused, place, text, cause):
    (place / "mine.py").write_text(text)
    sentence = refused("--config=mine.py")
    assert_names(sentence, "mine.py", cause)
    assert "there is no such file" not in sentence


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--config.epoch", "epochs"),
        ("--config.bach_size", "batch_size"),
        ("--config.model.dept", "depth"),
        ("--config.optimizer.learningrate", "learning_rate"),
        ("--config.modle.depth", "model"),
    ],
)
def test_misspelt_field_is_named_with_the_nearest(refused, flag, hint):
    sentence = refused(DIGITS, f"{flag}=3")
    assert_names(sentence, f"{flag} is not a field", f"did you mean {hint!r}")


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epochs", "epochs"),
        ("--depth", "model.depth"),
        ("--lr", "optimizer.learning_rate"),
        ("--config.lr", "optimizer.learning_rate"),
        ("--config.optimizer.lr", "optimizer.learning_rate"),
        ("--config.learning_rate", "optimizer.learning_rate"),
        ("--config.optimizer.bs", "batch_size"),
    ],
)
def test_field_by_another_path_or_its_initials_is_found(refused, flag, meant):
    sentence = refused(DIGITS, f"{flag}=3")
    assert_names(sentence, f"{flag} is not a", f"did you mean --config.{meant}?")


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("v1_20", "configs/v1_20.py"),
        ("configs/v1_20:keras", "configs/v1_20.py:keras"),
        ("configs/digts.py", "configs/digits.py"),
        ("configs/resnet.py", ""),
    ],
)
def test_config_file_that_is_nearly_there_is_found(refused, place, given, meant):
    (place / "configs").symlink_to(ROOT / "configs")
    hint = f"did you mean {meant}?" if meant else "give one of configs/"
    assert refused(f"--config={given}").endswith(f"no such file: {hint}\n")


def test_config_file_of_another_depth_is_told_of_the_field(refused, place):
    (place / "configs").symlink_to(ROOT / "configs")
    assert refused("--config=configs/v2_65.py:keras").endswith(
        "for another depth, give --config=configs/v2_20.py:keras "
        "--config.model.depth=65\n"
    )


@pytest.mark.parametrize("field", ["batch_size", "lr"])
def test_commands_without_a_config_are_not_given_its_fields(refused, field):
    for flag in (f"--{field}", f"--config.{field}"):
        sentence = refused("--workdir=run", f"{flag}=3", command=evaluate.main)
        assert_names(sentence, f"{flag} is not a flag", "--help lists the flags")


def test_value_for_a_group_is_told_with_the_field(refused):
    sentence = refused(DIGITS, "--config.optimizer=adam")
    assert_names(sentence, "a group", "did you mean --config.optimizer.name=adam?")
    assert_names(refused(DIGITS, "--config.model=resnet"), "it is a group of fields")


def test_field_that_a_config_of_ones_own_lacks_is_told(refused, place):
    (place / "mine.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'epochs': 3})\n"
    )
    sentence = refused("--config=mine.py", "--config.steps=3")
    assert_names(
        sentence, "--config.steps is not a field", "mine.py does not define it"
    )


@pytest.mark.parametrize("error", ["ZeroDivisionError", "TypeError"])
def test_error_in_a_config_file_has_its_line(refused, place, error):
    fault = {"ZeroDivisionError": "1 / 0", "TypeError": "config.update(epochs='ten')"}
    (place / "mine.py").write_text(
        "from configs import common\n"
        "def get_config():\n"
        "    config = common.default()\n"
        f"    {fault[error]}\n"
        "    return config\n"
    )
    assert_names(refused("--config=mine.py"), f"=mine.py failed in line 4: {error}")


@pytest.mark.parametrize(
    "flag", ["--config.zzz", "--config.model.zzz", "--config.model.depth.zzz"]
)
def test_field_like_no_other_is_named(refused, flag):
    assert_names(refused(DIGITS, f"{flag}=3"), f"{flag} is not a field")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", "ten"),
        ("epochs", "1.5"),
        ("epochs", ""),
        ("seed", "nan"),
        ("model.depth", "20.0"),
        ("model.scan", "maybe"),
        ("optimizer.learning_rate", "fast"),
        ("schedule.boundaries", "(0.5,x)"),
        ("schedule.factors", "(0.1,x)"),
        ("model", "3"),
    ],
)
def test_value_of_another_type_is_named(refused, field, value):
    sentence = refused(DIGITS, f"--config.{field}={value}")
    assert f"config.{field}=" in sentence
    assert value.strip("()").split(",")[-1] in sentence


def test_workdir_that_cannot_be_written(refused, place):
    (place / "closed").mkdir(mode=0o500)
    if os.access(place / "closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    sentence = refused(DIGITS, "--workdir=closed/run")
    assert_names(sentence, "--workdir=closed/run", "is not writable")


@pytest.mark.parametrize("arguments", [["--help"], [DIGITS, "--help"]])
def test_help_prints_the_command_and_its_flags(capsys, place, arguments):
    with pytest.raises(SystemExit) as raised:
        command_line.call(main.main, ["main", *arguments])
    assert raised.value.code in (0, None)
    output = capsys.readouterr()
    assert not output.err
    assert "Trains a network." in output.out
    assert "python -m resnet_jax.main --config=configs/v2_56.py" in output.out
    for flag in ("--config: ", "--workdir: ", "--help: "):
        assert output.out.count(flag) == 1
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    ("package", "command", "does"),
    [
        ("resnet_jax", "report", "Writes a run's report.html, or compares several"),
        ("experiments", "sweep", "Tries every combination of a grid's values"),
    ],
)
def test_package_lists_its_commands(capsys, package, command, does):
    listed = partial(command_line.list_commands, package)
    assert command_line.call(listed, [package]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == [command]]
    assert does in line
    assert len(lines) > 7
    assert all(len(line) < 120 for line in lines)
    assert command_line.call(listed, [package, "--config=x"]) == 2
    assert f"`python -m {package}.COMMAND --config=x`" in capsys.readouterr().err


def test_summary_needs_no_data(capsys):
    config = f"--config={ROOT}/configs/image_folder.py"
    assert command_line.call(summary.main, ["summary", config]) == 0
    told = capsys.readouterr().out
    assert "image_folder is not read (give --num_classes" in told
    assert "): 10 classes, 32x32x3 pixels, 60,000" in told
    assert "269,722" in told


def test_a_config_may_follow_the_changes_to_its_fields(capsys):
    arguments = ["--config.model.depth=32", V1_20, "--config.model.width=8"]
    assert command_line.call(summary.main, ["summary", *arguments]) == 0
    assert "stage3_block2-5/conv1" in capsys.readouterr().out


@pytest.mark.slow
def test_summary_knows_the_data_that_can_be_had_here(capsys):
    config = f"--config={ROOT}/configs/digits.py"
    shallow = "--config.model.depth=11"
    for given, told in (
        ([], ("digits: 10 classes, 8x8x1 pixels, 1,797 examples", "590,138")),
        ([shallow, "--channels=3"], ("8x8x3 pixels",)),
        ([shallow, "--config.dataset.name=cifar100"], ("100 classes, 32x32x3 pixels",)),
    ):
        assert command_line.call(summary.main, ["summary", config, *given]) == 0
        output = capsys.readouterr().out
        assert all(text in output for text in told)
    for name in ("digits", "fake"):
        config = common.default().dataset
        config.name = name
        loaded = data.load(config)
        count = len(loaded.train.labels) + len(loaded.eval.labels)
        known = (loaded.num_classes, loaded.image_shape, count)
        assert data.KNOWN[name] == known


def test_help_tells_defaults(capsys):
    with pytest.raises(SystemExit):
        command_line.call(evaluate.main, ["evaluate", "--help"])
    output = capsys.readouterr().out
    told = "'latest', 'best' by validation, or a step. (default: latest)\n"
    assert told in output
    assert "--help: Show this and exit.\n" in output


def test_call_returns_the_status_of_the_error(capsys):
    class StoppedError(UserError):
        exit_status = 1

    def stop(argv):
        raise StoppedError(f"{argv[1]} stopped")

    assert command_line.call(stop, ["name", "it"]) == 1
    assert capsys.readouterr().err == "error: it stopped\n"
    assert command_line.call(lambda argv: None, ["name"]) == 0
    assert not capsys.readouterr().err


def test_a_closed_place_is_a_sentence(capsys):
    def closed(argv):
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/there")

    assert command_line.call(closed, ["name"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: /closed/there cannot be used (Permission denied): ")


def test_call_lets_errors_of_the_program_through():
    def broken(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command_line.call(broken, ["name"])


def test_fields_are_changed_in_the_order_of_the_command_line():
    def define(values):
        command_line.define_config(values, argv)
        flags.DEFINE_string("workdir", None, "Where.", flag_values=values)

    argv = ["main", f"{V1_20}:keras", "--config.epochs=3", "--workdir=a=b"]
    argv += ["--config.model.scan", "--config.schedule.boundaries=(0.2,0.4)"]
    argv += ["--config.schedule.factors=(1,0.5)", "--config.epochs=4"]
    values = command_line.parse(argv, "", define)
    config = command_line.checked_config(values)
    assert values.workdir == "a=b"
    assert config.epochs == 4
    assert config.model.scan is True
    assert config.model.variant == "keras"
    assert tuple(config.schedule.boundaries) == (0.2, 0.4)
    assert tuple(config.schedule.factors) == (1, 0.5)


def python(place, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--config=nope.py"], "nope.py"),
        ([DIGITS, "--config.model.dept=20"], "--config.model.dept"),
    ],
)
def test_process_ends_with_status_2_and_one_line(place, arguments, named):
    ended = python(place, "resnet_jax.main", *arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert named in ended.stderr
    assert not ended.stdout
    assert not list(place.iterdir())


def test_process_that_helps_ends_with_status_0(place):
    ended = python(place, "resnet_jax.main", "--help")
    assert ended.returncode == 0
    assert "--workdir" in ended.stdout
    assert not ended.stderr


def test_reader_that_has_seen_enough_ends_the_process_quietly(place):
    command = f"{sys.executable} -m resnet_jax.summary {V1_20}"
    ended = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 141
    assert not ended.stderr
