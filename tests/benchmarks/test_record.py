"""A results file says on what it was made, and names no host and no path."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from benchmarks import record


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    known = record.environment()
    monkeypatch.setenv("FD_SCALE_COMMIT", "abc")
    monkeypatch.setattr(record, "environment", lambda: {**known, "source": {}})
    assert record.facts()["source"] == {"commit": "abc", "uncommitted_changes": None}
    checkout = {"commit": "def", "uncommitted_changes": False}
    monkeypatch.setattr(record, "environment", lambda: {**known, "source": checkout})
    assert record.facts()["source"] == checkout


def test_a_results_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    record.write("loss", {"results": [1]})
    path = record.write("loss", {"results": [2]})
    assert path == tmp_path / "results" / "loss.json"
    text = path.read_text()
    assert json.loads(text)["results"] == [2]
    facts = json.loads(text)["facts"]
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert platform.node() not in text
    assert str(Path.home()) not in text
