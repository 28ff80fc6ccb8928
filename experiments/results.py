"""Writes the section 'Results' of the README from what experiments have stored.

    python -m experiments.results

The section consists of every experiments/results/*/*.md, each of which the experiment
itself wrote beside its numbers, with data set, seeds, devices, versions and command.
Nothing is measured.
"""

from pathlib import Path

from resnet_jax import UserError, command_line, workdir

_BEGIN = "<!-- results: written by `python -m experiments.results` -->"
_END = "<!-- end of results -->"
README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"


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
    command_line.parse(argv, __doc__, lambda _: None)
    page = replaced(README.read_text(), section(RESULTS))
    workdir.write(README, page, "fix that, and run this again")
    print("wrote", README)


if __name__ == "__main__":
    command_line.run(main)
