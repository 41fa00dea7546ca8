"""Reading a report of ``fd-scale diagnose``: both networks, and the papers' direction as more."""

from __future__ import annotations

import json
from pathlib import Path

from studies.diagnostics.study import MEASURES, read_report


def test_less_becomes_more_where_the_papers_report_less(tmp_path: Path) -> None:
    headlines = [
        {"name": of, "before": 1.0 + number, "after": 2.0 + number}
        for number, (of, _) in enumerate(MEASURES.values())
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"headlines": [*headlines, {"name": "other", "before": 0, "after": 0}]}))
    found = read_report(path)
    assert list(found["teacher"].values()) == [1.0, -2.0, 3.0, -4.0, -5.0]
    assert list(found["student"].values()) == [2.0, -3.0, 4.0, -5.0, -6.0]
