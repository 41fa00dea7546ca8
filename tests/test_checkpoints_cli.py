"""``fd-scale checkpoints``: what is there, and whether it is what was saved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.errors import RunError
from fd_scale.run import recipes
from fd_scale.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of the demo's recipe (64 images per step) with checkpoints of two processes."""
    folder = RunFolder.open(tmp_path, recipes.get("demo"))
    folder.checkpoints.mkdir()
    for step in (64, 128):
        place = folder.checkpoints / f"step-{step:08d}"
        place.mkdir()
        files = []
        for rank in (0, 1):
            content = f"{step} {rank}".encode() * 500_000
            name = f"rank-{rank:05d}.safetensors"
            (place / name).write_bytes(content)
            sha256 = hashlib.sha256(content).hexdigest()
            files.append({"name": name, "size": len(content), "sha256": sha256})
        manifest = {"format": 1, "step": step, "world_size": 2, "zero_stage": 3, "files": files}
        (place / "manifest.json").write_text(json.dumps(manifest))
    return folder.path


def table(run: Path, *options: str) -> list[list[str]]:
    """The words of each line; fails where the command does."""
    done = CliRunner().invoke(app, ["checkpoints", str(run), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [line.split() for line in done.output.splitlines()]


def test_steps_sizes_and_processes(run: Path) -> None:
    head, first, second = table(run)
    assert head == ["step", "images", "GiB", "files", "processes", "ZeRO", "integrity"]
    assert first == ["64", "4,096", "0.004", "2", "2", "3", "sizes", "agree"]
    assert second == ["128", "8,192", "0.005", "2", "2", "3", "sizes", "agree"]
    assert [row[-1] for row in table(run, "--verify")[1:]] == ["whole", "whole"]


def test_a_changed_byte_is_found_by_verify_and_named(run: Path) -> None:
    file = run / "checkpoints" / "step-00000128" / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    assert table(run)[2][-1] == "agree"
    done = CliRunner().invoke(app, ["checkpoints", str(run), "--verify"])
    assert isinstance(done.exception, RunError), "which main() turns into exit status 2"
    assert f"{file} has another SHA-256" in str(done.exception)
    assert done.output.splitlines()[1].split()[-1] == "whole"
    assert done.output.splitlines()[2].split()[-1] == "damaged"


def test_a_missing_end_is_found_at_once(run: Path) -> None:
    file = run / "checkpoints" / "step-00000064" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:10])
    done = CliRunner().invoke(app, ["checkpoints", str(run)])
    assert "has 10 bytes, the manifest says 2,000,000" in str(done.exception)


def test_a_save_under_way_is_named_and_not_counted(run: Path) -> None:
    (run / "checkpoints" / "step-00000192.partial").mkdir()
    lines = table(run)
    assert len(lines) == 4
    assert lines[3][:4] == ["step-00000192.partial:", "is", "being", "saved,"]


def test_a_run_without_checkpoints_and_no_run(run: Path, tmp_path: Path) -> None:
    fresh = RunFolder.open(tmp_path / "other", recipes.get("demo")).path
    assert table(fresh)[0][-4:] == ["has", "no", "checkpoint", "yet"]
    with pytest.raises(RunError, match="does not exist"):
        CliRunner().invoke(app, ["checkpoints", str(tmp_path / "none")], catch_exceptions=False)
