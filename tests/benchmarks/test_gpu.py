"""All parts in one call: one that fails or hangs leaves the others alone, and is told of."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with benchmarks of its own: good, bad and slow."""
    (tmp_path / "benchmarks").mkdir()
    for name, code in {
        "good": "print('fine')",
        "bad": "raise SystemExit('no')",
        "slow": "import time; time.sleep(60)",
    }.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_what_fails_leaves_the_others_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parts = [gpu.Part(name, (name,), limit) for name, limit in (("bad", 9), ("slow", 1), ("good", 9))]
    kept: list[int] = []
    found: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        kept.append(len(rows))
        found[:] = rows

    begin = time.monotonic()
    assert gpu.run_all(parts, 100, keep) == 1
    assert time.monotonic() - begin < 30
    assert kept == [1, 2, 3]
    assert [row["ended"] for row in found] == ["with status 1", "cut off", "well"]
    assert "no" in found[0]["output"]
    assert "== good: well" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_what_no_longer_fits_is_left_out() -> None:
    found: list[dict[str, Any]] = []
    assert gpu.run_all([gpu.Part("good", ("good",), 9)], 5, lambda rows: found.extend(rows)) == 1
    assert found[0]["reason"] == "5 s were left of 5"


def test_it_says_that_a_gpu_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "this machine has no CUDA device" in capsys.readouterr().out
    assert gpu.main(["--only", "los"]) == 2
    assert "--only 'los' is no part; there are: loss, step vitb" in capsys.readouterr().out


def test_the_parts_are_commands_and_fit_into_ten_minutes() -> None:
    for part in gpu.PARTS + gpu.SMOKE:
        assert importlib.util.find_spec(f"benchmarks.{part.words[0]}") is not None
    assert len({part.name for part in gpu.PARTS}) == len(gpu.PARTS)
    first = [part for part in gpu.PARTS if part.name in ("loss", "step vitb", "step swinv2b", "peers")]
    assert sum(part.limit_s for part in first) < 570  # the goals that matter most are measured in any case
