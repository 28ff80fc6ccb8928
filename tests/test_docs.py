"""What README.md and docs/ name is there: files, sections, modules, fields, flags."""

import importlib.util
import json
import re
from functools import partial
from pathlib import Path

import jax
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs import common, digits
from resnet_jax import (
    UserError,
    command_line,
    cost,
    data,
    evaluate,
    export,
    main,
    models,
    train,
    trained,
    workdir,
)
from resnet_jax.config import build_network, validate

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "experiments" / "README.md"
PAGES = [ROOT / "README.md", GALLERY, *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """A page's sections, by the names that GitHub gives them."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
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
        assert f"]({page.relative_to(ROOT)})" in text


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


def test_constraints_pin_all_that_is_required():
    """On every version of Python, and to versions that the requirements admit."""

    def requirements(name: str) -> list[Requirement]:
        lines = (ROOT / name).read_text().splitlines()
        return [Requirement(line) for line in lines if line and line[0] != "#"]

    pinned = requirements("constraints.txt")
    for needed in requirements("requirements.txt"):
        name = canonicalize_name(needed.name)
        pins = [pin for pin in pinned if canonicalize_name(pin.name) == name]
        for python in ("3.11", "3.12", "3.13"):
            where = {"python_version": python}
            (pin,) = (p for p in pins if not p.marker or p.marker.evaluate(where))
            assert needed.specifier.contains(next(iter(pin.specifier)).version), name


def examples(page: str) -> list[str]:
    """The Python of a page."""
    blocks = FENCED.findall((ROOT / page).read_text())
    return [code for kind, code in blocks if kind == "python"]


def run(example: str) -> dict:
    """Runs code, and returns what it defines."""
    names = {"__name__": "example"}
    exec(compile(example, "example", "exec"), names)
    return names


@pytest.mark.slow
def test_the_network_from_python_runs(capsys):
    run(examples("README.md")[0])
    assert capsys.readouterr().out == "(4, 10)\n"


@pytest.mark.slow
def test_the_run_from_python_trains(tmp_path, monkeypatch, capsys, quick_training):
    monkeypatch.chdir(tmp_path)
    example = examples("README.md")[1]
    small = example.replace("depth = 29", "depth = 20\nconfig.steps = 2")
    summary = train.train_and_evaluate(run(small)["config"], "runs/python")
    *_, accuracy, names, _, _ = capsys.readouterr().out.splitlines()
    assert float(accuracy) == pytest.approx(summary["test_accuracy"])
    assert len(re.findall(r"'\d'", names)) == 5


def test_the_config_of_your_own_is_one():
    config = run(examples("docs/extending.md")[0])["get_config"]()
    validate(config)
    assert (config.epochs, config.model.depth, config.optimizer.nesterov) == (
        100,
        26,
        True,
    )


@pytest.mark.slow
def test_the_block_of_your_own_trains(tmp_path, monkeypatch, capsys, quick_training):
    monkeypatch.chdir(tmp_path)
    build = run(examples("docs/extending.md")[1])["build"]

    def call(command, *arguments) -> int:
        arguments = [str(command), *arguments, "--workdir=runs/se"]
        return command_line.call(partial(command.main, build=build), arguments)

    model = "version=1 depth=8 scan=true remat=true width=4 stochastic_depth=0.1"
    fields = [f"model.{field}" for field in (*model.split(), "dtype=bfloat16")]
    given = [f"--config.{field}" for field in (*fields, "steps=2")]
    given = [f"--config={ROOT}/configs/digits.py", *given]
    assert call(main, *given) == 0
    for file in ("curves.png", "report.html"):
        assert Path("runs/se", file).exists()
    # Three standard blocks, and two Dense layers in each.
    config = workdir.read_config(Path("runs/se"))
    standard = build_network(config, 10)
    more = sum((f // 4 + 1) * f + (f + 1) * (f // 4) for f in (4, 8, 16))
    count = cost.totals(cost.layers(standard, (8, 8, 1)))["params"] + more
    summary = json.loads(Path("runs/se/summary.json").read_text())
    assert summary["params"] == count
    capsys.readouterr()
    assert call(evaluate) == 0
    assert f"{summary['test_accuracy']:.2%}" in capsys.readouterr().out
    assert call(importlib.import_module("resnet_jax.report.__main__")) == 0
    page = Path("runs/se/report.html").read_text()
    assert "SqueezeExcitationBlock blocks" in page.partition("same run again")[0]
    # Its config does not describe what model.safetensors would hold.
    assert call(export) == 0
    assert {path.name for path in Path("runs/se/export").iterdir()} == {
        "model.zip",
        "README.md",
    }
    assert "safetensors" not in Path("runs/se/export/README.md").read_text()
    assert trained.load("runs/se", build=build).step == 2
    with pytest.raises(UserError, match="holds a run of SqueezeExcitationBlock blocks"):
        trained.load("runs/se")
    with pytest.raises(UserError, match="holds a run of SqueezeExcitationBlock blocks"):
        train.train_and_evaluate(config, "runs/se")
    # Another run may begin with it.
    config.init_from = "runs/se"
    train.train_and_evaluate(config, "runs/again", build)
    assert "weights   of runs/se, with its classifier" in capsys.readouterr().out


def test_the_block_of_your_own_has_both_shortcuts():
    build = run(examples("docs/extending.md")[1])["build"]
    for shortcut, has in (("A", False), ("B", True)):
        config = common.default()
        config.model.update(version=1, depth=8, width=4, shortcut=shortcut)
        params = models.zeros(build(config, 10), (8, 8, 1))["params"]
        assert ("shortcut_conv" in params["stage2_block1"]) == has


@pytest.mark.slow
def test_the_training_loop_of_your_own_trains(capsys, quick_training):
    run(examples("docs/extending.md")[3])
    assert float(capsys.readouterr().out.splitlines()[-1].rstrip("%")) > 50


@pytest.mark.slow
def test_arrays_of_your_own_are_trained_on(
    tmp_path, monkeypatch, capsys, quick_training
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "SOURCES", data.SOURCES.copy())
    run(examples("docs/data.md")[0])
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0.9


@pytest.mark.slow
def test_feature_maps_of_a_run_are_had(tmp_path, monkeypatch, capsys, quick_training):
    monkeypatch.chdir(tmp_path)
    config = digits.get_config()
    config.model.update(version=2, depth=20, width=4)
    config.update(steps=4)
    config.checkpoint.update(every=1, keep=9)
    train.train_and_evaluate(config, "runs/v2_56/seed0")
    capsys.readouterr()
    run(examples("docs/using.md")[0])
    assert capsys.readouterr().out == "(5, 8, 8, 4)\n"


def test_the_norm_of_your_own_takes_the_place_of_batch_norm():
    group_norm = run(examples("docs/extending.md")[2])["GroupNorm"]
    net = models.resnet(1, 8, 10, width=4, dtype="bfloat16")
    net = net.clone(norm_class=group_norm)
    assert models.describe(net).endswith(", GroupNorm for BatchNorm")
    shapes = models.zeros(net, (8, 8, 1))
    assert shapes["batch_stats"] == {}
    assert set(shapes["params"]["stem_bn"]) == {"GroupNorm_0"}
    counted = cost.totals(cost.layers(net, (8, 8, 1)))["params"]
    assert counted == cost.count_parameters(shapes["params"])


@pytest.mark.slow
def test_run_with_a_norm_of_your_own_is_loaded(tmp_path, quick_training):
    group_norm = run(examples("docs/extending.md")[2])["GroupNorm"]

    def build(config, num_classes):
        return build_network(config, num_classes).clone(norm_class=group_norm)

    config = digits.get_config()
    config.model.update(version=1, depth=8, width=4)
    config.steps = 2
    train.train_and_evaluate(config, tmp_path, build)
    loaded = trained.load(tmp_path, build=build)
    images = trained.load_data(loaded).eval.images[:2]
    logits = jax.jit(loaded.logits)(loaded.variables, images)
    assert logits.shape == (2, 10)
