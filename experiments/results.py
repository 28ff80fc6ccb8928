"""Writes the section 'Results' of the README from what experiments have stored.

    python -m experiments.results

The section consists of every experiments/results/*/*.md, each of which the experiment
itself wrote beside its numbers, with data set, seeds, devices, versions and command.
Nothing is measured.
"""

from pathlib import Path

from absl import flags

from resnet_jax import UserError, command_line, workdir

_BEGIN = "<!-- results: written by `python -m experiments.results` -->"
_END = "<!-- end of results -->"
_ROOT = Path(__file__).parents[1]


def section(results: Path) -> str:
    """The text between the README's marks."""
    parts = [path.read_text().strip() for path in sorted(results.glob("*/*.md"))]
    return "\n\n".join(parts) or "None are stored yet."


def replaced(page: str, content: str) -> str:
    """A page with other results. Raises UserError if it has no place for them."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UserError(f"README.md lacks the lines {_BEGIN} and {_END}: put them back")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def main(argv: list[str]) -> None:
    """Rewrites the section."""

    def define(values: flags.FlagValues) -> None:
        into = {"flag_values": values}
        flags.DEFINE_string(
            "results",
            str(_ROOT / "experiments" / "results"),
            "Directory of all results.",
            **into,
        )
        flags.DEFINE_string(
            "readme", str(_ROOT / "README.md"), "The page to rewrite.", **into
        )

    values = command_line.parse(argv, __doc__, define)
    readme = Path(values.readme)
    if not readme.is_file():
        raise UserError(f"--readme={readme}: there is no such file: give the README")
    if not Path(values.results).is_dir():
        raise UserError(
            f"--results={values.results} is not a directory: give that of the results"
        )
    content = section(Path(values.results))
    workdir.write(
        readme, replaced(readme.read_text(), content), "give another --readme"
    )
    print("wrote", readme)


if __name__ == "__main__":
    command_line.run(main)
