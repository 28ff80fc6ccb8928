"""A run's directory: where it is, whose it is, and its files, whole or not there."""

import difflib
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from ml_collections import ConfigDict

from resnet_jax import UserError

# What may differ when a run goes on: it changes no update that is behind.
_MAY_CHANGE = (
    "epochs",
    "steps",
    "steps_per_call",
    "eval_every",
    "parallel",
    "model.scan",
    "model.remat",
    "dataset.data_dir",
    "dataset.mirror",
    "dataset.eval_split",
    "checkpoint.every",
    "checkpoint.keep",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def default(config_flag: str, config: ConfigDict) -> Path:
    """`runs/CONFIG[-RECIPE][-DATASET]/seed<seed>`, from the value of `--config`."""
    file, _, recipe = config_flag.partition(":")
    parts = [Path(file).stem]
    if recipe not in ("", "paper"):
        parts.append(recipe)
    if config.dataset.name not in ("cifar10", *parts):
        parts.append(config.dataset.name)
    name = re.sub(r"[/:]", "-", "-".join(parts))  # of data sets, as 'svhn/full'
    return Path("runs", name, f"seed{config.seed}")


def check(workdir: Path, config: ConfigDict) -> list[str]:
    """Checks that a run with this config may use a directory, and changes nothing.

    Returns:
      Sentences about the fields that differ from the run's so far, and may.

    Raises:
      UserError: it is a file or cannot be written, or holds another config's run.
    """
    parent = workdir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"--workdir={workdir}: {parent} is a file: give a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--workdir={workdir}: {parent} cannot be written: give another directory"
        )
    if not any((workdir / "checkpoints").glob("[0-9]*")):  # nothing to lose
        if workdir.exists() and any(workdir.iterdir()) and not is_run(workdir):
            raise UserError(
                f"--workdir={workdir} holds other files: give a new or empty directory"
            )
        return []
    before, now = _flat(read_config(workdir)), _flat(config)
    changed = {
        field: f"{field} {before.get(field)!r} -> {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field)
    }
    if refused := [told for field, told in changed.items() if field not in _MAY_CHANGE]:
        raise UserError(
            f"--workdir={workdir} holds a run of another config "
            f"({'; '.join(refused)}): give another --workdir, or the same config to go "
            "on with that run"
        )
    return list(changed.values())


def is_run(workdir: Path) -> bool:
    return (workdir / "config.json").is_file()


def read_config(workdir: Path) -> ConfigDict:
    """The config of the run in a directory.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    if not is_run(workdir):
        near = ""
        if workdir.parent.is_dir():
            names = [path.name for path in workdir.parent.iterdir() if is_run(path)]
            if close := difflib.get_close_matches(workdir.name, names, n=1):
                near = f", as {workdir.parent / close[0]}"
        raise UserError(
            f"--workdir={workdir} holds no run: give the directory of one{near}"
        )
    return ConfigDict(_read_json(workdir / "config.json"))


def read_summary(workdir: Path) -> dict | None:
    """The summary of the run in a directory; None where it has not ended."""
    path = workdir / "summary.json"
    return _read_json(path) if path.exists() else None


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): restore or delete it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (no JSON object): restore or delete it")
    return content


def _flat(config: ConfigDict) -> dict:
    """Fields by dotted names, as JSON gives them back."""
    flat = {}
    for name, value in json.loads(config.to_json()).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def write(path: Path, text: str) -> None:
    """Writes a file whole: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file whole."""
    write(path, json.dumps(content, indent=2) + "\n")


def provenance() -> dict:
    """What computes here: versions of the packages and of this code."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    versions["python"] = platform.python_version()
    return {"versions": versions, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """The commit of the code, with '-dirty' where files differ from it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
