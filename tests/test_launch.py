"""The launch scripts, with stand-ins for the commands of Google Cloud and Slurm."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["tpu_vm.sh", "tpu_worker.sh", "slurm.sbatch"]
BUCKET = "--workdir=gs://bucket/run"
MAIN = ["python", "-m", "resnet_jax.main"]

pytestmark = [
    pytest.mark.slow,  # all together
    pytest.mark.skipif(
        not all(map(shutil.which, ("bash", "flock", "setsid"))), reason="needs Linux"
    ),
]

# All that the scripts find on their PATH besides the stand-ins.
TOOLS = (
    *("bash", "cat", "cp", "cut", "dirname", "env", "flock", "grep", "gzip", "head"),
    *(
        "ls",
        "mkdir",
        "mktemp",
        "rm",
        "sed",
        "setsid",
        "sh",
        "sleep",
        "tail",
        "tar",
        "find",
    ),
    "true",
)

# Each stand-in appends its arguments to $CLOUD/calls. What exists in the cloud is a
# file: $CLOUD/tpu-vm and $CLOUD/queued-resources hold states, $CLOUD/disks/N a worker's
# home. $CLOUD/to_come holds states that the next looks find, one a line and look.
RECORD = r"""#!/usr/bin/env bash
set -u
printf -v call '%s\x1f' "${0##*/}" "$@"
printf '%s\x1e' "$call" >> "$CLOUD/calls" # at once: a training runs beside gcloud
"""
GCLOUD = r"""
option() { local a; for a; do [[ $a == $wanted=* ]] && echo "${a#*=}"; done; }
value() { wanted=$1; shift; option "$@"; }
workers() {
    if [[ $(value --worker "$@") == all ]]; then ls "$CLOUD/disks"; else echo 0; fi
}
if [[ $1 == storage ]]; then
    mkdir -p "${!#}"; echo fetched > "${!#}/from_bucket"; exit
fi
kind=$3 verb=$4 name=$5
case $verb in
    describe)
        if [[ -s $CLOUD/to_come && $kind == tpu-vm ]]; then
            head -n 1 "$CLOUD/to_come" > "$CLOUD/tpu-vm"
            sed -i 1d "$CLOUD/to_come"
        fi
        if [[ -e $CLOUD/broken ]]; then
            echo "ERROR: (gcloud) UNAVAILABLE: try later" >&2; exit 1
        fi
        if [[ ! -e $CLOUD/$kind ]]; then
            echo "ERROR: (gcloud.compute.tpus.$kind.describe) NOT_FOUND: no" >&2; exit 1
        fi
        cat "$CLOUD/$kind"
        if [[ $(cat "$CLOUD/$kind") == WAITING_FOR_RESOURCES ]]; then
            echo ACTIVE > "$CLOUD/$kind"
        fi ;;
    create)
        [[ ! -e $CLOUD/$kind ]] || { echo "ERROR: it exists" >&2; exit 1; }
        [[ ! -e $CLOUD/no_quota ]] || { echo "ERROR: quota" >&2; exit 1; }
        if [[ -e $CLOUD/no_capacity ]]; then echo FAILED > "$CLOUD/$kind"; exit; fi
        printf 'READY\t%s\n' "$(value --labels "$@" | cut -d= -f2)" > "$CLOUD/tpu-vm"
        [[ $kind == tpu-vm ]] || echo WAITING_FOR_RESOURCES > "$CLOUD/$kind"
        for ((n = 0; n < ${HOSTS:-1}; n++)); do mkdir -p "$CLOUD/disks/$n"; done ;;
    start) printf 'READY\tresnet_jax\n' > "$CLOUD/tpu-vm" ;;
    delete)
        rm -f "$CLOUD/tpu-vm" "$CLOUD/queued-resources"
        until rm -rf "$CLOUD/disks"; do :; done ;; # a training may be writing there
    scp | ssh)
        [[ $(cat "$CLOUD/tpu-vm") == READY* ]] || exit 1
        [[ "$*" == *"sh start "* ]] && rm -f "$CLOUD/followed"
        [[ "$*" == *"sh follow "* ]] && : > "$CLOUD/followed"
        status=0
        for n in $(workers "$@"); do
            disk=$CLOUD/disks/$n
            if [[ $verb == ssh ]]; then
                command=$(value --command "$@")
                (cd "$disk" && HOME=$disk WORKER=$n bash -c "$command") || status=$?
            elif [[ $5 == --recurse ]]; then
                cp -r "$disk/$(sed 's/^[^:]*://' <<< "${@: -2:1}")" "${!#}" || status=1
            else
                cp "$5" "$disk/" || status=1
            fi
        done
        if [[ -e $CLOUD/drop && $verb == ssh && -e $CLOUD/followed ]]; then
            rm "$CLOUD/drop"; exit 255
        fi
        exit $status ;;
esac
"""
# The training: leaves its arguments and, once it is followed, ends as the next line of
# $CLOUD/script says, 'STATUS [STATE]', where the state is what the VM comes to.
PYTHON = r"""
mkdir -p runs/run && echo "$WORKER" >> runs/run/trained && echo "log of $WORKER"
[[ $WORKER == 0 && -s $CLOUD/script ]] || exit 0
for ((n = 0; n < 1000; n++)); do [[ -e $CLOUD/followed ]] && break; sleep 0.01; done
read -r status state < "$CLOUD/script"
sed -i 1d "$CLOUD/script"
if [[ -n $state ]]; then
    echo "$state" > "$CLOUD/tpu-vm"
    [[ ! -e $CLOUD/queued-resources ]] || echo SUSPENDED > "$CLOUD/queued-resources"
fi
exit "$status"
"""
SRUN = """exit "${SRUN_STATUS:-0}"\n"""


@dataclasses.dataclass
class Cloud:
    """What a launch did, and what it finds."""

    directory: Path
    here: Path

    def write(self, name, text):
        (self.directory / name).write_text(text)

    def put_vm(self, state="READY\tresnet_jax\n"):
        """A VM that was there before the launch."""
        self.write("tpu-vm", state)
        (self.directory / "disks" / "0").mkdir(parents=True)

    @property
    def calls(self):
        """Every call of a stand-in: its name and arguments."""
        path = self.directory / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1]]

    def calls_of(self, *words):
        """The calls whose first words these are, without 'compute tpus'."""
        short = [
            [word for word in call if word not in ("compute", "tpus")]
            for call in self.calls
        ]
        return [call for call in short if call[: len(words)] == list(words)]

    @property
    def trainings(self):
        return self.calls_of("python")

    @property
    def environment(self):
        directories = {"TMPDIR": self.directory, "PATH": self.directory / "bin"}
        own = {"CLOUD": self.directory, **directories}
        return os.environ | {name: str(path) for name, path in own.items()}

    def run(self, *command, **environment):
        return subprocess.run(
            command,
            cwd=self.here,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def launch(self, *arguments, command=(*MAIN, "--config=c.py", BUCKET), **variables):
        """Runs tpu_vm.sh with what every launch needs."""
        given = ["--zone=us-central2-b", "--type=v4-8", "--poll=0.01", *arguments]
        script = str(self.here.parent / "code" / "launch" / "tpu_vm.sh")
        return self.run(script, *given, "--", *command, **variables)


@pytest.fixture
def cloud(tmp_path):
    bin_directory = tmp_path / "cloud" / "bin"
    bin_directory.mkdir(parents=True)
    bodies = {
        "gcloud": GCLOUD,
        "python": PYTHON,
        "srun": SRUN,
        "scontrol": "",
        "uv": "",
    }
    for name, body in bodies.items():
        (bin_directory / name).write_text(RECORD + body)
        (bin_directory / name).chmod(0o755)
    for tool in TOOLS:
        (bin_directory / tool).symlink_to(shutil.which(tool))
    code = tmp_path / "code"
    shutil.copytree(ROOT / "launch", code / "launch")
    (code / "resnet_jax" / "data").mkdir(parents=True)
    (code / "resnet_jax" / "data" / "load.py").touch()
    for left_out in (".venv/bin", "runs", "data"):
        (code / left_out).mkdir(parents=True)
        (code / left_out / "large").touch()
    here = tmp_path / "here"
    here.mkdir()
    return Cloud(tmp_path / "cloud", here)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    subprocess.run(["bash", "-n", ROOT / "launch" / script], check=True)


@pytest.mark.parametrize("script", ["tpu_vm.sh", "tpu_worker.sh"])
def test_scripts_are_executable(script):
    assert os.access(ROOT / "launch" / script, os.X_OK)


def test_help_is_the_comment_at_the_top(cloud):
    result = cloud.run(str(ROOT / "launch" / "tpu_vm.sh"), "--help")
    assert result.returncode == 0
    text = (ROOT / "launch" / "tpu_vm.sh").read_text()
    cases = text[text.index("while ((") : text.index("esac")]
    for option in re.findall(r"(--[a-z-]+)(?:=\*|\)| \|)", cases):
        assert f"\n  {option}" in result.stdout or option == "--help"
    assert "set -euo" not in result.stdout


def test_creates_trains_fetches_and_deletes(cloud):
    result = cloud.launch(command=[*MAIN, "--config=c.py"])
    assert result.returncode == 0, result.stderr
    [create] = cloud.calls_of("gcloud", "tpu-vm", "create")
    assert create[3] == "resnet-jax"
    assert {
        "--zone=us-central2-b",
        "--accelerator-type=v4-8",
        "--version=tpu-ubuntu2204-base",
    } <= set(create)
    assert cloud.trainings == [[*MAIN, "--config=c.py"]]
    assert "log of 0" in result.stdout
    assert (cloud.here / "runs" / "run" / "trained").read_text() == "0\n"
    [delete] = cloud.calls_of("gcloud", "tpu-vm", "delete")
    assert {"resnet-jax", "--zone=us-central2-b", "--quiet"} <= set(delete)
    assert cloud.calls_of("gcloud")[-1] == delete
    assert "may still be there" not in result.stderr


def test_installs_python_and_the_packages_for_tpus(cloud):
    cloud.launch()
    venv, install = cloud.calls_of("uv")
    assert venv[-3:] == ["--python", "3.12", ".venv"]
    assert install[-2:] == ["-r", "requirements-tpu.txt"]


def test_packages_for_tpus_reach_a_bucket():
    """As the launcher demands one for spot VMs and for several hosts."""
    packages = (ROOT / "requirements-tpu.txt").read_text().split()
    assert any(package.startswith("gcsfs") for package in packages)


def test_uv_is_installed_where_it_is_missing(cloud):
    bin_directory = cloud.directory / "bin"
    (bin_directory / "uv").rename(cloud.directory / "uv")
    install = "echo 'mkdir -p ~/.local/bin && cp \"$CLOUD/uv\" ~/.local/bin'"
    (bin_directory / "curl").write_text(RECORD + install)
    (bin_directory / "curl").chmod(0o755)
    result = cloud.launch()
    assert result.returncode == 0, result.stderr
    [curl] = cloud.calls_of("curl")
    assert curl[-1] == "https://astral.sh/uv/install.sh"
    assert len(cloud.calls_of("uv")) == 2


def test_copies_the_code_without_what_is_large(cloud):
    cloud.launch("--keep")
    copied = cloud.directory / "disks" / "0" / "resnet_jax"
    assert (copied / "resnet_jax" / "data" / "load.py").exists()
    assert (copied / "launch" / "tpu_vm.sh").exists()
    assert not list(copied.rglob("large"))


def test_dry_run_prints_every_command_and_runs_none(cloud):
    result = cloud.launch("--dry-run", "--spot", "--project=mine")
    assert result.returncode == 0
    assert cloud.calls == []
    assert list(cloud.here.iterdir()) == []
    lines = result.stdout.splitlines()
    assert all(line.startswith("gcloud ") for line in lines)
    for part in (
        "queued-resources create",
        "tpu-vm scp",
        "tpu_worker.sh\\ setup",
        "tpu_worker.sh\\ start\\ python\\ -m\\ resnet_jax.main",
        "storage cp --recursive gs://bucket/run runs/",
        "queued-resources delete",
    ):
        assert any(part in line for line in lines), part
    tpu = [line for line in lines if "compute tpus" in line]
    assert all("--project=mine" in line for line in tpu)


def test_dry_run_needs_no_gcloud(cloud):
    (cloud.directory / "bin" / "gcloud").unlink()
    assert cloud.launch("--dry-run").returncode == 0
    result = cloud.launch()
    assert result.returncode == 2
    assert "gcloud is not installed" in result.stderr


@pytest.mark.parametrize(
    ("type_", "runtime"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_follows_the_type(cloud, type_, runtime):
    result = cloud.launch(f"--type={type_}", "--dry-run")
    assert f"--version={runtime}" in result.stdout


def test_runtime_can_be_given(cloud):
    result = cloud.launch("--type=v9x-8", "--runtime=new", "--dry-run", "--spot")
    assert "--runtime-version=new" in result.stdout


def test_uses_a_vm_that_is_there(cloud):
    cloud.put_vm()
    assert cloud.launch().returncode == 0
    assert cloud.calls_of("gcloud", "tpu-vm", "create") == []
    assert len(cloud.trainings) == 1
    assert len(cloud.calls_of("gcloud", "tpu-vm", "delete")) == 1


def test_starts_a_vm_that_is_stopped(cloud):
    cloud.put_vm("STOPPED\tresnet_jax\n")
    assert cloud.launch().returncode == 0
    assert len(cloud.calls_of("gcloud", "tpu-vm", "start")) == 1
    assert cloud.calls_of("gcloud", "tpu-vm", "create") == []


def test_waits_for_a_vm_that_is_on_its_way(cloud):
    cloud.put_vm("CREATING\tresnet_jax\n")
    cloud.write("to_come", "CREATING\tresnet_jax\n" * 3 + "READY\tresnet_jax\n")
    result = cloud.launch()
    assert result.returncode == 0
    assert result.stderr.count("waiting: CREATING") == 1


@pytest.mark.parametrize(
    "state", ["PREEMPTED\tresnet_jax\n", "TERMINATED\tresnet_jax\n"]
)
def test_replaces_a_dead_vm_even_without_restarts(cloud, state):
    cloud.put_vm(state)
    assert cloud.launch("--restarts=0").returncode == 0
    assert len(cloud.calls_of("gcloud", "tpu-vm", "create")) == 1


def test_vm_made_by_other_means_is_not_deleted(cloud):
    cloud.put_vm("READY\t\n")
    result = cloud.launch()
    assert result.returncode == 0
    assert len(cloud.trainings) == 1
    assert cloud.calls_of("gcloud", "tpu-vm", "delete") == []


def test_keep_tells_how_to_delete(cloud):
    result = cloud.launch("--keep")
    assert result.returncode == 0
    assert cloud.calls_of("gcloud", "tpu-vm", "delete") == []
    told = re.search(r"this deletes it: (gcloud .*)", result.stderr)[1]
    assert cloud.run(*told.split()).returncode == 0
    assert not (cloud.directory / "tpu-vm").exists()


def test_pod_slice_runs_on_all_workers_and_shows_the_first(cloud):
    result = cloud.launch("--type=v4-32", HOSTS="4")
    assert result.returncode == 0, result.stderr
    assert len(cloud.trainings) == 4
    assert len(cloud.calls_of("uv")) == 8
    assert "log of 0" in result.stdout
    assert "log of 1" not in result.stdout
    *copy_and_start, follow = cloud.calls_of("gcloud", "tpu-vm", "ssh")
    assert all("--worker=all" in call for call in copy_and_start)
    assert "--worker=0" in follow


def test_arguments_arrive_as_they_are(cloud):
    given = [
        "--config.dataset.train_split='train[:100]'",
        "--config.dataset.train_split=train[:100]",
        "two  spaces",
        'double " and $HOME and `date`',
        "a\nline; exit 7",
        "*",
        "",
        BUCKET,
    ]
    assert cloud.launch(command=[*MAIN, *given]).returncode == 0
    assert cloud.trainings == [[*MAIN, *given]]


def test_spot_goes_through_the_queue(cloud):
    result = cloud.launch("--spot", "--type=v6e-8")
    assert result.returncode == 0, result.stderr
    [create] = cloud.calls_of("gcloud", "queued-resources", "create")
    assert {
        "--node-id=resnet-jax",
        "--accelerator-type=v6e-8",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
    } <= set(create)
    assert "waiting: WAITING_FOR_RESOURCES" in result.stderr
    [delete] = cloud.calls_of("gcloud", "queued-resources", "delete")
    assert "--force" in delete
    assert cloud.calls_of("gcloud", "tpu-vm", "delete") == []


# Killed with the VM, in the middle or after saving, or the connection was.
@pytest.mark.parametrize("status", [143, 130, 137, 1, 255])
def test_preemption_leads_to_a_new_vm_and_the_same_command(cloud, status):
    cloud.write("script", f"{status} PREEMPTED\n")
    result = cloud.launch("--spot")
    assert result.returncode == 0, result.stderr
    assert len(cloud.calls_of("gcloud", "queued-resources", "create")) == 2
    assert len(cloud.calls_of("gcloud", "queued-resources", "delete")) == 2
    first, second = cloud.trainings
    assert first == second == [*MAIN, "--config=c.py", BUCKET]
    assert "was taken away: starting again (9 more" in result.stderr


def test_preemption_is_noticed_late(cloud):
    cloud.write("script", "143\n")
    cloud.write("to_come", "READY\tresnet_jax\n" * 4 + "PREEMPTED\tresnet_jax\n")
    cloud.put_vm()
    assert cloud.launch("--spot").returncode == 0
    assert len(cloud.trainings) == 2


@pytest.mark.parametrize("arguments", [(), ("--spot",)])
@pytest.mark.parametrize("status", [1, 2, 143, 9])
def test_error_on_a_vm_that_lasts_is_not_tried_again(cloud, arguments, status):
    cloud.write("script", f"{status}\n")
    assert cloud.launch(*arguments).returncode == status
    assert len(cloud.trainings) == 1
    assert not (cloud.directory / "tpu-vm").exists()


def test_mistake_is_not_tried_again_even_on_a_vm_that_is_gone(cloud):
    cloud.write("script", "2 PREEMPTED\n")
    assert cloud.launch("--spot").returncode == 2
    assert len(cloud.trainings) == 1


def test_restarts_have_a_limit(cloud):
    cloud.write("script", "143 PREEMPTED\n" * 9)
    result = cloud.launch("--spot", "--restarts=2")
    assert result.returncode == 1
    assert len(cloud.trainings) == 3
    assert "no restart is left" in result.stderr


def test_requests_that_fail_count_as_restarts(cloud):
    cloud.write("no_capacity", "")
    result = cloud.launch("--spot", "--restarts=2")
    assert result.returncode == 1
    assert len(cloud.calls_of("gcloud", "queued-resources", "create")) == 3
    assert "entered the state FAILED" in result.stderr


def test_gcloud_that_cannot_create_ends_the_launch(cloud):
    cloud.write("no_quota", "")
    result = cloud.launch()
    assert result.returncode == 1
    assert "ERROR: quota" in result.stderr
    assert len(cloud.calls_of("gcloud", "tpu-vm", "create")) == 1


def test_gcloud_that_cannot_look_ends_the_launch(cloud):
    cloud.put_vm()
    cloud.write("broken", "")
    result = cloud.launch()
    assert result.returncode == 1
    assert "UNAVAILABLE" in result.stderr
    assert {call[1] for call in cloud.calls_of("gcloud")} == {"queued-resources"}


def test_local_results_do_not_survive_the_vm(cloud):
    cloud.write("script", "1 TERMINATED\n")
    result = cloud.launch(command=[*MAIN, "--config=c.py"])
    assert result.returncode == 1
    assert "--workdir=gs://BUCKET/DIR keeps it" in result.stderr
    assert len(cloud.trainings) == 1


def test_lost_connection_is_made_again(cloud):
    cloud.write("drop", "")
    result = cloud.launch()
    assert result.returncode == 0, result.stderr
    assert "the connection was lost: starting again" in result.stderr
    assert len(cloud.calls_of("gcloud", "tpu-vm", "create")) == 1


def run_worker(cloud, *arguments):
    return cloud.run(
        str(cloud.here.parent / "code" / "launch" / "tpu_worker.sh"), *arguments
    )


@pytest.fixture
def long_command(cloud):
    """Runs until `cloud.directory / "end"` exists."""
    wait = "echo begun; until [[ -e $CLOUD/end ]]; do sleep 0.01; done; echo over"
    yield ["bash", "-c", f'{wait}; echo >> "$CLOUD/n"']
    cloud.write("end", "")


def test_second_start_finds_the_first_ones_training(cloud, long_command):
    for _ in range(2):
        assert run_worker(cloud, "start", *long_command).returncode == 0
    cloud.write("end", "")
    result = run_worker(cloud, "follow", "+1")
    assert (result.returncode, result.stdout) == (0, "begun\nover\n")
    assert (cloud.directory / "n").read_text() == "\n"


def test_training_that_runs_is_left_alone(cloud, long_command):
    """A launch with another command neither disturbs it nor deletes its VM."""
    cloud.put_vm()
    code = cloud.directory / "disks" / "0" / "resnet_jax"
    shutil.copytree(cloud.here.parent / "code", code)
    (code / "launch" / "mine").touch()
    cloud.run(str(code / "launch" / "tpu_worker.sh"), "start", *long_command)
    result = cloud.launch()
    assert result.returncode == 2
    assert "another command is running" in result.stderr
    assert cloud.calls_of("uv") == cloud.trainings == []
    assert (cloud.directory / "tpu-vm").exists()


def test_shutdown_waits_until_the_training_has_saved(cloud):
    """SIGTERM to the whole group: the wrapper stays to note the training's status."""
    save = "trap 'exit 143' TERM; echo $PPID; for n in {1..1000}; do sleep 0.01; done"
    run_worker(cloud, "start", "bash", "-c", save)
    log = cloud.here.parent / "code" / "run.log"
    while not log.read_text().endswith("\n"):
        pass
    os.killpg(int(log.read_text()), signal.SIGTERM)
    assert run_worker(cloud, "follow", "+1").returncode == 143


def test_vm_that_went_down_looks_like_a_lost_connection(cloud):
    """The training cannot have noted a status."""
    run_worker(cloud, "start", "true")
    run_worker(cloud, "follow", "+1")
    (cloud.here.parent / "code" / "run.status").unlink()
    assert run_worker(cloud, "follow", "+1").returncode == 255


def test_interrupt_leaves_the_training_running(cloud, long_command):
    script = str(cloud.here.parent / "code" / "launch" / "tpu_vm.sh")
    options = ["--zone=us-central2-b", "--type=v4-8", "--"]
    command = [*long_command, BUCKET]
    # Shells ignore SIGINT in what they run in the background, as these tests may be.
    heeding = ["env", "--default-signal=INT"]
    with subprocess.Popen(
        [*heeding, script, *options, *command],
        cwd=cloud.here,
        env=cloud.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=10)[1]
    assert process.returncode == 130
    assert "the same launch continues with it" in error
    assert not (cloud.directory / "n").exists()
    cloud.write("end", "")
    result = cloud.launch(command=command)
    assert (result.returncode, result.stdout) == (0, "begun\nover\n")
    assert len(cloud.calls_of("gcloud", "tpu-vm", "create")) == 1


@pytest.mark.parametrize(
    ("workdir", "source", "destination"),
    [
        (["--workdir=gs://bucket/a/"], "gs://bucket/a", "runs/"),
        (["--workdir", "gs://bucket/a"], "gs://bucket/a", "runs/"),
        ([], "resnet-jax:resnet_jax/runs", "."),
        (["--workdir=runs/a/b"], "resnet-jax:resnet_jax/runs", "."),
        (["--workdir=out/a"], "resnet-jax:resnet_jax/out/a", "runs/"),
        (["-workdir=out/a"], "resnet-jax:resnet_jax/out/a", "runs/"),
        (["--workdir=/mnt/a"], "resnet-jax:/mnt/a", "runs/"),
        (["--workdir=~/a"], "resnet-jax:a", "runs/"),
    ],
)
def test_results_are_fetched_from_where_they_are(cloud, workdir, source, destination):
    result = cloud.launch("--dry-run", command=[*MAIN, *workdir])
    fetch = result.stdout.splitlines()[-2]
    assert ("storage" in fetch) == source.startswith("gs://")
    assert fetch.split()[-2:] == [source, destination]


def test_results_come_from_the_bucket(cloud):
    cloud.launch()
    assert (cloud.here / "runs" / "from_bucket").exists()


def test_vm_is_kept_where_the_results_cannot_be_fetched(cloud):
    result = cloud.launch(command=[*MAIN, "--workdir=/not/there"])
    assert result.returncode == 1
    assert "could not be fetched" in result.stderr
    assert (cloud.directory / "tpu-vm").exists()


def test_vm_is_kept_with_a_local_run_that_was_stopped(cloud):
    cloud.write("script", "143\n")
    assert cloud.launch(command=[*MAIN, "--config=c.py"]).returncode == 143
    assert (cloud.here / "runs" / "run" / "trained").exists()
    assert (cloud.directory / "tpu-vm").exists()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--zone=us-central2"], ["--zone=us-central2", "us-central2-b"]),
        (["--zone="], ["--zone is missing", "us-central2-b"]),
        (["--type=v4"], ["--type=v4", "v4-8"]),
        (["--type=v5e-8"], ["--type=v5e-8", "v5litepod", "--runtime=VERSION"]),
        (["--name=My_VM"], ["--name=My_VM", "lower-case"]),
        (["--restarts=many"], ["--restarts=many", "number"]),
        (["--restarts=-1"], ["--restarts=-1", "number"]),
        (["--poll=soon"], ["--poll=soon", "seconds"]),
        (["--name", "x"], ["--name", "--OPTION=VALUE"]),
        (["--config=c.py"], ["--config=c.py", "after --"]),
        (["train"], ["train", "after --"]),
        (["--spot", "workdir"], ["--workdir=gs://BUCKET/DIR", "'out'", "--spot"]),
        (["--type=v4-32", "workdir"], ["--workdir=gs://BUCKET/DIR", "'out'", "v4-32"]),
        (["--type=v5litepod-16", "workdir"], ["--workdir=gs://BUCKET/DIR", "hosts"]),
    ],
)
def test_bad_use_is_told_in_a_sentence(cloud, arguments, texts):
    local = "workdir" in arguments
    command = [*MAIN, "--workdir=out" if local else BUCKET]
    arguments = [argument for argument in arguments if argument != "workdir"]
    assert_refused(cloud, cloud.launch(*arguments, command=command), *texts)


def assert_refused(cloud, result, *texts):
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for text in texts:
        assert text in result.stderr
    assert cloud.calls == []
    assert list(cloud.here.iterdir()) == []


def test_nothing_to_run_is_told_in_a_sentence(cloud):
    script = str(ROOT / "launch" / "tpu_vm.sh")
    for arguments in ([], ["--zone=us-central2-b"], ["--type=v4-8", "--"]):
        assert_refused(cloud, cloud.run(script, *arguments), "no command was given")


def test_spot_with_a_local_workdir_can_be_risked(cloud):
    result = cloud.launch("--spot", "--restarts=0", command=MAIN)
    assert result.returncode == 0


def submit(cloud, *arguments, **variables):
    variables = {"SLURM_JOB_ID": "71", "PYTHON": "python"} | variables
    variables.setdefault("SLURM_SUBMIT_DIR", str(cloud.here))
    return cloud.run(
        "bash", str(ROOT / "launch" / "slurm.sbatch"), *arguments, **variables
    )


def test_slurm_runs_the_training_as_tasks(cloud):
    given = ["--config=configs/v1_20.py", "--config.dataset.train_split=train[: 9]"]
    assert submit(cloud, *given, SLURM_CPUS_PER_TASK="8").returncode == 0
    [srun] = cloud.calls
    assert srun[0] == "srun"
    # JAX takes the GPU of a task's local number, so that the task must see them all.
    assert "--gpu-bind=none" in srun
    assert "--cpus-per-task=8" in srun
    assert srun[srun.index("python") :] == ["python", "-u", *MAIN[1:], *given]


def test_slurm_script_asks_for_the_signal_to_the_tasks():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    directives = re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE)
    assert "--signal=TERM@60" in directives
    assert "--requeue" in directives
    # Slurm reads them up to the first command.
    assert text.index("set -euo") > text.rindex("#SBATCH")


def test_slurm_queues_a_stopped_training_again(cloud):
    assert submit(cloud, "--config=c.py", SRUN_STATUS="143").returncode == 143
    assert cloud.calls_of("scontrol") == [["scontrol", "requeue", "71"]]


@pytest.mark.parametrize("status", ["0", "1", "2", "130", "137"])
def test_slurm_leaves_every_other_end(cloud, status):
    assert submit(cloud, "-c", SRUN_STATUS=status).returncode == int(status)
    assert cloud.calls_of("scontrol") == []


def test_slurm_restarts_have_a_limit(cloud):
    result = submit(
        cloud, "-c", SRUN_STATUS="143", SLURM_RESTART_COUNT="5", RESTARTS="5"
    )
    assert result.returncode == 143
    assert "RESTARTS=5" in result.stderr
    assert cloud.calls_of("scontrol") == []


def test_slurm_bad_use_is_told_in_a_sentence(cloud):
    assert_refused(cloud, submit(cloud), "--config=configs/v1_20.py")
    result = submit(cloud, "-c", PYTHON=".venv/bin/python")
    assert_refused(cloud, result, ".venv/bin/python", "requirements-cuda.txt")
