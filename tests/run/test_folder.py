"""The run directory: found by its recipe, refused when it is another's, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fd_scale.errors import RunError
from fd_scale.run import folder as folder_module
from fd_scale.run import presets, recipes
from fd_scale.run.folder import RunFolder, environment, write_atomically
from fd_scale.run.recipe import derive

DEMO = recipes.get("demo")


def refusal(root: Path, recipe=DEMO) -> str:
    with pytest.raises(RunError) as caught:
        RunFolder.open(root, recipe)
    return str(caught.value)


# Opening.


def test_a_new_directory_holds_its_recipe(tmp_path):
    folder = RunFolder.open(tmp_path / "deep" / "root", DEMO)
    assert folder.path == tmp_path / "deep" / "root" / f"demo-{DEMO.fingerprint}"
    assert folder.recipe.read_text() == DEMO.to_json()
    assert [entry.name for entry in folder.path.iterdir()] == ["recipe.json"]


def test_the_same_science_finds_the_same_directory(tmp_path):
    first = RunFolder.open(tmp_path, DEMO)
    elsewhere = derive(DEMO, **{"scale": "vitb_1gpu", "run.workers": 7, "data.shards": "/other", "notes": ""})
    assert RunFolder.open(str(tmp_path), elsewhere) == first
    assert first.read_recipe() == DEMO


def test_other_science_has_another_directory(tmp_path):
    first = RunFolder.open(tmp_path, DEMO)
    assert RunFolder.open(tmp_path, derive(DEMO, seed=1)).path != first.path


def test_a_directory_with_another_recipe_is_refused_by_field(tmp_path):
    folder = RunFolder.open(tmp_path, DEMO)
    edited = derive(
        DEMO, **{"optim.lr": 1e-3, "teacher.arguments": {"patch_size": 8}, "optim.clip_norm": None}
    )
    folder.recipe.write_text(edited.to_json())
    message = refusal(tmp_path)
    assert str(folder.recipe) in message
    assert "  optim.lr: 0.001 there, 0.0015 now" in message
    assert "  optim.clip_norm: None there, 3.0 now" in message
    assert "  teacher.arguments.depth: 'absent' there, 4 now" in message
    assert "student" not in message
    assert folder.recipe.read_text() == edited.to_json()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is not JSON"),
        ('{"name": "de', "is not JSON"),
        ("{}", "Field required"),
        ("[]", "expected an object"),
    ],
)
def test_a_damaged_recipe_is_refused_and_left_alone(tmp_path, content, said):
    folder = RunFolder.open(tmp_path, DEMO)
    folder.recipe.write_text(content)
    message = refusal(tmp_path)
    assert f"{folder.recipe} cannot be used" in message
    assert said in message
    assert folder.recipe.read_text() == content


def test_a_directory_of_something_else_is_refused(tmp_path):
    path = tmp_path / DEMO.run_name
    path.mkdir()
    (path / "photo.jpg").write_bytes(b"")
    assert f"{path} is no run directory: it has no recipe.json" in refusal(tmp_path)


def test_what_an_interrupted_first_start_left_is_no_obstacle(tmp_path):
    path = tmp_path / DEMO.run_name
    path.mkdir()
    (path / ".recipe.json.0badcafe.tmp").write_text('{"na')
    assert RunFolder.open(tmp_path, DEMO).read_recipe() == DEMO


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "root").write_text("")
    assert "cannot be used (Not a directory): set run.root" in refusal(tmp_path / "root")
    (tmp_path / DEMO.run_name).write_text("")
    assert "cannot be used (File exists): set run.root" in refusal(tmp_path)


def test_a_full_disk_is_not_the_users_wrong_input(tmp_path, monkeypatch):
    def full(path: Path, content: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folder_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        RunFolder.open(tmp_path, DEMO)


def test_looking_at_a_run(tmp_path):
    made = RunFolder.open(tmp_path, DEMO)
    assert RunFolder.at(str(made.path)) == made
    with pytest.raises(RunError, match=r"none does not exist"):
        RunFolder.at(tmp_path / "none")
    with pytest.raises(RunError, match=r"is no run directory: it has no recipe\.json"):
        RunFolder.at(tmp_path)


def test_a_run_that_learnt_labels_is_not_called_damaged(tmp_path):
    made = RunFolder.open(tmp_path, derive(presets.recipe_of("fd_base", images=4096), **{"data.shards": "x"}))
    with pytest.raises(RunError, match=r"is a run of `fd-scale evaluate --task finetune`, and a run of `fd-"):
        made.read_recipe()


def test_places_are_those_of_the_design(tmp_path):
    folder = RunFolder.open(tmp_path, DEMO)
    places = {
        folder.checkpoints: "checkpoints",
        folder.metrics: "metrics.jsonl",
        folder.quarantine: "quarantine.jsonl",
        folder.exports: "exports",
        folder.reports: "reports",
        folder.recipe: "recipe.json",
        folder.placement: "placement.json",
    }
    assert all(place == folder.path / name for place, name in places.items())


def test_it_travels_between_processes(tmp_path):
    folder = RunFolder.open(tmp_path, DEMO)
    assert pickle.loads(pickle.dumps(folder)) == folder


# Starts.


def test_each_start_has_a_folder_of_its_own(tmp_path):
    folder = RunFolder.open(tmp_path, DEMO)
    first = folder.new_start({"train_batch_size": 64}, {"host": "a"})
    assert first == folder.path / "starts" / "0001"
    assert json.loads((first / "ds_config.json").read_text()) == {"train_batch_size": 64}
    assert json.loads((first / "environment.json").read_text()) == {"host": "a"}
    (folder.path / "starts" / "notes.txt").write_text("not a start")
    (folder.path / "starts" / "0009").mkdir()
    assert folder.new_start({}, {}).name == "0010"
    assert folder.new_start({}, {}).name == "0011"


def test_the_environment_explains_a_number_later(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    facts = environment()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["slurm"]["slurm_job_id"] == "4711"
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"fd_scale", "torch", "timm", "deepspeed"} <= facts["versions"].keys()
    assert facts["command"] == sys.argv
    assert facts["host"]
    assert facts["cpu"]["count"] == os.cpu_count()
    assert "secret" not in json.dumps(facts)


def git(path: Path, *arguments: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@x"]
    answer = subprocess.run(
        ["git", "-C", str(path), *who, *arguments], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    place = tmp_path / "fd_scale" / "run" / "folder.py"
    place.parent.mkdir(parents=True)
    place.write_text("1\n")
    monkeypatch.setattr(folder_module, "__file__", str(place))
    assert environment()["source"] == {}
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "scratch.txt").write_text("untracked files are no change")
    assert environment()["source"] == {"commit": head, "uncommitted_changes": False}
    place.write_text("2\n")
    assert environment()["source"] == {"commit": head, "uncommitted_changes": True}


def test_a_machine_without_git_is_no_error(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(folder_module, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    monkeypatch.setenv("PATH", "")
    assert environment()["source"] == {"commit": None, "uncommitted_changes": None}


# Whole files.


@pytest.mark.parametrize("content", ["", "text \u00e4\n", b"", b"\x00\xff" * 70_001])
def test_a_file_is_written_with_its_bytes(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_has_the_permissions_of_any_other(tmp_path):
    """Not those of a temporary file: colleagues read the run directory too."""
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "file", "")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, function):
    path = tmp_path / "file"
    write_atomically(path, "before")

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file"]


def _write_for_ever(path: str) -> None:
    number = 0
    while True:
        number += 1
        write_atomically(Path(path), str(number) * 100_000)


def test_a_reader_never_sees_half_a_file_even_when_the_writer_is_killed(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "0" * 100_000)
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(str(path),))
    writer.start()
    deadline = time.monotonic() + 60
    while path.read_text()[0] == "0":
        assert time.monotonic() < deadline, "the writer did not begin"
    for _ in range(50):
        content = path.read_text()
        assert content == content[: len(content) // 100_000] * 100_000
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    content = path.read_text()
    assert content == content[: len(content) // 100_000] * 100_000
