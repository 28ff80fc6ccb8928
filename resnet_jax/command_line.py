"""From a command line to flags and a checked config; mistakes become sentences."""

import ast
import difflib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common
from resnet_jax import UserError, bucket, config, hosts

# Filesystem errors that only the user can fix.
_ACCESS_ERRNOS = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


def run(main: Callable[[list[str]], None]) -> None:
    """Ends the process with the status that `call` returns for its command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be text
    hosts.exit_process(call(main, sys.argv))


def call(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit status: 0, the error's, 130 or 141."""
    try:
        with bucket.sent_at_end():
            main([argv[0], *_config_first(argv[1:])])
    except UserError as error:
        print(f"{error.label}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # what shells give for SIGINT
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # and for SIGPIPE
    except OSError as error:
        if error.errno not in _ACCESS_ERRNOS or not error.filename:
            raise
        print(
            f"error: {error.filename} cannot be used ({error.strerror}): fix that, or "
            "give another path",
            file=sys.stderr,
        )
        return 2
    return 0


def _config_first(arguments: list[str]) -> list[str]:
    """Puts a config file before the changes to its fields, as ml_collections wants."""
    return sorted(arguments, key=lambda each: not each.startswith("--config="))


def list_commands(package: str, argv: list[str]) -> None:
    """Prints the commands of a package, which is not a command itself.

    Raises:
      UserError: something else was asked of it.
    """
    if argv[1:] not in ([], ["--help"]):
        raise UserError(
            f"{argv[1]} needs a command, as in `python -m {package}.COMMAND "
            f"{argv[1]}`: `python -m {package}` lists the commands"
        )
    root, does = Path(__file__).parents[1] / package, {}
    for path in (*root.glob("[!_]*.py"), *root.glob("*/__main__.py")):
        if '\nif __name__ == "__main__":' in (source := path.read_text()):
            name = path.parent.name if path.stem == "__main__" else path.stem
            does[name] = ast.get_docstring(ast.parse(source)).splitlines()[0]
    width = max(map(len, does))
    print(f"Commands for python -m {package}.COMMAND (--help explains each):\n")
    for name, sentence in sorted(does.items()):
        print(f"  {name:<{width}}  {sentence}")


def parse(
    argv: list[str], doc: str, define: Callable[[flags.FlagValues], None]
) -> flags.FlagValues:
    """Parses a command line; `--help` prints `doc` and the flags, and exits.

    Args:
      argv: the command's name and its arguments.
      doc: what the command does.
      define: defines the command's flags on the values that it is given.

    Raises:
      UserError: an argument that is not a flag, an unknown flag or config field, an
        invalid value, or several directories for one run.
    """
    values, arguments = parse_with_arguments(argv, doc, define)
    if arguments:
        fix = "write --FLAG=VALUE, with an equals sign"
        if "workdir" in values and Path(arguments[0]).is_dir():
            fix = f"did you mean --workdir={arguments[0]}?"
        raise UserError(f"{arguments[0]!r} does not belong to a flag: {fix}")
    return values


def parse_with_arguments(
    argv: list[str], doc: str, define: Callable[[flags.FlagValues], None]
) -> tuple[flags.FlagValues, list[str]]:
    """Does what `parse` does, and also returns the arguments that are not flags."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow arguments
    flags.DEFINE_bool("help", False, "Show this and exit.", flag_values=values)
    _require_config_file(argv)
    try:
        define(values)  # reads --flagfile, too
        own = list(values)
        rest = values(argv)
    except UserError:
        raise
    except flags.Error as error:
        raise UserError(_explain_flag_error(argv, error, "config" in values)) from None
    # What is left is ml_collections' about a field, or anything a config file raises.
    except (Exception, SystemExit) as error:
        raise UserError(
            _misspelt(argv, error) or _explain_config_error(argv, error)
        ) from None
    if values.help:
        print(doc.strip(), "\n\nFlags:")
        for name in own:
            default = values[name].default_as_str
            told = f" (default: {default[1:-1]})" if values[name].default else ""
            print(f"  --{name}: {values[name].help}{told}")
        sys.exit(0)
    given = [argument for argument in argv if re.match("--?workdir=", argument)]
    if len(given) > 1 and isinstance(values.workdir, str):
        raise UserError(f"{given[-2]} and {given[-1]} are two directories: give one")
    return values, rest[1:]


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config`, whose fields can be changed by `--config.FIELD=VALUE`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, such as configs/v2_56.py, or with a recipe, "
        "configs/v2_56.py:keras; --config.FIELD=VALUE changes one of its fields "
        "(configs/common.py has them all).",
        flag_values=values,
        sys_argv=argv,
    )


def checked_config(values: flags.FlagValues) -> ConfigDict:
    """The value of `--config`, validated; see `config.validate`.

    Raises:
      UserError: there is none, its file is missing, or a field is invalid.
    """
    if not values["config"].present:
        raise UserError(
            "--config is missing: give one, such as --config=configs/v2_56.py"
        )
    chosen = values.config
    if not isinstance(chosen, ConfigDict):
        file = config_flags.get_config_filename(values["config"])
        reason = "its get_config() does not return a ConfigDict"
        try:
            getattr(chosen, "epochs", None)
        except OSError as error:  # ml_collections held it back until now
            reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"--config={file} failed: {reason}: fix it")
    config.validate(chosen)
    return chosen


def _config_file(argv: list[str]) -> str | None:
    given = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    return given[-1] if given else None


def _require_config_file(argv: list[str]) -> None:
    if "--config" in argv[1:]:
        raise UserError("--config needs an equals sign: write --config=FILE")
    file = _config_file(argv)
    if file is None or Path(file.partition(":")[0]).is_file():
        return
    name, colon, recipe = file.partition(":")
    own = Path("configs")
    place = own if own.is_dir() else Path(common.__file__).parent
    there, stem = [path.stem for path in place.glob("[!_]*.py")], Path(name).stem
    hint = f"give one of {place}/"
    if close := difflib.get_close_matches(stem, there, n=1):
        hint = f"did you mean {place / close[0]}.py{colon}{recipe}?"
    other = re.fullmatch(r"(v[12])_(\d+)", stem)
    if other and stem not in there and (base := f"{other[1]}_20") in there:
        hint = (
            f"for another depth, give --config={place / base}.py{colon}{recipe} "
            f"--config.model.depth={other[2]}"
        )
    raise UserError(f"--config={file}: there is no such file: {hint}")


def _explain_flag_error(argv: list[str], error: flags.Error, has_config: bool) -> str:
    """A sentence for what absl finds wrong with a flag or its value."""
    message = " ".join(str(error).split())
    if "Traceback (most recent call last):" in message:  # of the config file
        last = str(error).strip().splitlines()[-1].strip()
        last = re.sub(r"<class '([\w.]+)'>", r"\1", last)
        frames = re.findall(r'File "(.+)", line (\d+)', str(error))
        return f"{_failed_at(argv, frames)}: {last}: fix it"
    if isinstance(error, flags.UnrecognizedFlagError):
        close = re.search(r"Did you mean: (\w+)", message)
        hint = f"did you mean --{close[1]}?" if close else "--help lists the flags"
        field = config.find_field(error.flagname.rpartition(".")[2])
        if field and has_config:
            hint = f"did you mean --config.{field}?"
        return f"--{error.flagname} is not a flag: {hint}"
    if found := re.match(r"Missing value for flag (\S+)", message):
        return f"{found[1]} has no value: write {found[1]}=VALUE"
    found = re.match(r"flag (--[\w.]+)=(.*?): (.*)", message)
    if not found:
        return message
    flag, value, reason = found.groups()
    if "as a ConfigDict" in reason:
        group = flag.removeprefix("--config.")
        named = "name" in common.default().get(group, {})
        hint = f": did you mean {flag}.name={value}?" if named else ""
        return f"{flag}={value!r}: it is a group of fields{hint}"
    if value.startswith("--"):
        return f"{flag} has no value: write {flag}=VALUE"
    for told, fix in {
        "invalid literal for int()": "give a whole number",
        "could not convert string to float": "give a number",
        "Non-boolean argument": "give true or false",
    }.items():
        if told in reason:
            reason = fix
    return f"{flag}={value!r}: {reason}"


def _explain_config_error(argv: list[str], error: Exception | SystemExit) -> str:
    message = " ".join(str(error).split())
    if "has no attribute 'get_config'" in message:
        return f"--config={_config_file(argv)} does not define get_config(): fix it"
    if isinstance(error, SystemExit):
        message = "it calls exit"
    frames = [frame[:2] for frame in traceback.extract_tb(error.__traceback__)]
    return f"{_failed_at(argv, frames)}: {type(error).__name__}: {message}: fix it"


def _failed_at(argv: list[str], frames: list[tuple]) -> str:
    """Says that the config file failed, and in which line; frames are (file, line)."""
    given = _config_file(argv)
    if not given:
        return "a flag failed"
    file = Path(given.partition(":")[0]).resolve()
    lines = [line for name, line in frames if Path(name).resolve() == file]
    return f"--config={given} failed" + (f" in line {lines[-1]}" if lines else "")


def _misspelt(argv: list[str], error: Exception | SystemExit) -> str | None:
    """The sentence about an unknown field, if that is what the error is about."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if "ml_collections" not in raised_in.parts or not isinstance(
        error, AttributeError | KeyError
    ):
        return None
    message = str(error)
    found = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    name = re.search(r"\.(\w+) does not exist", message) or re.search(
        r"'(\w+)", message
    )
    if not name or "get_config" in message:
        return None
    name = found[2] if found else name[1]
    given = [arg.partition("=")[0] for arg in argv if arg.startswith("--config.")]
    field = next((arg for arg in given if name in arg.split(".")), f"--config.{name}")
    group = common.default().get(field.split(".")[1])
    has = field.count(".") == 2 and isinstance(group, ConfigDict)
    ending = f"that group has {', '.join(group)}" if has else "see configs/common.py"
    if found:
        ending = f"did you mean {found[1]!r}?"
    known = config.find_field(name)
    if known and f"--config.{known}" != field:
        ending = f"did you mean --config.{known}?"
    elif known:
        ending = f"--config={_config_file(argv)} does not define it: add it there"
    return f"{field} is not a field of the config: {ending}"
