"""Processes that train together: started here, two of them, over the local network."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from resnet_jax import UserError, hosts, train
from resnet_jax.metrics import read_rows
from tests.quick import ENVIRONMENT
from tests.test_parallel import devices_of, float64_run
from tests.test_train import saved_arrays

ROOT = Path(__file__).parents[1]
ARGUMENTS = [
    f"--config={ROOT}/configs/digits.py",
    *("--config.model.version=1", "--config.model.depth=8", "--config.model.width=4"),
    *("--config.optimizer.learning_rate=0.01", "--config.schedule.name=constant"),
    *("--config.schedule.warmup_epochs=0", "--config.checkpoint.every=1"),
    "--config.steps_per_call=1",
]


def config(steps: int):
    config = common.get_config("smoke", version=1, depth=8, width=4)
    config.update(steps=steps, steps_per_call=1)
    config.optimizer.learning_rate = 0.01
    config.schedule.update(name="constant", warmup_epochs=0.0)
    config.checkpoint.every = 1
    config.dataset.train_split = "train[:512]"
    return config


class Pair:
    """Two processes, and what each prints."""

    def __init__(self, directory: Path, command: list[str], devices: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [directory / f"log{number}" for number in (0, 1)]
        self.processes = []
        for number, log in enumerate(self.logs):
            given = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
            given += [f"--process_id={number}"]
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-u", *command, *given],
                        cwd=ROOT,
                        env=os.environ
                        | ENVIRONMENT
                        | {"JAX_NUM_CPU_DEVICES": str(devices)},
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit statuses. None of them outlives a test that fails."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0, end - time.monotonic())) for p in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 300
        while text not in self.logs[0].read_text():
            assert self.processes[0].poll() is None, self.logs[0].read_text()
            assert time.monotonic() < end, self.logs[0].read_text()
            time.sleep(0.05)


def training(directory: Path, steps: int, devices: int = 1, *changes: str) -> Pair:
    command = ["-m", "resnet_jax.main", *ARGUMENTS, f"--config.steps={steps}"]
    command += ["--config.dataset.train_split=train[:512]"]  # epochs of 8 steps
    command += [f"--workdir={directory / 'run'}", *changes]
    return Pair(directory, command, devices)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path):
    script = (
        "import sys, jax, numpy as np\n"
        "from resnet_jax import hosts\n"
        "from tests.test_parallel import float64_run\n"
        "address, count, number = (a.partition('=')[2] for a in sys.argv[2:])\n"
        "hosts.join(address, int(count), int(number))\n"
        "assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4\n"
        "losses, leaves = float64_run(jax.devices())\n"
        "if hosts.is_first(): np.savez(sys.argv[1], losses, *leaves)\n"
    )
    pair = Pair(tmp_path, ["-c", script, str(tmp_path / "arrays.npz")], devices=4)
    losses, leaves = float64_run(devices_of(8))
    assert pair.wait() == [0, 0], pair.logs[0].read_text() + pair.logs[1].read_text()
    found = np.load(tmp_path / "arrays.npz")
    expected = [losses, *leaves]
    for name, array in zip(found.files, expected, strict=True):
        np.testing.assert_allclose(found[name], array, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_signal_to_one_saves_in_both_and_one_alone_goes_on(
    tmp_path, quick_compilation, mode
):
    mode = f"--config.parallel={mode}"
    pair = training(tmp_path, 10**6, 2, mode)
    pair.wait_for("saved     step 8:")
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [143, 143]
    stopped = [
        re.search(r"stopped: by SIGTERM at step (\d+) of .*, which is saved", text)
        for text in (log.read_text() for log in pair.logs)
    ]
    step = int(stopped[0][1])
    assert step == int(stopped[1][1]) > 8
    assert "epoch 1" not in pair.logs[1].read_text()

    again = training(tmp_path, step + 2, 2, mode)
    assert again.wait() == [0, 0], again.logs[0].read_text()
    assert f"resumed   at step {step} of" in again.logs[0].read_text()
    assert "4 x cpu of 2 processes" in again.logs[0].read_text()
    assert (tmp_path / "run" / "report.html").exists()
    # One process, by jit, with what the two have saved.
    summary = train.train_and_evaluate(config(step + 4), tmp_path / "run")
    assert summary["steps"] == step + 4
    assert summary["test_examples"] == 360
    assert any("device_count 4 -> 8" in c for c in summary["changes"][-1]["changed"])
    steps = [r["step"] for r in read_rows(tmp_path / "run") if "train_loss" in r]
    assert steps == list(range(1, step + 5))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_death_of_one_ends_the_other(tmp_path, dies):
    pair = training(tmp_path, 10**6)
    pair.wait_for("saved     step 8:")
    pair.processes[dies].kill()
    start = time.monotonic()
    assert pair.processes[1 - dies].wait(60) != 0
    assert time.monotonic() - start < 60
    pair.wait()
    told = pair.logs[1 - dies].read_text()
    assert "another process was lost" in told or "another task died" in told
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert {"8", "16", "24"} & set(saved)
    assert len(saved_arrays(tmp_path / "run", config(8))) > 10


@pytest.mark.slow
def test_error_of_the_first_is_told_by_both(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    pair = training(tmp_path, 4)
    assert pair.wait() == [2, 2]
    for log in pair.logs:
        assert (
            "is neither empty nor a run: give a new or empty directory"
            in log.read_text()
        )


@pytest.mark.slow
def test_a_signal_to_the_first_while_it_prepares_ends_both(tmp_path):
    script = (
        "import os, signal, sys, time\n"
        "from resnet_jax import command_line, hosts\n"
        "from resnet_jax.preemption import Preemption\n"
        "def make():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    except Exception: print('taken for a failure')\n"
        "def main(argv):\n"
        "    address, count, number = (a.partition('=')[2] for a in argv[1:])\n"
        "    hosts.join(address, int(count), int(number))\n"
        "    with Preemption(): hosts.run_on_first(make)\n"
        "command_line.run(main)\n"
    )
    pair = Pair(tmp_path, ["-c", script], devices=1)
    assert pair.wait(120) == [143, 143]
    for log in pair.logs:
        assert "\nstopped: by SIGTERM while starting: the same" in log.read_text()


@pytest.mark.slow
def test_others_wait_until_the_first_has_saved(tmp_path):
    """However long it takes: JAX ends a process whose others have ended."""
    script = (
        "import sys, time\n"
        "from resnet_jax import command_line, hosts, main\n"
        "from resnet_jax.checkpoint import Checkpoints\n"
        "hosts._SILENT_SECONDS, hosts._CHUNK, wait = 6, 1000, Checkpoints.wait\n"
        "def slowly(self):\n"
        "    time.sleep(10)\n"
        "    return wait(self)\n"
        "Checkpoints.wait = slowly\n"
        "command_line.run(main.main)\n"
    )
    steps = ["--config.steps=100000", "--config.checkpoint.every=1000"]
    run = f"--workdir={tmp_path / 'run'}"
    pair = Pair(tmp_path, ["-c", script, *ARGUMENTS, *steps, run], devices=1)
    pair.wait_for("epoch 1,")
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [143, 143], pair.logs[0].read_text()
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"at step {int(saved.name):,} of" in pair.logs[1].read_text()


@pytest.mark.slow
def test_the_first_alone_looks_for_the_data(tmp_path):
    where = f"--config.dataset.path={tmp_path / 'pictures'}"
    pair = training(tmp_path, 4, 1, "--config.dataset.name=image_folder", where)
    assert pair.wait() == [2, 2]
    first, second = (log.read_text() for log in pair.logs)
    assert f"config.dataset.path={tmp_path / 'pictures'}" in first
    assert first.splitlines()[-1] == second.splitlines()[-1]


@pytest.mark.slow
def test_each_process_reads_its_share_of_a_streamed_set(tmp_path, quick_compilation):
    script = (
        "import sys, numpy as np\n"
        "from resnet_jax import data, hosts, train\n"
        "from tests.test_hosts import Path, config\n"
        "address, count, number = (a.partition('=')[2] for a in sys.argv[2:])\n"
        "hosts.join(address, int(count), int(number))\n"
        "rows, read = [], data.StreamedImages.__getitem__\n"
        "def noted(self, row):\n"
        "    if self.sums: rows.append(row)\n"
        "    return read(self, row)\n"
        "data.StreamedImages.__getitem__ = noted\n"
        "streamed = config(4)\n"
        "streamed.dataset.stream = 'always'\n"
        "directory = Path(sys.argv[1])\n"
        "train.train_and_evaluate(streamed, directory / 'run')\n"
        "np.save(directory / f'rows{number}.npy', rows)\n"
    )
    pair = Pair(tmp_path, ["-c", script, str(tmp_path)], devices=4)
    straight = train.train_and_evaluate(config(4), tmp_path / "straight")
    assert pair.wait() == [0, 0], pair.logs[0].read_text() + pair.logs[1].read_text()
    # The first rows are read once more, to see how long they take.
    read = [np.load(tmp_path / f"rows{number}.npy") for number in (0, 1)]
    assert all(set(rows[:8]) <= set(rows[8:]) for rows in read)
    shares = [rows[8:] for rows in read]
    assert [len(share) for share in shares] == [4 * 32, 4 * 32]
    assert len(set(np.concatenate(shares).tolist())) == 4 * 64
    rows = [read_rows(tmp_path / run) for run in ("run", "straight")]
    for pair_of_rows in zip(*rows, strict=True):
        for first, second in zip(*(row.values() for row in pair_of_rows), strict=True):
            assert first == pytest.approx(second, rel=1e-3)
    assert straight["test_examples"] == 360


@pytest.mark.parametrize(("first", "number"), [(True, 0), (False, 1)])
def test_others_that_do_not_come_are_a_sentence(first, number):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        port = taken.getsockname()[1] if not first else 0
        if first:
            taken.close()
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        script = (
            "from resnet_jax import hosts\n"
            "hosts._JOIN_SECONDS = 1\n"
            f"hosts.join('127.0.0.1:{port}', 2, {number})\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
    assert ended.returncode == 2
    (error,) = [line for line in ended.stderr.splitlines() if "error: " in line]
    assert f"127.0.0.1:{port}" in error
    assert f"open port {port} in the firewall" in error
    assert (f"waiting   for 2 processes at 127.0.0.1:{port}\n" in ended.stdout) == first


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("10.0.0.2:8476", 2, None), "--process_id is missing"),
        ((None, 2, 0), "--coordinator is missing"),
        (("10.0.0.2:8476", None, 0), "--num_processes is missing"),
        (
            ("10.0.0.2", 2, 0),
            "--coordinator=10.0.0.2 is not an address: write HOST:PORT",
        ),
        (("10.0.0.2:x", 2, 0), "write HOST:PORT"),
        (("10.0.0.2:8476", 0, 0), "--num_processes=0: give at least 1"),
        (
            ("10.0.0.2:8476", 2, 2),
            "--process_id=2 is not one of 2 processes: give 0 to 1",
        ),
        (("10.0.0.2:8476", 2, -1), "--process_id=-1 is not one of"),
    ],
)
def test_flags_that_cannot_be(given, named):
    with pytest.raises(UserError, match=re.escape(named)):
        hosts.join(*given)
    assert hosts.count() == 1


def test_one_process_alone_waits_for_nobody(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    hosts.join(None, None, None)
    assert hosts.count() == 1
    assert hosts.is_first()
    assert hosts.max_over_processes(3) == 3
    assert hosts.run_on_first(lambda: "it") == "it"


def test_a_vm_whose_slice_does_not_meet_does_not_train_alone(monkeypatch):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(hosts, "_on_tpu_vm", lambda: True)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    failure = RuntimeError("Failed to recognize coordinator address")
    with pytest.raises(UserError, match="all processes cannot meet"):
        hosts.join(None, None, None)
    failure = ValueError("coordinator_address should be defined")  # of no slice
    hosts.join(None, None, None)
    assert hosts.count() == 1


def test_a_cpu_is_there_before_joining_looks_for_devices(tmp_path):
    """As it does on a TPU VM, also where JAX_PLATFORMS=tpu."""
    script = (
        "import jax\n"
        "from resnet_jax import command_line, hosts, main\n"
        "def join(*_):\n"
        "    print(jax.config.jax_platforms)\n"
        "    raise SystemExit\n"
        "hosts.join = join\n"
        "command_line.run(main.main)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, ARGUMENTS[0], f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "tpu"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout == "tpu,cpu\n", ended.stderr


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_launchers_are_found(monkeypatch, capsys, name, rank, number):
    called = []
    monkeypatch.setenv(name, "4")
    monkeypatch.setenv(rank, str(number))
    monkeypatch.setattr(hosts, "_count", 1)
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: called.append(args)
    )
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    hosts.join(None, None, None)
    assert called == [(None, None, None)]
    assert hosts.count() == 4
    waiting = capsys.readouterr().out == (
        "waiting   for 4 processes where their launcher says\n"
    )
    assert waiting == (number == 0)
