"""Trains a network.

    python -m resnet_jax.main --config=configs/v2_56.py

The same command again resumes a run that was interrupted.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from resnet_jax import UserError, command_line, hosts, train, workdir


def main(argv: list[str]) -> None:
    """Trains as the command line says, and draws and reports the results."""

    def define(values: flags.FlagValues) -> None:
        command_line.define_config(values, argv)
        flags.DEFINE_string(
            "workdir",
            None,
            "The run's directory; else runs/CONFIG[-RECIPE][-DATASET]/seed<seed>.",
            flag_values=values,
        )
        hosts.define_flags(values)

    values = command_line.parse(argv, __doc__, define)
    config = command_line.checked_config(values)
    if values.workdir == "":
        raise UserError("--workdir= is empty: give a directory, or leave it out")
    config_flag = config_flags.get_config_filename(values["config"])
    directory = Path(values.workdir or workdir.default(config_flag, config))
    hosts.join(values.coordinator, values.num_processes, values.process_id)
    train.train_and_evaluate(config, directory)

    def show() -> None:
        from resnet_jax import report  # what draws takes seconds to import

        report.draw_curves(directory)
        report.update(directory)

    hosts.from_first(show)


if __name__ == "__main__":
    command_line.run(main)
