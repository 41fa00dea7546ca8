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
        "good": "print('fine'); print('left out, the time was over: vitb, eager')",
        "bad": "raise SystemExit('no')",
        "slow": "import time; time.sleep(60)",
    }.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_what_fails_leaves_the_others_alone_and_what_it_does_not_need(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [gpu.Part(name, (name,), share) for name, share in (("bad", 3), ("slow", 1), ("good", 30))]
    kept: list[int] = []
    found: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        kept.append(len(rows))
        found[:] = rows

    begin = time.monotonic()
    monkeypatch.setattr(gpu, "LEAST_S", 1)
    assert gpu.run_all(parts, 60, keep) == 1
    assert time.monotonic() - begin < 30
    assert kept == [1, 2, 3]
    assert [row["ended"] for row in found] == ["with status 1", "cut off", "well"]
    assert found[0]["given_s"] == pytest.approx(60 * 3 / 34, abs=0.1)
    assert found[1]["given_s"] < 2  # of 31 shares
    assert found[2]["given_s"] == pytest.approx(60 - found[0]["wall_s"] - found[1]["wall_s"], abs=1)
    assert found[2]["left_out"] == ["vitb, eager"]
    assert "no" in found[0]["output"]
    assert "== good: well" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_what_no_longer_fits_is_left_out() -> None:
    found: list[dict[str, Any]] = []
    parts = [gpu.Part("good", ("good",), 1), gpu.Part("good", ("good",), 3)]
    assert gpu.run_all(parts, 12, lambda rows: found.__setitem__(slice(None), rows)) == 1
    assert [row["reason"] for row in found] == [
        "its share of 12 s left is 3 s",
        "its share of 12 s left is 12 s",
    ]


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
    assert sum(part.share for part in gpu.PARTS) == gpu.BUDGET_S < 570


def test_paced_parts_hear_of_their_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "told.py").write_text("import sys; print(sys.argv[1:]); raise SystemExit(3)")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    told = gpu.run(gpu.Part("told", ("told",), 1), 60)
    assert told["output"].strip() == "['--within', '48.0']"
    assert gpu.run(gpu.Part("told", ("told",), 1), 18)["output"].strip() == "['--within', '12.0']"
    assert gpu.run(gpu.Part("told", ("told", "x"), 1, paced=False), 18)["output"].strip() == "['x']"
