"""Trains a network.

    python -m resnet_jax.main --config=configs/v2_56.py

Running the same command again resumes an interrupted run.
"""

from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from resnet_jax import (
    UserError,
    bucket,
    command_line,
    data,
    hosts,
    parallel,
    seeds,
    train,
    workdir,
)
from resnet_jax.config import Build, build_network


def main(argv: list[str], build: Build = build_network) -> None:
    """Trains as the command line says, and draws and reports the results.

    `build` is as for `train.train_and_evaluate`.
    """

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)
        flags.DEFINE_string(
            "workdir",
            None,
            "The run's directory, or gs://BUCKET/DIR; by default "
            "runs/CONFIG[-RECIPE][-DATASET]/seed<seed>. With several --config.seeds, "
            "the directory that holds a seed<seed> for each.",
            flag_values=values,
        )
        hosts.define_flags(values)

    values = command_line.parse(argv, __doc__, define)
    config = command_line.checked_config(values)
    if values.workdir == "":
        raise UserError("--workdir= is empty: give a directory, or leave it out")
    config_flag = config_flags.get_config_filename(values["config"])
    place = values.workdir or workdir.default(config_flag, config)
    parallel.add_cpu()
    hosts.join(values.coordinator, values.num_processes, values.process_id)
    image_size = data.known_size(config.dataset)
    # Now, since `run_on_first` uses devices.
    parallel.split_cpu(config.batch_size, hosts.count(), image_size)
    hosts.run_on_first(lambda: data.check(config.dataset))
    directory = hosts.run_on_first(lambda: bucket.local(place))
    if config.seeds == 1:
        run(config, directory, build)
    else:
        parent = directory if values.workdir else directory.parent
        seeds.run_all(config, parent, partial(run, build=build))


def run(config: ConfigDict, directory: Path, build: Build = build_network) -> dict:
    """Trains one run, draws and reports its results, and returns its summary."""
    summary = train.train_and_evaluate(config, directory, build)

    def show() -> None:
        from resnet_jax import report  # its plotting takes seconds to import

        report.draw_curves(directory)
        report.update(directory, build)

    hosts.run_on_first(show)
    return summary


if __name__ == "__main__":
    command_line.run(main)
