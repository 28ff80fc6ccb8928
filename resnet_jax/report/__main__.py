"""Writes a run's report.html, or compares several runs on one page.

python -m resnet_jax.report --workdir=runs/v2_56/seed0
python -m resnet_jax.report --workdir=runs/v1_20/seed0 --workdir=runs/v2_20/seed0
"""

from functools import partial
from pathlib import Path

from absl import flags

from resnet_jax import UserError, bucket, command_line
from resnet_jax.report import page


def main(argv: list[str]) -> None:
    """Writes the page, and prints where it is."""

    def define(values: flags.FlagValues) -> None:
        multi_string = partial(flags.DEFINE_multi_string, flag_values=values)
        string = partial(flags.DEFINE_string, flag_values=values)
        multi_string(
            "workdir",
            None,
            "Directory of a finished run, or gs://BUCKET/DIR; several times to compare "
            "runs.",
        )
        string(
            "out",
            None,
            "File to write the comparison of several runs to. (default: "
            "comparison.html)",
        )

    values = command_line.parse(argv, __doc__, define)
    places = map(bucket.local, values.workdir or [])
    directories = list({place.resolve(): place for place in places}.values())
    if not directories:
        raise UserError("--workdir is missing: give the directory of a run")
    if len(directories) == 1:
        if values.out is not None:
            raise UserError(
                f"--out={values.out} is for the comparison of several runs, and one is "
                "given: leave it out, the page is WORKDIR/report.html"
            )
        path = page.write(directories[0])
    else:
        path = Path("comparison.html" if values.out is None else values.out)
        if not path.name or path.is_dir():
            raise UserError(f"--out={values.out} is no file: give the page's name")
        page.compare(directories, path)
    print(f"written   {bucket.shown(path)}")


if __name__ == "__main__":
    command_line.run(main)
