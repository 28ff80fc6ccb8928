import functools
import hashlib
import json
import re
import subprocess
from pathlib import Path

from resnet_jax import provenance


def test_versions_and_commit_are_there():
    found = provenance.versions_and_commit()
    assert set(found) == {"versions", "git_commit"}
    packages = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert set(found["versions"]) == {*packages, "python"}
    for version in found["versions"].values():
        assert re.match(r"\d+\.\d+", version)
    json.dumps(found)


def git(directory, *arguments):
    identity = ("-c", "user.name=name", "-c", "user.email=name@example.org")
    return subprocess.run(
        ["git", *identity, *arguments],
        cwd=directory,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_commit_is_that_of_the_code_and_says_where_files_differ(tmp_path, monkeypatch):
    code = tmp_path / "resnet_jax" / "provenance.py"
    code.parent.mkdir()
    code.write_text("first\n")
    measured = tmp_path / "experiments" / "results.jsonl"
    measured.parent.mkdir()
    measured.write_text("first\n")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.versions_and_commit()["git_commit"] is None

    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1.0", "-m", "tagged")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert provenance.versions_and_commit()["git_commit"] == commit
    measured.write_text("second\n")  # is no code
    assert provenance.versions_and_commit()["git_commit"] == commit
    found = []
    for text in ("second", "third", "second"):
        code.write_text(f"{text}\n")
        found.append(provenance.versions_and_commit()["git_commit"])
        assert re.fullmatch(f"{commit}-dirty-[0-9a-f]{{8}}", found[-1])
    assert found[0] == found[2] != found[1]  # it says which difference
    code.write_text("first\n")
    new = code.with_name("new block.py")
    for text in ("one", "two"):
        new.write_text(f"{text}\n")
        found.append(provenance.versions_and_commit()["git_commit"])
        assert re.fullmatch(f"{commit}-dirty-[0-9a-f]{{8}}", found[-1])
    assert len(set(found)) == 4


def test_source_of_a_function_is_its_file(tmp_path):
    found = provenance.source_of(functools.partial(git, tmp_path))
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert found == f"test_provenance.py {digest[:8]}"
    names = {}
    exec("def typed(): pass", names)
    assert provenance.source_of(names["typed"]) is None


def test_commit_of_a_repository_that_the_code_is_only_installed_in_is_not_its_own(
    tmp_path, monkeypatch
):
    code = tmp_path / "venv" / "resnet_jax" / "provenance.py"
    code.parent.mkdir(parents=True)
    code.write_text("first\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.versions_and_commit()["git_commit"] is None


def test_commit_is_none_where_git_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.versions_and_commit()["git_commit"] is None
