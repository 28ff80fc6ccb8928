"""Redraws every stored experiment, and writes the page that shows them all.

    python -m experiments.gallery

Reads results/NAME/SCALE.jsonl and the docstring of NAME.py; measures nothing.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType

from experiments.study import Study
from resnet_jax import command_line, workdir

RESULTS = Path(__file__).parent / "results"

_HEAD = """\
# Experiments

The famous figures about residual networks, one command each. `--scale=smoke`, the
default, takes minutes on two CPU cores (`budgets` and `ablation` most of an hour), and
'Found' says whether the effect shows at that scale; `--scale=full` is CIFAR-10 on one
GPU, in the setting of the paper where there is one. Only experiments that have been run
are shown, and none without a `--scale`, such as `benchmark` and `reproduce`, which the
main README has. A run that was stopped resumes where it was, and a finished one only
draws; `--out=DIR` measures again elsewhere, but does not repeat trainings that are in
`runs/experiments`: remove that after a change of the code.

Made by `python -m experiments.gallery` from the stored results and the docstrings of
the modules, which say more: change those, not this page.
"""


def paragraph(doc: str, label: str) -> str:
    """The paragraph of a docstring that begins with a label, in bold; or ''."""
    for text in doc.split("\n\n"):
        if text.startswith(label):
            return f"**{label}**{text.removeprefix(label).rstrip()}"
    return ""


def section(module: ModuleType, name: str, files: list[Path]) -> str:
    """The part of the page that shows an experiment's results, one file per scale."""
    doc = module.__doc__
    figures, commands = [], []
    for file in files:
        scale, place = file.stem, f"results/{name}/{file.stem}"
        made_by = Study(scale, file.parent, redraw=True).made_by()
        cells = [json.loads(line) for line in file.read_text().splitlines()]
        seconds = sum(cell["seconds"] for cell in cells)
        minutes = f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.0f} s"
        figures.append(f"![{name}, {scale}]({place}.png)")
        commands += [
            f"```bash\npython -m experiments.{name} --scale={scale}\n```",
            f"{len(cells)} measurements in {minutes}; {made_by}: "
            f"[numbers]({place}.jsonl), [figure as SVG]({place}.svg), "
            f"[code]({name}.py).",
        ]
    parts = [
        f"## {name}",
        f"**{doc.splitlines()[0]}**",
        paragraph(doc, "Claim"),
        paragraph(doc, "Method"),
        *figures,
        paragraph(doc, "Found"),
        *commands,
        paragraph(doc, "Cost"),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def main(argv: list[str]) -> None:
    """Draws all figures and writes README.md beside the results."""
    command_line.parse(argv, __doc__, lambda _: None)
    stored = {
        directory.name: sorted(directory.glob("*.jsonl"), reverse=True)
        for directory in sorted(RESULTS.glob("*/"))
    }
    contents, sections = [], []
    for name, files in stored.items():
        if not files:
            continue
        if not (Path(__file__).parent / f"{name}.py").exists():
            print(f"left out {RESULTS / name}: there is no experiment of that name")
            continue
        module = importlib.import_module(f"experiments.{name}")
        if not hasattr(module, "SCALES"):  # a table, which the README shows
            continue
        for file in files:
            out = f"--out={file.parent}"
            module.main([name, f"--scale={file.stem}", "--redraw", out])
        contents.append(f"- [{name}](#{name}): {module.__doc__.splitlines()[0]}")
        sections.append(section(module, name, files))
    page = RESULTS.parent / "README.md"
    parts = [_HEAD, "\n".join(contents) + "\n", *sections]
    workdir.write(page, "\n".join(parts), "fix that, and run this again")
    print("wrote", page)


if __name__ == "__main__":
    command_line.run(main)
