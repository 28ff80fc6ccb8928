"""Evaluates a trained network: loss, accuracy, and the accuracy of each class.

python -m resnet_jax.evaluate --workdir=runs/v2_56/seed0 [--split='test[:1000]']
"""

import json
import math
import sys

import jax
from absl import flags

from resnet_jax import UserError, bucket, command_line, data, trained
from resnet_jax.config import Build, build_network
from resnet_jax.evaluator import Evaluator
from resnet_jax.parallel import Parallel
from resnet_jax.trained import Trained


def evaluate(run: Trained, dataset: data.Dataset) -> dict:
    """The metrics of a run's network on `dataset.eval`; see `Evaluator`."""
    devices = jax.devices()
    # Evaluation is exact at any size, so it need not be the training's.
    batch_size = -(-run.config.batch_size // len(devices)) * len(devices)
    parallel = Parallel.over(
        devices, run.config.parallel, batch_size, image_shape=dataset.image_shape
    )
    variables = parallel.replicate(run.variables)
    evaluator = Evaluator(
        run.net,
        dataset.eval,
        run.inputs.normalization,
        batch_size,
        parallel,
        run.config.test_time_flip,
    )
    evaluator.compile(variables)
    return evaluator(variables)


def _as_json(run: Trained, dataset: data.Dataset, metrics: dict) -> str:
    classes = zip(dataset.class_names, metrics["class_accuracy"], strict=True)
    content = {
        "workdir": bucket.display_path(run.directory),
        "step": run.step,
        "dataset": dataset.name,
        "split": run.config.dataset.eval_split,
        **metrics,
        "loss": metrics["loss"] if math.isfinite(metrics["loss"]) else None,
        "class_accuracy": dict(classes),
    }
    return json.dumps(content, indent=2, ensure_ascii=False)


def _as_table(run: Trained, dataset: data.Dataset, metrics: dict) -> str:
    rows = [("examples", f"{metrics['examples']:,}")]
    rows += [("loss", f"{metrics['loss']:.4f}")]
    rows += [("accuracy", f"{metrics['accuracy']:.2%}")]
    if "top5_accuracy" in metrics:
        rows += [("top-5 accuracy", f"{metrics['top5_accuracy']:.2%}")]
    classes = zip(dataset.class_names, metrics["class_accuracy"], strict=True)
    rows += [
        (name, "none" if accuracy is None else f"{accuracy:.2%}")
        for name, accuracy in classes
    ]
    width = max(map(len, ("top-5 accuracy", *dataset.class_names)))
    title = (
        f"{bucket.display_path(run.directory)} at step {run.step:,}, {dataset.name} "
        f"{run.config.dataset.eval_split}"
    )
    return "\n".join(
        [title, *(f"  {name:<{width}}  {value:>8}" for name, value in rows)]
    )


def _in_words_of(values: flags.FlagValues, sentence: str) -> str:
    """Names the flag that the split came from, if it was given."""
    named = "--split" if values.split else "config.dataset.eval_split"
    return sentence.replace("config.dataset.eval_split", named)


def main(argv: list[str], build: Build = build_network) -> None:
    """Prints the metrics of a run's network. `build` as for `trained.load`."""

    def define(values: flags.FlagValues) -> None:
        trained.define_flags(values)
        what = (
            "Split to evaluate, such as 'test[:1000]'; 'validation' is the run's own "
            "validation_split, and '' its eval_split."
        )
        flags.DEFINE_string("split", "", what, flag_values=values)
        what = "Output format."
        flags.DEFINE_enum(
            "format", "table", ["table", "json"], what, flag_values=values
        )

    values = command_line.parse(argv, __doc__, define)
    run = trained.load(values.workdir, values.checkpoint, build)
    splits = run.config.dataset
    if values.split == "validation" and splits.validation_split:
        splits.eval_split, splits.validation_split = splits.validation_split, ""
    elif values.split:
        splits.eval_split = values.split
    try:
        dataset = trained.load_data(run)
    except UserError as error:
        raise UserError(_in_words_of(values, str(error))) from None
    for note in dataset.notes:
        print(_in_words_of(values, note), file=sys.stderr)
    show = _as_json if values.format == "json" else _as_table
    print(show(run, dataset, evaluate(run, dataset)))


if __name__ == "__main__":
    command_line.run(main)
