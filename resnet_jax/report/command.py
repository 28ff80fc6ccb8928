"""The command that trains a config again."""

import importlib
import pkgutil
import shlex

from ml_collections import ConfigDict

import configs
from resnet_jax import UserError
from resnet_jax.config import flat


def reproduce(config: ConfigDict) -> str:
    """The shortest command whose config is this one, from one of configs/."""
    wanted = flat(config)
    commands = []
    for file, fields in _starts().items():
        changed = [
            shlex.quote(f"--config.{name}={_value(value)}")
            for name, value in wanted.items()
            if fields.get(name) != value
        ]
        commands.append((len(changed), len(file), file, changed))
    *_, file, changed = min(commands)
    return " ".join([f"python -m resnet_jax.main --config={file}", *changed])


def _starts() -> dict[str, dict]:
    """Every config of configs/, with and without a recipe, by the flag's value."""
    starts = {}
    for module in pkgutil.iter_modules(configs.__path__):
        build = getattr(
            importlib.import_module(f"configs.{module.name}"), "get_config", None
        )
        if module.name == "common" or build is None:
            continue
        for recipe in ("", "paper", "keras", "strong", "fast", "smoke", "imagenet"):
            name = f"configs/{module.name}.py" + (f":{recipe}" if recipe else "")
            try:
                starts[name] = flat(build(recipe) if recipe else build())
            except (UserError, TypeError):  # this one has other recipes, or none
                continue
    return starts


def _value(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
