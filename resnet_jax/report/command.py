"""The command that trains a config again."""

import contextlib
import importlib
import pkgutil
import shlex

from ml_collections import ConfigDict

import configs
from configs import common
from resnet_jax import UserError
from resnet_jax.config import flat


def training_command(config: ConfigDict) -> str:
    """The shortest command that gives this config, from one of configs/."""
    wanted = flat(config)
    commands = []
    for file, fields in _candidate_configs().items():
        changed = [
            shlex.quote(f"--config.{name}={_value(value)}")
            for name, value in wanted.items()
            if fields.get(name) != value
        ]
        commands.append((len(changed), len(file), file, changed))
    *_, file, changed = min(commands)
    return " ".join([f"python -m resnet_jax.main --config={file}", *changed])


def _candidate_configs() -> dict[str, dict]:
    """Every config in configs/, with and without a recipe, by `--config`'s value."""
    found = {}
    for _, name, _ in pkgutil.iter_modules(configs.__path__):
        module = importlib.import_module(f"configs.{name}")
        if module is common or not hasattr(module, "get_config"):
            continue
        for recipe in ("", *common.RECIPES, *getattr(module, "RECIPES", ())):
            file = f"configs/{name}.py:{recipe}".rstrip(":")
            # A file of the user's own may have other recipes, or none.
            with contextlib.suppress(UserError, TypeError):
                found[file] = flat(module.get_config(*filter(None, [recipe])))
    return found


def _value(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
