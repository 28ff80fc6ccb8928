import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fsspec.registry import _registry as registered

from resnet_jax import (
    UserError,
    bucket,
    command_line,
    main,
    predict,
    report,
    workdir,
)
from resnet_jax.metrics import read_rows
from tests.quick import ENVIRONMENT
from tests.stand_in_bucket import stand_in
from tests.test_hosts import ARGUMENTS, Pair
from tests.test_train import ROOT, digits_config

URL = "gs://lab/runs/a"


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Where gs:// is, and its stand-in; copies are made beside it."""
    monkeypatch.setitem(registered, "gs", None)  # taken back afterwards
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    yield stand_in(tmp_path / "cloud")
    bucket._copies.clear()


def write(directory: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): path.read_text()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_directory_of_this_machine_is_used_as_it_is(tmp_path):
    for place in ("runs/a", tmp_path, tmp_path / "b:c"):
        assert bucket.local(place) == Path(place)
        assert bucket.display_path(Path(place)) == str(place)
        bucket.send(Path(place))
    assert bucket.local("~/runs/a") == Path.home() / "runs" / "a"
    assert not bucket._copies


def test_what_a_run_needs_is_fetched_and_nothing_else(cloud):
    run = cloud.root / "lab" / "runs" / "a"
    needed = {
        "config.json": "{}",
        "metrics.jsonl": "",
        "checkpoints/10/manifest.json": "{}",
        "checkpoints/10/variables/d/0": "0",
    }
    write(run, needed | {"tensorboard/events.1": "e", "report.html": "r"})
    with bucket.sent_at_end():
        copy = bucket.local(URL)
        assert contents(copy) == needed
        assert bucket.local(URL + "/") == copy
        assert bucket.display_path(f"{copy}/x and {copy}") == f"{URL}/x and {URL}"
    assert cloud.writes == []
    assert not copy.exists()


def test_seeds_of_one_directory_are_fetched_and_sent_one_by_one(cloud):
    runs = cloud.root / "lab" / "runs" / "a"
    write(runs, {"seed0/config.json": "{}", "seed0/report.html": "r", "seeds.json": ""})
    with bucket.sent_at_end():
        copy = bucket.local(URL)
        assert contents(copy) == {"seed0/config.json": "{}"}
        write(copy, {"seed1/config.json": "{}"})
        bucket.send(copy / "seed1")
        assert contents(runs)["seed1/config.json"] == "{}"


def test_changes_go_back_whole_and_manifests_last(cloud):
    run = cloud.root / "lab" / "runs" / "a"
    whole = {"checkpoints/5/manifest.json": "m"}
    old = {"config.json": "1", "checkpoints/10/d/0": "0", "report.html": "old"}
    write(run, old | whole)
    with bucket.sent_at_end():
        copy = bucket.local(URL)
        (copy / "checkpoints" / "10").rename(copy / "checkpoints" / "damaged-10")
        new = {
            "checkpoints/20/manifest.json": "m",
            "checkpoints/20/variables/0": "2",
            "metrics.jsonl": "row\n",
            "explanations/a.png": "a",
        }
        left = {".lock": "", "checkpoints/30.orbax-checkpoint-tmp-1/d": "x"}
        write(copy, new | left | {"explanations/.b.png.part": ""})
        bucket.send(copy)
        assert cloud.writes[-2:] == [
            "lab/runs/a/checkpoints/20/manifest.json",
            "-lab/runs/a/checkpoints/10/d/0",
        ]
        before = len(cloud.writes)
        (copy / "metrics.jsonl").write_text("row\nrow\n")
        bucket.send(copy, when_due=True)
        assert len(cloud.writes) == before
    assert cloud.writes[before:] == ["lab/runs/a/metrics.jsonl"]
    expected = new | whole | {"config.json": "1", "report.html": "old"}
    expected |= {"metrics.jsonl": "row\nrow\n", "checkpoints/damaged-10/d/0": "0"}
    assert contents(run) == expected


def test_run_whose_only_checkpoint_was_cut_off_starts_again(cloud, capsys):
    runs = cloud.root / "lab" / "runs" / "a"
    cut_off = {"seed0/checkpoints/10/variables/d/0": "0"}
    whole = {"seed1/checkpoints/10/manifest.json": "m", "seed1/checkpoints/20/d/0": "0"}
    configs = {"seed0/config.json": "{}", "seed1/config.json": "{}"}
    write(runs, cut_off | whole | configs)
    with bucket.sent_at_end():
        assert contents(bucket.local(URL)) == whole | configs
    assert capsys.readouterr().err == (
        "damaged   seed0/checkpoints: none was uploaded in full; starting over\n"
    )
    assert contents(runs) == cut_off | whole | configs


def test_what_cannot_be_sent_stays_here(cloud):
    with pytest.raises(workdir.WriteError, match="Forbidden: no") as raised:  # noqa: PT012, SIM117
        with bucket.sent_at_end():
            copy = bucket.local(URL)
            write(copy, {"config.json": "1"})
            cloud.failure = type("Forbidden", (Exception,), {})("no")
    assert f"{URL} cannot be written" in str(raised.value)
    assert f"the files it lacks are in {copy})" in str(raised.value)
    assert contents(copy) == {"config.json": "1"}


def test_directory_of_other_files_is_refused(cloud):
    write(cloud.root / "lab" / "runs" / "a", {"thesis.tex": "x" * 1000})
    with pytest.raises(UserError, match=f"--workdir={URL} is neither empty nor a run"):
        bucket.local(URL)
    assert not list((cloud.root.parent / "copies").iterdir())


def call(command, *arguments: str) -> int:
    return command_line.call(command.main, ["command", *arguments])


@pytest.mark.parametrize("command", [main, predict], ids=["main", "predict"])
@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("gs://lab/a", "pip install gcsfs"),
        ("gs://lab/a", "OSError: Anonymous caller"),
        ("gs:/lab/a", "write gs://BUCKET/DIR"),
        ("gs://", "write gs://BUCKET/DIR"),
        ("ghost://lab/a", "not installed"),
    ],
    ids=["no gcsfs", "no credentials", "one slash", "no bucket", "no such store"],
)
def test_bucket_that_cannot_be_used_is_told(
    command, url, cause, cloud, monkeypatch, capsys
):
    if "gcsfs" in cause:
        monkeypatch.delitem(registered, "gs")
        monkeypatch.setitem(sys.modules, "gcsfs", None)
    cloud.failure = OSError("Anonymous caller does not have storage.objects.list")
    config = f"--config={ROOT}/configs/digits.py"
    given = [config] if command is main else [f"{ROOT}/tests/conftest.py"]
    assert call(command, f"--workdir={url}", *given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --workdir={url}")
    assert cause in error
    assert error.count("\n") == 1


def whole_checkpoints(run: Path) -> set[int]:
    return {int(path.parent.name) for path in run.glob("checkpoints/*/manifest.json")}


@pytest.mark.slow
def test_training_in_a_bucket_is_interrupted_goes_on_and_serves(tmp_path):
    config = digits_config()
    arguments = [f"--workdir={URL}", f"--config={ROOT}/configs/digits.py"]
    arguments += ["--config.model.version=1", "--config.model.depth=8"]
    arguments += ["--config.schedule.name=constant", "--config.checkpoint.every=1"]
    arguments += ["--config.schedule.warmup_epochs=0", "--config.steps_per_call=4"]
    run = tmp_path / "lab" / "runs" / "a"
    temporary = {"TMPDIR": str(tmp_path / "copies")}
    (tmp_path / "copies").mkdir()

    def start(module: str, *given: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.stand_in_bucket", str(tmp_path)]
        return subprocess.Popen(
            [*command, module, *given],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | temporary,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def output(process: subprocess.Popen) -> str:
        told = process.communicate(timeout=300)[0]
        assert process.returncode == 0, told
        return told

    process = start("main", *arguments, "--config.steps=100000")
    end = time.monotonic() + 300
    while not whole_checkpoints(run):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 143, told
    step = max(whole_checkpoints(run))
    assert f"stopped: by SIGTERM at step {step:,} of" in told
    assert f"workdir   {URL}" in told
    assert read_rows(run)[-1]["step"] == step

    total = step + 8
    told = output(start("main", *arguments, f"--config.steps={total}"))
    assert f"resumed   at step {step:,} of {total:,}" in told
    assert f"report    {URL}/report.html" in told
    assert workdir.read_summary(run)["steps"] == total
    assert workdir.read_config(run).model.depth == config.model.depth
    assert (run / "curves.png").exists()
    assert len(list((run / "tensorboard").iterdir())) == 2
    kept = whole_checkpoints(run)
    assert total in kept
    assert len(kept) == config.checkpoint.keep
    stored = [path for path in run.glob("checkpoints/*/**/*") if path.is_file()]
    names = {path.relative_to(run / "checkpoints").parts[0] for path in stored}
    assert names == set(map(str, kept))

    accuracy = workdir.read_summary(run)["test_accuracy"]
    told = output(start("evaluate", f"--workdir={URL}"))
    assert f"{URL} at step {total:,}" in told
    assert f"{accuracy:.2%}" in told
    picture = ROOT / "experiments" / "results" / "lesion" / "smoke.png"
    told = output(start("predict", f"--workdir={URL}", str(picture), "--format=csv"))
    assert told.startswith("file,") or "smoke.png" in told
    output(start("export", f"--workdir={URL}"))
    assert (run / "export" / "model.zip").exists()
    assert not list((tmp_path / "copies").glob("resnet_jax-*"))


@pytest.mark.slow
def test_of_two_processes_the_first_alone_uses_the_bucket(tmp_path):
    command = ["-m", "tests.stand_in_bucket", str(tmp_path), "main", *ARGUMENTS]
    pair = Pair(tmp_path, [*command, f"--workdir={URL}", "--config.steps=4"], 1)
    assert pair.wait() == [0, 0], pair.logs[0].read_text() + pair.logs[1].read_text()
    assert f"workdir   {URL}" in pair.logs[0].read_text()
    assert URL not in pair.logs[1].read_text()
    run = tmp_path / "lab" / "runs" / "a"
    assert workdir.read_summary(run)["steps"] == 4
    assert whole_checkpoints(run) == {4}


@pytest.mark.slow
def test_checkpoint_whose_sending_was_cut_off_is_passed_over(
    cloud, capsys, monkeypatch, quick_training
):
    monkeypatch.setattr(report, "update", lambda *_: None)  # not what is tested
    arguments = [f"--workdir={URL}", *ARGUMENTS, "--config.checkpoint.every_minutes=0"]
    run = cloud.root / "lab" / "runs" / "a"
    assert call(main, *arguments, "--config.steps=23") == 0
    assert call(main, *arguments, "--config.steps=30") == 0
    assert whole_checkpoints(run) == {23, 30}
    (run / "checkpoints" / "30" / "manifest.json").unlink()
    assert call(main, *arguments, "--config.steps=30") == 0
    told = capsys.readouterr()
    assert "damaged   checkpoint of step 30" in told.err
    assert "going back to step 23" in told.err
    assert "resumed   at step 23 of 30" in told.out
    assert whole_checkpoints(run) == {23, 30}
    assert (run / "checkpoints" / "damaged-30" / "record" / "metadata").exists()
