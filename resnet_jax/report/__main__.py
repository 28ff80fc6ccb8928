"""Writes a run's report.html, or compares several runs on one page.

python -m resnet_jax.report --workdir=runs/v2_56/seed0
python -m resnet_jax.report --workdir=runs/v1_20 --workdir=runs/v2_20
"""

from functools import partial
from pathlib import Path

from absl import flags

from resnet_jax import UserError, bucket, command_line, workdir
from resnet_jax.config import Build, build_network
from resnet_jax.report import page


def main(argv: list[str], build: Build = build_network) -> None:
    """Writes the page, and prints where it is. `build` as for `trained.load`."""

    def define(values: flags.FlagValues) -> None:
        multi_string = partial(flags.DEFINE_multi_string, flag_values=values)
        string = partial(flags.DEFINE_string, flag_values=values)
        multi_string(
            "workdir",
            None,
            "Directory of a finished run, or of several, such as the seeds of one "
            "config, or gs://BUCKET/DIR; repeat the flag to compare runs.",
        )
        string(
            "out",
            None,
            "File to write. (default: WORKDIR/report.html, or comparison.html for "
            "several runs)",
        )

    values = command_line.parse(argv, __doc__, define)
    places = map(bucket.local, values.workdir or [])
    runs = [run for place in places for run in _runs(place)]
    directories = list({run.resolve(): run for run in runs}.values())
    if not directories:
        raise UserError("--workdir is missing: give the directory of a run")
    out = None if values.out is None else Path(values.out)
    if out:
        workdir.make(out.parent)
    if out and (not out.name or out.is_dir()):
        raise UserError(f"--out={values.out} is not a file: give a file name")
    if len(directories) == 1:
        path = page.write(directories[0], out, build)
    else:
        path = out or Path("comparison.html")
        page.compare(directories, path)
    print(f"written   {bucket.display_path(path)}")


def _runs(place: Path) -> list[Path]:
    """The run in a directory, or the runs in its subdirectories."""
    return (not workdir.is_run(place) and workdir.runs_in(place)) or [place]


if __name__ == "__main__":
    command_line.run(main)
