"""From a command line to flags and a checked config; mistakes are told in sentences."""

import re
import sys
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from resnet_jax import UserError, config


def run(main: Callable[[list[str]], None]) -> None:
    """Ends the process with what `call` returns for its own command line."""
    sys.exit(call(main, sys.argv))


def call(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Runs a command and returns its exit status: 0, or the error's."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def parse(
    argv: list[str], doc: str, define: Callable[[flags.FlagValues], None]
) -> flags.FlagValues:
    """Parses a command line; `--help` prints `doc` and the flags, and exits.

    Args:
      argv: the command's name and its arguments.
      doc: what the command does.
      define: defines the command's flags on the values that it is given.

    Raises:
      UserError: an argument that is no flag, an unknown flag or config field, or a
        value that does not fit.
    """
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "Show this and exit.", flag_values=values)
    define(values)
    own = list(values)
    if "--config" in argv[1:]:
        raise UserError("--config needs an equals sign: write --config=FILE")
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(_cause(error)) from None
    except (AttributeError, KeyError) as error:  # ml_collections: no such field
        raise UserError(_misspelt(argv, error)) from None
    except TypeError as error:
        raise UserError(f"a value of --config does not fit: {error}") from None
    if len(rest) > 1:
        raise UserError(
            f"{rest[1]!r} belongs to no flag: write --FLAG=VALUE, with an equals sign"
        )
    if values.help:
        print(doc.strip(), "\n\nFlags:")
        for name in own:
            print(f"  --{name}: {values[name].help}")
        sys.exit(0)
    return values


def define_config(values: flags.FlagValues, argv: list[str]) -> None:
    """Defines `--config`, whose fields can be changed by `--config.FIELD=VALUE`."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "A config file, as configs/v2_56.py, or with a recipe, configs/v2_56.py:keras; "
        "--config.FIELD=VALUE changes a field of it (configs/common.py has them all).",
        flag_values=values,
        sys_argv=argv,
    )


def checked_config(values: flags.FlagValues) -> ConfigDict:
    """The value of `--config`, validated.

    Raises:
      UserError: there is none, its file is not there, or a field does not hold.
    """
    chosen = values.config
    if chosen is None:
        raise UserError("--config is missing: give one, as --config=configs/v2_56.py")
    if not isinstance(chosen, ConfigDict):  # stands for an error in loading the file
        file = config_flags.get_config_filename(values["config"])
        raise UserError(f"--config={file}: there is no such file: give one of configs/")
    config.validate(chosen)
    return chosen


def _cause(error: Exception) -> str:
    """An error's cause, without the traceback that some messages contain."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Traceback (most recent call last):" not in lines:
        return " ".join(lines)
    ours = re.match(r"[\w.]*UserError: (.*)", lines[-1])
    return ours[1] if ours else f"{lines[0].split(' Error')[0]} failed: {lines[-1]}"


def _misspelt(argv: list[str], error: Exception) -> str:
    name, *hint = str(error.args[0]).splitlines()
    name = name.strip("'\"")
    given = [arg.split("=")[0] for arg in argv if arg.startswith("--config.")]
    field = next((arg for arg in given if name in arg.split(".")), f"--config.{name}")
    ending = f"{hint[0]}." if hint else "configs/common.py has all of them."
    return f"{field} is not a field of the config. {ending}"
