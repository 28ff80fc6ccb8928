"""Published weights, evaluated here: do they score what was published?

    git clone https://github.com/akamaster/pytorch_resnet_cifar10
    python -m experiments.published_weights --weights=pytorch_resnet_cifar10

The files are converted as by resnet_jax.convert, which needs PyTorch, and PyTorch's
accuracy on the same test images is given beside ours; a network takes a minute on two
CPU cores. On the original CIFAR-10 the difference from what was published tests the
network, the reading of the data and the evaluation. On a copy with other pixels it is
what these cost a network that was trained on the original ones; --networks=v1-20
--epochs=5 then trains it further on the copy, which shows how much of that is lost for
good.

Writes akamaster.jsonl and .md to --out; what has been measured is not measured again.
"""

import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import common
from experiments import curves, reproduce
from experiments.published import TABLES
from experiments.study import Study
from resnet_jax import UserError, command_line, convert, data, train, weights, workdir
from resnet_jax.augment import normalization, normalize
from resnet_jax.data.archive import sha256

_CLONE = "https://github.com/akamaster/pytorch_resnet_cifar10"
_TABLE = TABLES["akamaster"]
_FILE = re.compile(r"resnet(\d+)\b.*\.th")
# ImageNet's, by which its trainer.py normalises.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_RATE = 0.01  # of training further
_CHUNK = 500  # test images at a time in PyTorch


def find(directory: Path) -> dict[str, Path]:
    """The files of the table's networks, by network, in a clone or its folder of them.

    Raises:
      UserError: there is none.
    """
    files = (*directory.glob("*.th"), *directory.glob("pretrained_models/*.th"))
    depths = {match[1]: path for path in files if (match := _FILE.fullmatch(path.name))}
    found = {
        network: depths[depth]
        for network in _TABLE.networks
        if (depth := network.removeprefix("v1-")) in depths
    }
    if not found:
        raise UserError(
            f"--weights={directory} has no resnet20*.th or other file of akamaster's: "
            f"give a clone of {_CLONE}"
        )
    return found


def measure(path: Path) -> dict:
    """The test accuracy of the weights in a file, ours and PyTorch's."""
    loaded, peers = convert.read(path)
    convert.compare(loaded, peers)
    config, summary = _run(loaded, 0)
    dataset = data.load(config.dataset)
    scaling = normalization(config.augment, dataset.train.images)
    images, labels = dataset.eval.images, dataset.eval.labels
    correct = 0
    for start in range(0, len(labels), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        normalized = normalize(jnp.asarray(images[chunk]), *scaling)
        logits = peers[0].logits(np.asarray(normalized))
        correct += int((logits.argmax(axis=1) == labels[chunk]).sum())
    return {
        "params": summary["params"],
        "accuracy": summary["test_accuracy"],
        "pytorch_accuracy": correct / len(labels),
        "examples": len(labels),
        "dataset": reproduce.dataset_name(config.dataset.to_json()),
        **curves.made_by(summary),
    }


def measure_adapted(path: Path, epochs: int) -> dict:
    """The test accuracy after so many epochs more on the data here."""
    loaded, _ = convert.read(path)
    _, summary = _run(loaded, epochs)
    return {"accuracy": summary["test_accuracy"], **curves.made_by(summary)}


def _run(loaded: weights.Weights, epochs: int) -> tuple[ConfigDict, dict]:
    version, depth = (loaded.model_config[name] for name in ("version", "depth"))
    config = common.get_config(_TABLE.recipe, version, depth)
    config.epochs = epochs
    config.augment.update(normalization="mean_std", mean=_MEAN, std=_STD)
    config.optimizer.learning_rate = _RATE
    config.schedule.update(name="cosine", warmup_epochs=0.0)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "weights.safetensors")
        file.write_bytes(weights.to_bytes(loaded))
        config.init_from = str(file)
        return config, train.train_and_evaluate(config, Path(place, "run"))


def stored(experiment: Study) -> dict[str, dict]:
    """By network, what `measure` returned; and 'adapted', by number of epochs, what
    `measure_adapted` did.
    """
    cells = [
        (settings, experiment.cell(measure, **settings))
        for settings in experiment.settings()
    ]
    rows = {
        settings["network"]: result | {"sha256": settings["sha256"], "adapted": {}}
        for settings, result in cells
        if "epochs" not in settings
    }
    for settings, result in cells:
        row = rows.get(settings["network"])
        if "epochs" in settings and row and row["sha256"] == settings["sha256"]:
            row["adapted"][settings["epochs"]] = result
    return rows


def markdown(rows: dict[str, dict], made_by: str) -> str:
    """What is `stored` as a table, with its conditions and what computed it."""
    lengths = sorted({epochs for row in rows.values() for epochs in row["adapted"]})
    names = ["network", "parameters", "published", "here", "in PyTorch", "difference"]
    names += [f"after {epochs} epochs here" for epochs in lengths]
    lines = [names, ["---", *["--:"] * (len(names) - 1)]]
    for network, row in rows.items():
        published = _TABLE.networks[network].percent
        ours, theirs = 100 * row["accuracy"], 100 * row["pytorch_accuracy"]
        found = (row["adapted"].get(epochs) for epochs in lengths)
        lines.append(
            [
                network,
                f"{row['params']:,}",
                *(f"{value:.2f}" for value in (published, ours, theirs)),
                f"{ours - published:+.2f}",
                *(f"{100 * one['accuracy']:.2f}" if one else "" for one in found),
            ]
        )
    datasets = sorted({row["dataset"] for row in rows.values()})
    examples = max(row["examples"] for row in rows.values())
    told = [
        "Published: akamaster/pytorch_resnet_cifar10. Here: its files, converted, on "
        f"the {examples:,} test images of {', '.join(datasets)}; test "
        f"accuracy (%), {made_by}."
    ]
    alike = all(row["accuracy"] == row["pytorch_accuracy"] for row in rows.values())
    if alike and any(name != "CIFAR-10" for name in datasets):
        told.append(
            "The networks were trained on the original pixels, which presumably "
            "explains the difference: PyTorch shows the same."
        )
    if lengths:
        told.append(
            f"Further training is on the training images here (recipe "
            f"`{_TABLE.recipe}`, but with cosine decay from a rate of {_RATE:g}; one "
            "seed)."
        )
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", " ".join(told)])


def main(argv: list[str]) -> None:
    """Evaluates the files that have not been, and writes the table."""

    def define(values: flags.FlagValues) -> None:
        into = {"flag_values": values}
        flags.DEFINE_string("weights", "", "Clone of akamaster's repository.", **into)
        flags.DEFINE_list(
            "networks", [], "Networks to evaluate; by default, all that it has.", **into
        )
        flags.DEFINE_integer(
            "epochs", 0, "Epochs of further training after that; 0: none.", **into
        )
        flags.DEFINE_string(
            "out",
            str(Path(__file__).parent / "results" / "published_weights"),
            "Directory for the results.",
            **into,
        )
        flags.DEFINE_bool("redraw", False, "Only show what is stored.", **into)

    values = command_line.parse(argv, __doc__, define)
    if not values.weights and not values.redraw:
        raise UserError(f"--weights is missing: give a clone of {_CLONE}")
    if values.epochs < 0:
        raise UserError(f"--epochs={values.epochs}: give at least 0")
    files = {} if values.redraw else find(Path(values.weights).expanduser())
    networks = [] if values.redraw else values.networks or list(files)
    if unknown := [name for name in networks if name not in files]:
        raise UserError(
            f"--networks={unknown[0]}: --weights={values.weights} has "
            f"{', '.join(files)}"
        )
    experiment = Study("akamaster", Path(values.out), values.redraw)
    for network in networks:
        path = files[network]
        of = {"network": network, "sha256": sha256(path)}
        experiment.cell(lambda path=path, **_: measure(path), **of)
        if epochs := values.epochs:
            experiment.cell(
                lambda path=path, epochs=epochs, **_: measure_adapted(path, epochs),
                **of,
                epochs=epochs,
            )
    rows = stored(experiment)
    if not rows:
        raise UserError(f"{values.out} has no results: give --weights to evaluate")
    text = markdown(rows, experiment.made_by())
    command = "python -m experiments.published_weights --weights=pytorch_resnet_cifar10"
    more = "".join(
        f", and with `--networks={network} --epochs={epochs}`"
        for network, row in rows.items()
        for epochs in row["adapted"]
    )
    page = f"### Published weights, evaluated\n\n{text}\n\n`{command}`{more}\n"
    workdir.write(experiment.out / "akamaster.md", page)
    print(text)


if __name__ == "__main__":
    command_line.run(main)
