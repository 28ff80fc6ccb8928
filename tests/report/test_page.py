import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from scipy.special import softmax

from configs import digits
from experiments import arrangements
from resnet_jax import (
    UserError,
    command_line,
    freeze,
    main,
    models,
    report,
    train,
    trained,
    workdir,
)
from resnet_jax.augment import normalize
from resnet_jax.explain import Explainer
from resnet_jax.predict import Predictor
from resnet_jax.report import __main__ as command
from resnet_jax.report import analysis, curves, page
from tests.test_train import digits_config

SECTIONS = ("curves", "classes", "confusion", "mistakes", "calibration", "gradients")
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what a test asks for."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.addresses, self.tags = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "xlink:href", "action", "data"):
            self.addresses += [attributes[name]] if name in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def check(text: str) -> Page:
    """Sees that a page is well-formed, complete in itself, and made for any screen."""
    found = Page(text)
    assert len(set(found.ids)) == len(found.ids)
    for address in found.addresses:
        assert address.startswith(("#", "data:"))
        if address.startswith("#"):
            assert address[1:] in found.ids
    for name in re.findall(r"url\(([^)]*)\)", text):
        assert name.strip("\"'").removeprefix("#") in found.ids
    assert "@import" not in text
    assert not {"script", "link", "iframe"} & set(found.tags)
    for needed in ("viewport", "prefers-color-scheme: dark", "@media print"):
        assert needed in text
    assert not re.search(r"\bnan\b|None\b|Undefined", found.text)
    return found


def small(**changes):
    return digits_config(steps=0, epochs=1, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, quick_trainings):
    """Three short runs: a and b differ in the seed, c in more."""
    root = tmp_path_factory.mktemp("report")
    changed = small(batch_size=96)
    changed.dataset.update(train_split="train[:1200]", validation_split="train[1200:]")
    for name, config in (("a", small()), ("b", small(seed=1)), ("c", changed)):
        train.train_and_evaluate(config, root / name)
    return root


def call(*arguments) -> int:
    return command_line.call(command.main, ["report", *map(str, arguments)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "c"])
def test_report(runs, tmp_path, name):
    path = tmp_path / "page.html" if name == "c" else runs / name / "report.html"
    given = [f"--out={path}"] if name == "c" else []
    assert call(f"--workdir={runs / name}", *given) == 0
    found = check(path.read_text())
    assert set(SECTIONS) | {"cost", "config"} <= set(found.ids)
    summary = json.loads((runs / name / "summary.json").read_text())
    assert f"{summary['test_accuracy']:.2%}" in found.text
    assert f"{summary['params']:,}" in found.text
    for part, seconds in (("training", "train"), ("evaluating", "evaluation")):
        told = f"of which {part}{summary[f'{seconds}_seconds']:,.1f} s"
        assert told in found.text
    assert f"{summary['test_class_accuracy']['3']:.2%}" in found.text
    assert "python -m resnet_jax.main --config=configs/" in found.text
    assert ("no validation split" in found.text) == (name == "a")
    assert ("fitted on the validation split" in found.text) == (name == "c")
    assert found.tags.count("svg") == 7
    assert found.tags.count("img") == 36  # twelve mistakes, three pictures each


@pytest.mark.slow
def test_gradients_are_of_all_blocks_with_stochastic_depth(runs):
    run = trained.load(runs / "a")
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    dropping = dataclasses.replace(run, net=run.net.clone(stochastic_depth=0.9))
    expected = analysis.gradient_norms(run, images, labels)
    assert analysis.gradient_norms(dropping, images, labels) == expected


@pytest.mark.slow
def test_gradients_are_of_the_loss_of_training(runs):
    run = trained.load(runs / "a")
    images, labels = trained.load_data(run).train
    images, labels = images[:32], labels[:32]
    config = run.config.copy_and_resolve_references()
    config.label_smoothing = 0.3
    smoothed = dataclasses.replace(run, config=config)

    def loss(params):
        logits, _ = run.net.apply(
            {**run.variables, "params": params},
            normalize(jnp.asarray(images), *run.inputs.normalization),
            train=True,
            mutable=["batch_stats"],
        )
        targets = 0.7 * jax.nn.one_hot(labels, 10) + 0.3 / 10
        return -(targets * jax.nn.log_softmax(logits)).sum(1).mean()

    gradient = jax.jit(jax.grad(loss))(run.variables["params"])["classifier"]["kernel"]
    found = analysis.gradient_norms(smoothed, images, labels)["at the end"]
    assert found["classifier"] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)


@pytest.mark.slow
def test_gradients_are_of_what_trains_as_it_trains(runs):
    """A frozen layer has none, and is there as in evaluation; units are dropped."""
    run = trained.load(runs / "a")
    images, labels = (x[:32] for x in trained.load_data(run).train)
    config = run.config.copy_and_resolve_references()
    config.optimizer.freeze = "^stem|^stage1"
    net = arrangements.with_shortcut("dropout 0.5", config, 10)
    frozen = dataclasses.replace(run, config=config, net=net)
    variables = models.unstack(run.variables)

    def loss(params):
        with freeze.kept_statistics(config.optimizer):
            logits, _ = net.apply(
                {**variables, "params": params},
                normalize(jnp.asarray(images), *run.inputs.normalization),
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(config.seed)},
            )
        return optax.losses.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).mean()

    gradient = jax.jit(jax.grad(loss))(variables["params"])["classifier"]["kernel"]
    found = analysis.gradient_norms(frozen, images, labels)["at the end"]
    assert found["classifier"] == pytest.approx(np.linalg.norm(gradient), rel=1e-3)
    assert not any(name.startswith(("stem", "stage1")) for name in found)
    assert len(found) == 5


@pytest.mark.slow
def test_gradients_at_the_start_are_of_the_seeds_weights_alone(runs, tmp_path):
    tuned = digits_config(steps=1, init_from=str(runs / "a"), seed=2)
    train.train_and_evaluate(tuned, tmp_path / "tuned")
    images, labels = np.arange(256).reshape(4, 8, 8, 1).astype(np.uint8), np.arange(4)
    found, expected = (
        analysis.gradient_norms(trained.load(directory), images, labels)
        for directory in (tmp_path / "tuned", runs / "a")
    )
    assert list(expected) == ["at the start", "at the end"]
    assert list(found) == ["at the end"]
    run = trained.load(runs / "b")
    first = models.initialize(run.net, jax.random.key(1), run.inputs.image_shape)
    alike = dataclasses.replace(run, variables=first)
    assert (
        analysis.gradient_norms(run, images, labels)["at the start"]
        == analysis.gradient_norms(alike, images, labels)["at the end"]
    )
    assert call(f"--workdir={tmp_path / 'tuned'}") == 0
    page = (tmp_path / "tuned" / "report.html").read_text()
    assert "with the weights that the run ended with." in page
    assert "at the start" not in page


@pytest.mark.slow
def test_analysis_agrees_with_what_training_measured(runs):
    run = trained.load(runs / "a")
    found = analysis.analyse(run)
    summary = json.loads((runs / "a" / "summary.json").read_text())
    confusion = found.confusion
    assert confusion.sum() == summary["test_examples"]
    accuracy = np.trace(confusion) / confusion.sum()
    assert accuracy == pytest.approx(summary["test_accuracy"])
    loss = found.calibration["before"]["loss"]
    assert loss == pytest.approx(summary["test_loss"], rel=1e-4)
    sure = [mistake["probability"] for mistake in found.mistakes]
    assert sure == sorted(sure, reverse=True)
    images, labels = trained.load_data(run).eval
    probabilities = softmax(Predictor(run, len(labels))(images), axis=1)
    predicted = probabilities.argmax(1)
    for true, counts in enumerate(confusion):
        expected = np.bincount(predicted[labels == true], minlength=10)
        np.testing.assert_array_equal(counts, expected)
    numbers = [mistake["number"] for mistake in found.mistakes]
    explained = Explainer(run)(images[numbers], predicted[numbers])
    for place, (number, mistake) in enumerate(
        zip(numbers, found.mistakes, strict=True)
    ):
        true, taken_for = labels[number], predicted[number]
        assert (mistake["true"], mistake["predicted"]) == (str(true), str(taken_for))
        assert true != taken_for
        chances = mistake["probability"], mistake["true_probability"]
        expected = probabilities[number, [taken_for, true]]
        assert chances == pytest.approx(expected, rel=1e-4)
        for name, picture in explained.overlays(place, images[number]).items():
            assert mistake[name].tobytes() == picture.tobytes()
    names = list(found.gradients["at the end"])
    assert names == list(found.gradients["at the start"])
    assert names[0] == "stem_conv"
    assert names[-1] == "classifier"
    assert names[1:3] == ["stage1_block1/conv1", "stage1_block1/conv2"]
    for norms in found.gradients.values():
        assert all(norm > 0 for norm in norms.values())


@pytest.mark.slow
def test_training_leaves_a_report_and_keeps_it(tmp_path):
    argv = ["main", f"--config={digits.__file__}", f"--workdir={tmp_path / 'run'}"]
    argv += ["--config.model.version=1", "--config.model.depth=8", "--config.steps=9"]
    argv += ["--config.model.width=4"]
    assert command_line.call(main.main, argv) == 0
    path = tmp_path / "run" / "report.html"
    check(path.read_text())
    before = path.stat().st_mtime_ns
    assert command_line.call(main.main, argv) == 0  # says that it is finished
    assert path.stat().st_mtime_ns == before
    os.utime(path, (0, 0))  # older than the results
    report.update(tmp_path / "run")
    assert path.stat().st_mtime > 1
    file = tmp_path / "run" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 12}))
    for write in (page.write, lambda run: page.compare([run], tmp_path / "out.html")):
        with pytest.raises(UserError, match="has not finished"):  # it goes on
            write(tmp_path / "run")


@pytest.mark.slow
def test_comparison(runs, tmp_path, capsys):
    workdirs = [f"--workdir={runs / name}" for name in "abc"]
    out = tmp_path / "page.html"
    assert call(*workdirs, f"--out={out}") == 0
    assert str(out) in capsys.readouterr().out
    found = check(out.read_text())
    assert {"results", "differences", "curves"} <= set(found.ids)
    accuracy = {
        name: json.loads((runs / name / "summary.json").read_text())["test_accuracy"]
        for name in "abc"
    }
    mean = (accuracy["a"] + accuracy["b"]) / 2
    # The interval of a mean of two: t(0.975, 1) is 12.706.
    half = 12.706 * abs(accuracy["a"] - accuracy["b"]) / 2
    assert f"{mean:.2%}" in found.text
    assert f"{min(mean + half, 1):.2%}" in found.text
    assert f"{accuracy['c']:.2%}" in found.text
    assert "batch_size" in found.text
    assert "model.depth" not in found.text  # does not differ
    assert "0, 1" in found.text  # seeds of one row
    every = tmp_path / "every.html"
    assert call(f"--workdir={runs}", f"--out={every}") == 0
    assert check(every.read_text()).text == found.text


def test_a_seed_that_ran_twice_is_no_second_sample():
    def run(name, seed, **fields):
        return page._Run(Path(name), {"seed": seed, **fields}, {}, [])

    runs = [run("a", 0, epochs=1), run("b", 1, epochs=1), run("c", 0, epochs=1)]
    groups, differing = page._grouped(runs)
    found = [[str(each.directory) for each in members] for members in groups]
    assert (found, differing) == ([["a", "b"], ["c"]], [])
    _, differing = page._grouped([*runs, run("d", 0, epochs=2)])
    assert differing == ["epochs"]


def test_other_networks_and_lengths_are_other_trainings(tmp_path, monkeypatch):
    """Where the configs are the same, too."""
    config = ConfigDict({"seed": 0, "epochs": 3})
    changes = [{"step": 1234, "changed": ["jax 1 -> 2", "epochs 1 -> 3"]}]
    summaries = {"a": {}, "b": {"build": "mine.py 1234"}, "c": {"changes": changes}}
    monkeypatch.setattr(page, "_finished", lambda path: summaries[path.name])
    monkeypatch.setattr(workdir, "read_config", lambda _: config)
    groups, differing = page._grouped([page._read(tmp_path / name) for name in "abc"])
    assert (len(groups), differing) == (3, ["another length", "build"])
    told = [members[0].fields["another length"] for members in groups]
    assert told == ["", "", "epochs 1 -> 3 at step 1,234"]


BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)}")
@pytest.mark.parametrize("width", [390, 1100])
def test_opens_in_a_browser(runs, tmp_path, width):
    """Nothing is wider than the screen, every figure has a size, every image loads."""
    page.write(runs / "a")
    measure = """<script>onload = () => { document.title = JSON.stringify({
        wide: document.documentElement.scrollWidth - innerWidth,
        figures: [...document.querySelectorAll("svg")].map(f => f.clientHeight),
        images: [...document.images].map(i => i.naturalWidth)}) }</script>"""
    text = (runs / "a" / "report.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{measure}</body>"))
    ended = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},800",
            *("--dump-dom", (tmp_path / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(re.search("<title>(.*?)</title>", ended.stdout)[1])
    assert found["wide"] <= 0
    assert len(found["figures"]) == 7
    assert min(found["figures"]) > 150
    assert min(found["images"]) >= 200


def test_a_short_call_is_drawn_with_the_one_before():
    rows = [
        {"step": 10, "epoch": 0.4, "train_loss": 3.0, "learning_rate": 0.1},
        {"step": 20, "epoch": 0.8, "train_loss": 2.0, "learning_rate": 0.2},
        {"step": 22, "epoch": 0.9, "train_loss": 8.0, "learning_rate": 0.3},
        {"step": 22, "epoch": 0.9, "test_loss": 1.0},
        {"step": 32, "epoch": 1.3, "train_loss": 1.0, "learning_rate": 0.4},
    ]
    points = curves.by_epoch(rows, "train_loss")
    assert points == [(0.4, 3.0), (0.9, pytest.approx(3.0)), (1.3, 1.0)]
    rates = curves.by_epoch(rows, "learning_rate")
    assert rates == [(0.4, 0.1), (0.8, 0.2), (0.9, 0.3), (1.3, 0.4)]
    tested = [row | {"test_loss": 1.0} for row in rows]
    assert [epoch for epoch, _ in curves.by_epoch(tested, "test_loss")] == (
        [0.4, 0.8, 0.9, 0.9, 1.3]
    )


def test_ticks_of_a_short_axis_differ():
    figure = page.figures.lines(
        [("test", [1, 2], [0.971, 0.984])], ("epoch", "accuracy"), percent=True
    )
    ticks = re.findall(r">([\d.]+%)<", figure)
    assert len(ticks) > 3
    assert len(set(ticks)) == len(ticks)


def test_many_classes_are_a_figure_and_the_worst():
    confusion = np.diag(np.arange(1, 31))
    confusion[4, 2] = 995
    names = tuple(f"class{number}" for number in range(30))
    shown = page._confusion(names, confusion)
    assert "<svg" in shown["figure"]
    rows = page._classes(names, confusion)
    assert len(rows) == 20
    assert rows[0]["name"] == "class4"
    assert rows[0]["taken_for"] == "class2"
    assert rows[0]["accuracy"] == pytest.approx(5 / 1000)


def test_what_is_written_by_others_is_text():
    """Class names come from data sets, and may be anything."""
    names = ("<script>alert(1)</script>", "b")
    template = page._templates.from_string("{% for n in names %}{{ n }}{% endfor %}")
    assert "<script>" not in template.render(names=names)
    axes_label = page.figures.lines([("<b>", [0, 1], [0, 1])], ("<i>", "y"))
    assert "<i>" not in axes_label


@pytest.mark.slow
def test_mistakes_are_sentences(runs, tmp_path, capsys):
    def error(status, *arguments) -> str:
        assert call(*arguments) == status
        return capsys.readouterr().err

    assert "--workdir is missing" in error(2)
    assert "holds no run" in error(2, f"--workdir={tmp_path}")
    copy = tmp_path / "copy"
    shutil.copytree(runs / "a", copy)
    (copy / "summary.json").unlink()
    assert "has not finished" in error(2, f"--workdir={copy}")
    later = json.loads((runs / "a" / "summary.json").read_text())
    later["steps"] += 10
    (copy / "config.json").write_text(
        (copy / "config.json")
        .read_text()
        .replace('"steps": 0', f'"steps": {later["steps"]}')
    )
    (copy / "summary.json").write_text(json.dumps(later))
    assert "newest intact checkpoint is of step" in error(2, f"--workdir={copy}")
    (copy / "summary.json").unlink()
    both = [f"--workdir={runs / 'a'}", f"--workdir={copy}"]
    assert "has not finished" in error(2, *both)
    (tmp_path / "folder").mkdir()
    two = [f"--workdir={runs / name}" for name in "ab"]
    for out in (tmp_path / "folder", ""):
        assert f"--out={out} is not a file" in error(2, *two, f"--out={out}")
    (tmp_path / "file").write_text("mine")
    assert f"--out={tmp_path}/file is a file" in error(
        2, *two, f"--out={tmp_path}/file/page.html"
    )
    assert "does not belong to a flag" in error(2, "page.html")
    run = str(runs / "a")
    assert f"did you mean --workdir={run}?" in error(2, run)
