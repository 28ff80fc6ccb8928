"""What README.md and docs/ name is there: files, sections, modules, fields, flags."""

import importlib.util
import re
from pathlib import Path

import pytest

from configs import common

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """A page's sections, by the names that GitHub gives them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_commands_and_fields_exist(page):
    text = page.read_text().replace("\\\n", " ")
    for module in re.findall(r"python -m ((?:resnet_jax|experiments)\.\w+)", text):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / file).is_file(), file
    known = common.default()
    groups = [name for name in known if hasattr(known[name], "keys")]
    fields = re.findall(r"--config\.([\w.]+)", text)
    fields += re.findall(rf"`((?:{'|'.join(groups)})\.\w+)(?=[`=])", text)
    files = {"model.zip", "model.safetensors"}
    for field in set(fields) - files:
        group, _, name = field.partition(".")
        assert group in known, field
        assert not name or name in known[group], field


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in text


def test_the_list_of_files_is_complete():
    """Of the package: every file has its line, and every line its file."""
    _, block = FENCED.search((ROOT / "docs" / "code.md").read_text()).groups()
    listed, parents = set(), []
    for line in filter(None, block.splitlines()):
        name, level = line.split()[0], (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:level], name]
        if name.endswith(".py"):
            listed.add("".join(parents))
    package = ROOT / "resnet_jax"
    there = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    unlisted = {"resnet_jax/__init__.py", "resnet_jax/report/__init__.py"}
    assert listed == there - unlisted


def test_the_network_from_python_runs(capsys):
    blocks = FENCED.findall((ROOT / "README.md").read_text())
    example = next(code for kind, code in blocks if kind == "python")
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(4, 10)\n"
