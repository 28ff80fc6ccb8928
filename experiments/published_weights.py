"""Published weights, evaluated here: do they score what was published?

    git clone https://github.com/akamaster/pytorch_resnet_cifar10
    python -m experiments.published_weights --weights=pytorch_resnet_cifar10

Trains nothing: a network takes a minute on two CPU cores. The files are converted as by
resnet_jax.convert, which needs PyTorch, and PyTorch's accuracy on the same test images
stands beside ours. On the original CIFAR-10 the difference from what was published
tests network, reading of the data and evaluation; on a copy with other pixels it is
what these cost a network that was trained on the original ones.

Writes akamaster.jsonl and .md to --out; a file that has been evaluated is not again.
"""

import re
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from absl import flags

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
# Of ImageNet, as its trainer.py normalises by.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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
            f"--weights={directory} has no resnet20*.th or another of akamaster's: "
            f"give a clone of {_CLONE}"
        )
    return found


def measure(path: Path) -> dict:
    """The test accuracy of the weights in a file, ours and PyTorch's."""
    loaded, peers = convert.read(path)
    convert.compare(loaded, peers)
    version, depth = (loaded.model_config[name] for name in ("version", "depth"))
    config = common.get_config(_TABLE.recipe, version, depth)
    config.epochs = 0
    config.augment.update(normalization="mean_std", mean=_MEAN, std=_STD)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "weights.safetensors")
        file.write_bytes(weights.to_bytes(loaded))
        config.init_from = str(file)
        summary = train.train_and_evaluate(config, Path(place, "run"))
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
        "network": loaded.name,
        "params": summary["params"],
        "accuracy": summary["test_accuracy"],
        "pytorch_accuracy": correct / len(labels),
        "examples": len(labels),
        "dataset": reproduce.dataset_name(config.dataset.to_json()),
        **curves.made_by(summary),
    }


def markdown(results: list[dict], made_by: str) -> str:
    """The comparison as a table, with its conditions and what computed it."""
    names = ["network", "parameters", "published", "here", "in PyTorch", "difference"]
    lines = [names, ["---", *["--:"] * (len(names) - 1)]]
    for result in results:
        published = _TABLE.networks[result["network"]].percent
        ours, theirs = 100 * result["accuracy"], 100 * result["pytorch_accuracy"]
        lines.append(
            [
                result["network"],
                f"{result['params']:,}",
                *(f"{value:.2f}" for value in (published, ours, theirs)),
                f"{ours - published:+.2f}",
            ]
        )
    datasets = sorted({result["dataset"] for result in results})
    others = any(name != "CIFAR-10" for name in datasets)
    why = (
        " The networks were trained on the original pixels: the difference is what "
        "other pixels cost them."
    )
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            "Published: akamaster/pytorch_resnet_cifar10. Here: its files, converted, "
            f"on the {results[0]['examples']:,} test images of {', '.join(datasets)}; "
            f"test accuracy (%), {made_by}.{why if others else ''}",
        ]
    )


def main(argv: list[str]) -> None:
    """Evaluates the files that have not been, and writes the table."""

    def define(values: flags.FlagValues) -> None:
        into = {"flag_values": values}
        flags.DEFINE_string("weights", "", "Directory of akamaster's files.", **into)
        flags.DEFINE_string(
            "out",
            str(Path(__file__).parent / "results" / "published_weights"),
            "Directory of the results.",
            **into,
        )
        flags.DEFINE_bool("redraw", False, "Show only what is stored.", **into)

    values = command_line.parse(argv, __doc__, define)
    if not values.weights and not values.redraw:
        raise UserError(f"--weights is missing: give a clone of {_CLONE}")
    files = {} if values.redraw else find(Path(values.weights).expanduser())
    experiment = Study("akamaster", Path(values.out), values.redraw)
    for network, path in files.items():
        settings = {"network": network, "sha256": sha256(path)}
        experiment.cell(lambda path=path, **_: measure(path), **settings)
    results = [experiment.cell(measure, **cell) for cell in experiment.settings()]
    if not results:
        raise UserError(f"{values.out} holds nothing: give --weights to evaluate")
    text = markdown(results, experiment.made_by())
    command = "python -m experiments.published_weights --weights=pytorch_resnet_cifar10"
    page = f"### Published weights, evaluated\n\n{text}\n\n`{command}`\n"
    workdir.write(experiment.out / "akamaster.md", page)
    print(text)


if __name__ == "__main__":
    command_line.run(main)
