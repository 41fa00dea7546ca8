"""The tables of docs/performance.md are what the results files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables


def test_the_page_is_what_the_results_say() -> None:
    assert tables.main(["--check"]) == 0, "python -m benchmarks.tables"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one's own, and a page."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    return tmp_path


def store(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"results": rows, **more}))


@pytest.mark.usefixtures("folder")
def test_what_was_not_measured_says_so() -> None:
    assert tables.table("peers-cuda") == "*Not measured yet.*\n"
    lines = tables.table("goals").splitlines()
    assert len(lines) == 2 + 11
    assert all(line.endswith("| not measured yet |") for line in lines[2:])


def test_goals_that_are_reached_and_missed(folder: Path) -> None:
    row = {"case": "ViT-B/16", "implementation": "fused", "share_of_copy": 0.91, "fused_is_faster": 1.0}
    store(folder, "loss-cuda", [row])
    rows = [
        {"variant": "eager", "images_per_s": 1000.0, "step_over_student_only": 1.5},
        {"variant": "compiled", "images_per_s": 2500.0, "step_over_student_only": 1.45},
        {"variant": "recomputed", "failed": "out of memory"},
    ]
    store(folder, "step-cuda-vitb", rows)
    store(folder, "peers-cuda", [], published_over_ours=2.5)
    said = tables.table("goals")
    assert "| loss kernel, ViT-B/16: share of a copy's bandwidth | 0.8 | 0.9 | 0.91 |" in said
    assert "| step of ViT-B/16, 224 | 2,240 images/s | 2,800 images/s | 2,500 images/s |" in said
    assert "| the published step over ours, ViT-B/16 | 2 | 3 | 2.5 |" in said
    assert "| step over the student's alone, ViT-B/16 | 1.4 | 1.35 | 1.45 (missed) |" in said


def test_only_what_is_between_the_marks_is_made_anew(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = folder / "page.md"
    page.write_text("# A\n\n<!-- table peers-cpu -->\nold\n<!-- end -->\n\nB\n")
    assert tables.main(["--check"]) == 1
    assert "python -m benchmarks.tables" in capsys.readouterr().out
    us = {"median": 2000.0, "q20": 1000.0, "q80": 3000.0}
    store(folder, "peers-cpu", [{"step": "ours", "images_per_s": 4.0, "step_us": us}])
    assert tables.main([]) == 0
    assert page.read_text() == (
        "# A\n\n<!-- table peers-cpu -->\n\n"
        "| step | images/s | ms (20 to 80 %) | over ours |\n|---|---|---|---|\n"
        "| ours | 4.00 | 2 (1 to 3) | 1.00 |\n\n<!-- end -->\n\nB\n"
    )
    assert tables.main(["--check"]) == 0
    page.write_text("<!-- table nonsense -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="asks for table 'nonsense': there are goals"):
        tables.main([])


def test_every_table_of_the_page_takes_the_rows_that_its_benchmark_writes() -> None:
    """Whatever lies in results/ is shown without an error."""
    for name in tables.TABLES:
        assert tables.table(name).strip()
