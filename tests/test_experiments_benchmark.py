import importlib.util
import json

import numpy as np
import pytest

from experiments import benchmark
from experiments.peers import CONTENDERS, plain, prepare, report
from resnet_jax import command_line
from resnet_jax.config import build_network
from tests.quick import ENVIRONMENT

HAS_TORCH = importlib.util.find_spec("torch") is not None


def config_of(network: str):
    return benchmark.network_config(network, 4, 8, "fake")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["v1-8", "v2-11"])
def test_one_update_of_ours_is_the_plain_loops(network):
    config = config_of(network)
    shape = (16, 16, 3)
    variables = prepare.start_weights(build_network(config, 10), shape)
    images = np.random.default_rng(0).integers(0, 256, (8, *shape), np.uint8)
    settings = (
        variables,
        images,
        np.arange(8, dtype=np.int32),
        np.full(3, 0.5, np.float32),
    )
    assert prepare.update_error(config, *settings) < 1e-6
    config.label_smoothing = 0.1
    assert prepare.update_error(config, *settings) > 1e-2


def test_augmented_batch_holds_crops_of_its_images():
    images = np.arange(2 * 8 * 8, dtype=np.float32).reshape(2, 8, 8, 1) + 1
    batch = plain.augmented_batch(np.random.default_rng(0), images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for image, source in zip(batch, padded, strict=True):
        crops = [source[r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
        crops += [crop[:, ::-1] for crop in crops]
        assert any(np.array_equal(image, crop) for crop in crops)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the benchmark on v1-8; returns the status, what it printed, its result."""

    def run(*flags: str):
        arguments = ["--networks=v1-8", "--batch_sizes=8", "--images=8", "--rounds=1"]
        argv = ["benchmark", *arguments, f"--out={tmp_path}", *flags]
        status = command_line.call(benchmark.main, argv)
        file = tmp_path / "v1-8_8.json"
        result = json.loads(file.read_text()) if file.exists() else None
        return status, capsys.readouterr(), result

    return run


@pytest.mark.slow
def test_contenders_are_compared(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", ENVIRONMENT["XLA_FLAGS"])
    names = ["ours", "plain", *(["torch"] if HAS_TORCH else [])]
    status, printed, result = run(f"--contenders={','.join(names)}")
    assert status == 0
    assert list(result["contenders"]) == names
    assert result["update_error"] < 1e-6
    assert result["images"] == result["eval_images"] == 8
    assert "jax" in result["versions"]
    for found in result["contenders"].values():
        assert found["logits_error"] < 1e-3
        assert found["peak_bytes"] > 2**20
        assert 0 < found["first_step_seconds"] < found["first_seconds"]
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[3 : 3 + len(names)]] == names
    assert (tmp_path / "v1-8_8.png").exists()
    assert (tmp_path / "v1-8_8.svg").exists()


class StandIn:
    """A contender that gives these logits."""

    def __init__(self, logits):
        self.logits = logits

    def answer(self) -> dict:
        return {"since_start": 1.0, "seconds": 0.5}

    def ask(self, what: str) -> dict:
        return {"value": self.logits} if what == "logits" else {}


@pytest.mark.parametrize("logit", [2.01, float("nan")])
def test_a_contender_with_other_logits_is_not_timed(logit):
    running = {"ours": (StandIn([[1.0, 2.0]]), {})}
    start = benchmark._begun(StandIn([[1.0, 2.0]]), "torch", running)
    assert start["logits_error"] == 0
    with pytest.raises(benchmark.FailedError, match="its logits differ from ours"):
        benchmark._begun(StandIn([[1.0, logit]]), "torch", running)


@pytest.mark.parametrize("error", ["1.0", "NaN"])
def test_nothing_is_timed_where_an_update_differs(monkeypatch, error):
    told = f'{{"update_error": {error}}}'
    monkeypatch.setattr(benchmark.study, "run_process", lambda _: told)
    with pytest.raises(SystemExit, match="an update differs"):
        benchmark.compare(config_of("v1-8"), ["ours"], 1)


def test_what_is_not_installed_is_skipped(run, monkeypatch):
    missing = CONTENDERS["plain"]._replace(packages=("no_such_package",))
    monkeypatch.setitem(CONTENDERS, "plain", missing)
    assert benchmark.present(["plain", "ours"]) == ["ours"]
    status, printed, _ = run("--contenders=plain")
    assert status == 2
    assert "skipped plain: no_such_package is not installed" in printed.out
    assert "--contenders" in printed.err


@pytest.mark.slow
def test_where_ours_fails_nothing_is_compared(run, monkeypatch):
    class Missing(benchmark.Process):
        def answer(self):
            raise benchmark.FailedError("its process ended (out of memory)")

    monkeypatch.setattr(benchmark, "Process", Missing)
    status, printed, result = run("--contenders=ours")
    assert (status, result) == (2, None)
    assert "ours cannot be measured: its process ended (out of memory)" in printed.err


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--contenders=ours,tinygrad", "--contenders=tinygrad"),
        ("--networks=resnet18", "--networks=resnet18"),
        ("--networks=v1-9", "config.model.depth=9"),
        ("--batch_sizes=0", "--batch_sizes=0"),
        ("--batch_sizes=4", "--batch_sizes=4: give whole numbers from 8 up"),
    ],
)
def test_mistakes_are_told(run, flag, told):
    status, printed, result = run(flag)
    assert (status, result) == (2, None)
    assert told in printed.err


def test_rates_are_medians_and_bars_have_the_range_of_rounds():
    def contender(step, epoch, **more):
        seconds = {"in_memory": step, "epoch": epoch, "evaluate": [1.0] * 3, **more}
        told = {"first_step_seconds": 5.0, "first_seconds": 9.0, "peak_bytes": 2**30}
        return {"seconds": seconds, **told}

    result = {
        "network": "v1-20",
        "images": 80,
        "eval_images": 40,
        "batch_size": 8,
        "contenders": {
            "plain": contender([4.0] * 3, [5.0, 4.0, 10.0]),
            "ours": contender([1.0, 2.0, 9.0], [2.0] * 3, input=[0.5] * 3),
        },
    }
    shown = report.rates(result)
    assert shown["ours"]["step"] == 40
    assert shown["ours"]["input"] == 0.25
    assert shown["ours"]["compile"] == pytest.approx(5 - 0.2)
    assert shown["plain"]["epoch"] == 16
    assert shown["plain"]["input"] == pytest.approx(0.2)
    assert shown["plain"]["evaluate"] == 40
    (axes,) = report.draw(result).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["ours", "plain Flax loop"]
    ranges = [lines.get_segments()[0][:, 0] for lines in axes.collections]
    np.testing.assert_allclose(ranges, [[40, 40], [8, 20]])
