"""Saves beside the training: the same bytes, one at a time, whole or not there, and failures that all hear
of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fd_scale.engine import checkpoint, saving
from fd_scale.errors import RunError
from fd_scale.run.lease import LeaseLostError
from tests.engine import saves
from tests.spawn import spawn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def told(folder: Path) -> list[dict[str, Any]]:
    return spawn(saves.tell, 2, str(folder))


def assert_same(one: Path, other: Path) -> None:
    """Two checkpoints hold the same, tensor by tensor: safetensors orders its metadata anew in every file."""
    for rank in (0, 1):
        ours, theirs = (load_file(path / f"rank-{rank:05d}.safetensors") for path in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_save_beside_the_training_holds_the_step_it_began_at(folder: Path, told: Any) -> None:
    assert_same(folder / "blocking" / "step-00000001", folder / "background" / "step-00000001")


def test_a_save_by_way_of_the_nodes_own_disk_is_the_same(folder: Path, told: Any) -> None:
    (found,) = checkpoint.committed(folder / "staged")
    assert checkpoint.faults(found) == []
    assert_same(folder / "direct" / found.path.name, found.path)
    for number, rank in enumerate(told):
        assert rank["disk full"].startswith("OSError")
        assert "disk-1/" in rank["disk full"]
        assert rank["left on the disk"] == [], number


def test_the_folder_of_staged_saves_is_made_or_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(saving.STAGE, raising=False)
    assert saving.stage() is None
    monkeypatch.setenv(saving.STAGE, str(tmp_path / "a" / "b"))
    assert saving.stage() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setenv(saving.STAGE, str(tmp_path / "file" / "b"))
    with pytest.raises(
        RunError, match=r"FD_SCALE_STAGE_SAVES=\S*file/b cannot be written \(Not a directory\)"
    ):
        saving.stage()


def test_training_goes_on_meanwhile_and_a_second_save_waits(told: Any) -> None:
    for rank in told:
        assert rank["first_s"] < 1.0
        assert rank["second_s"] > 1.5
    assert told[0]["committed"] == [1, 2, 3], "in order, and no step twice"
    assert told[0]["partials"] == [1, 1, 1], "one at a time"


def test_a_disk_that_is_full_for_one_rank_fails_the_save_for_all(told: Any) -> None:
    stood = ["step-00000001", "step-00000002", "step-00000003"]
    for rank in told:
        for way in ("full", "full, not in the background"):
            assert rank[way].startswith("OSError")
            assert "rank-00001.safetensors" in rank[way]
            assert "File too large" in rank[way]
        assert rank["after full"] == stood
        assert rank["after more room"] == [*stood, "step-00000004"]


def test_every_checkpoint_that_stands_is_whole(folder: Path, told: Any) -> None:
    found = checkpoint.committed(folder / "background")
    assert [checkpoint.faults(each) for each in found] == [[]] * 4


def test_a_file_system_that_is_gone_is_not_grown_anew(told: Any) -> None:
    for rank in told:
        assert rank["lost"].startswith("FileNotFoundError")
        assert not rank["grown"]


def test_a_start_that_lost_the_directory_commits_nothing_and_removes_nothing(tmp_path: Path) -> None:
    def object_to_it() -> None:
        raise LeaseLostError("taken by another start")

    shot = saving.Snapshot({"master/a": torch.ones(3)}, {"a": "0"}, {"step": 1})
    with pytest.raises(LeaseLostError, match="taken by another start"):
        saving.write(tmp_path, shot, saves.OneProcess(), before_commit=object_to_it)
    assert saves.names(tmp_path) == ["step-00000001.partial"]
