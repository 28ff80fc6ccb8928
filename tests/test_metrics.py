import json
import math
import struct
from collections import defaultdict
from pathlib import Path

import pytest

from resnet_jax import report
from resnet_jax.metrics import Recorder, read_rows
from resnet_jax.plan import Plan
from resnet_jax.workdir import WriteError

PLAN = Plan(examples=100, batch_size=10, total_steps=20, steps_per_call=4)


def start(workdir, step):
    return Recorder(workdir, read_rows(workdir), step, PLAN)


def means(loss: float) -> dict:
    return {"loss": loss, "accuracy": 0.5, "gradient_norm": 1.0}


def test_resumed_file_equals_one_that_was_not(tmp_path, capsys):
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
    straight = Recorder(
        tmp_path / "straight", read_rows(tmp_path / "straight"), 0, PLAN
    )
    for step in (4, 8, 10):
        straight.train_row(step, means(1 / step), 0.1)
    straight.epoch_row(10, 1, {"test_accuracy": 0.25, "test_examples": 7})
    straight.train_row(12, means(0.01), 0.1)
    straight.close()

    cut_off = start(tmp_path / "resumed", 0)
    cut_off.train_row(4, means(1 / 4), 0.1)
    cut_off.train_row(8, means(99.0), 0.1)
    cut_off.close()
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "epo')
    resumed = start(tmp_path / "resumed", 4)
    for step in (8, 10):
        resumed.train_row(step, means(1 / step), 0.1)
    resumed.epoch_row(10, 1, {"test_accuracy": 0.25, "test_examples": 7})
    resumed.train_row(12, means(0.01), 0.1)
    resumed.close()

    texts = [
        (tmp_path / name / "metrics.jsonl").read_text()
        for name in ("straight", "resumed")
    ]
    assert texts[0] == texts[1]
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    average = (4 * (1 / 4) + 4 * (1 / 8) + 2 * (1 / 10)) / 10
    for line in lines:
        assert line.startswith(
            f"epoch 1, step 10 of 20, train loss {average:.4f}, accuracy 50.00%, "
            "test accuracy 25.00%"
        )
    assert len(lines) == 2


def events_of(path: Path) -> list:
    """TensorBoard's events in a file."""
    from tensorboardX.proto import event_pb2  # after Recorder, which hides PyTorch

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]  # each part has a checksum
    return found


def scalars_of(path: Path) -> dict[int, dict[str, float]]:
    """The scalars of such a file, by step and name."""
    found = defaultdict(dict)
    for event in events_of(path):
        for value in event.summary.value:
            found[event.step][value.tag] = value.simple_value
    return dict(found)


def test_a_file_in_the_place_of_tensorboards_is_a_sentence(tmp_path):
    (tmp_path / "tensorboard").write_text("mine")
    with pytest.raises(WriteError, match=r"tensorboard cannot be written .*exists"):
        start(tmp_path, 0)


def test_what_is_written_is_there_for_tensorboard_too(tmp_path):
    recorder = start(tmp_path, 0)
    (events,) = tmp_path.glob("tensorboard/events*")
    recorder.train_row(4, means(0.5), 0.1)
    recorder.write()
    assert scalars_of(events).keys() == {4}
    recorder.train_row(10, means(0.3), 0.1)
    recorder.epoch_row(10, 1, {"test_accuracy": 0.25, "test_loss": math.inf})
    recorder.close()
    train = {"train_accuracy": 0.5, "train_gradient_norm": 1.0, "learning_rate": 0.1}
    expected = {
        4: {"train_loss": 0.5, **train},
        10: {"train_loss": 0.3, **train, "test_accuracy": 0.25},
    }
    found = scalars_of(events)
    assert found.keys() == expected.keys()
    for step, scalars in expected.items():
        assert found[step] == pytest.approx(scalars, rel=1e-6)


def test_tensorboard_hides_what_came_after_the_step_that_a_run_resumes_from(tmp_path):
    recorder = start(tmp_path, 0)
    for step in (4, 8):
        recorder.train_row(step, means(1 / step), 0.1)
    recorder.close()
    (before,) = tmp_path.glob("tensorboard/events*")
    before.unlink()
    start(tmp_path, 4).close()
    (events,) = tmp_path.glob("tensorboard/events*")
    starts = [event for event in events_of(events) if event.HasField("session_log")]
    # TensorBoard drops earlier events from a start's step on.
    assert [event.step for event in starts] == [5]


def test_an_evaluation_takes_the_place_of_an_earlier_one_of_its_step(tmp_path):
    recorder = start(tmp_path, 0)
    recorder.train_row(10, means(1.0), 0.1)
    assert not recorder.evaluated(10)
    recorder.epoch_row(10, 1, {"validation_accuracy": 0.25})
    assert recorder.evaluated(10)
    recorder.epoch_row(10, 1, {"validation_accuracy": 0.5, "test_accuracy": 0.75})
    recorder.close()
    _, evaluation = read_rows(tmp_path)
    assert evaluation["validation_accuracy"] == 0.5
    assert evaluation["test_accuracy"] == 0.75


def test_rows_have_seven_digits(tmp_path):
    recorder = start(tmp_path, 0)
    recorder.train_row(10, means(0.123456789), 0.1)
    recorder.close()
    assert read_rows(tmp_path)[0]["train_loss"] == 0.1234568


def test_log_without_progress_bar_has_a_line_each_minute(tmp_path, capsys, monkeypatch):
    times = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: times[-1])
    recorder = start(tmp_path, 0)
    for seconds, step in ((50.0, 4), (70.0, 8), (100.0, 10)):
        times.append(seconds)
        recorder.train_row(step, means(1 / step), 0.1)
    recorder.close()
    told = capsys.readouterr().out.splitlines()
    assert told == ["epoch 0.8, step 8 of 20, loss 0.125, accuracy 50.0%, 01:45 left"]


def test_rows_are_json_without_nan(tmp_path):
    recorder = start(tmp_path, 0)
    recorder.train_row(10, means(1.0), 0.1)
    recorder.epoch_row(10, 1, {"test_loss": math.inf})
    recorder.close()
    line = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse)["test_loss"] is None


def test_epoch_whose_rows_were_deleted_is_told_without_its_means(tmp_path, capsys):
    recorder = start(tmp_path, 10)
    recorder.epoch_row(10, 1, {"test_accuracy": 0.25})
    recorder.close()
    told = capsys.readouterr().out.strip()
    assert told == "epoch 1, step 10 of 20, test accuracy 25.00%"


def test_mean_of_an_epoch_is_of_the_rows_that_there_are(tmp_path, capsys):
    recorder = start(tmp_path, 4)
    for step, loss in ((5, 1.0), (7, 2.0), (10, 3.0)):
        recorder.train_row(step, means(loss), 0.1)
    recorder.epoch_row(10, 1, {})
    recorder.close()
    mean_loss = (1 * 1 + 2 * 2 + 3 * 3) / 6
    assert f"train loss {mean_loss:.4f}" in capsys.readouterr().out


def test_mean_of_a_later_epoch_is_of_its_own_steps(tmp_path, capsys):
    recorder = start(tmp_path, 0)
    for step, loss in ((4, 9.0), (10, 9.0), (12, 1.0), (20, 2.0)):
        recorder.train_row(step, means(loss), 0.1)
    recorder.epoch_row(20, 2, {})
    recorder.close()
    assert f"train loss {(2 * 1 + 8 * 2) / 10:.4f}" in capsys.readouterr().out


def test_rows_of_a_new_run_are_none(tmp_path):
    assert read_rows(tmp_path) == []


def test_curves_are_drawn_of_what_there_is(tmp_path):
    recorder = start(tmp_path, 0)
    recorder.train_row(4, means(1.0), 0.1)
    recorder.train_row(10, means(0.5), 0.1)
    recorder.epoch_row(10, 1, {"validation_accuracy": 0.25, "validation_loss": 2.0})
    recorder.close()
    report.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
