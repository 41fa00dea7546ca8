"""The figures of docs/performance.md hold the numbers of the results, and come out the same twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plots, tables


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    return tmp_path


def test_nothing_is_drawn_of_nothing(folder: Path) -> None:
    assert plots.main() == 0
    assert list(folder.iterdir()) == []


def test_figures_of_small_results(folder: Path) -> None:
    shares = {"teacher": 0.25, "forward": 0.75}
    step = {"model": "tiny", "variant": "eager", "part_share": shares}
    (folder / "step-cpu.json").write_text(json.dumps({"results": [step]}))
    rows = [
        {"case": "one", "chunk_tokens": tokens, "time_over_whole": time, "memory_over_whole": memory}
        for tokens, time, memory in ((None, 1, 1), (4096, 1.1, 0.4))
    ]
    (folder / "loss_chunked-cpu.json").write_text(json.dumps({"results": rows}))
    figure = plots.parts()
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == [25, 75]
    pieces = plots.pieces()
    assert pieces is not None
    (line,) = pieces.axes[0].lines
    assert list(line.get_xdata()) == [1, 0.4]
    assert plots.main() == 0
    first = {path.name: path.read_bytes() for path in folder.glob("*.svg")}
    assert set(first) == {"performance-parts.svg", "performance-pieces.svg"}
    assert plots.main() == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.svg")} == first
    assert b"4,096" in first["performance-pieces.svg"]
