"""What came out of a study: its file, which explains every number, and what may be read off it.

``results/<budget>.json`` of a study holds machine, versions, commit, time, settings, every seed, and every
prediction on test images. Tables, pictures and words are all made from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fd_scale.run.folder import as_json, write_atomically
from studies.settings import HERE
from studies.verdicts import Contrast, Entry, Row

FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """One study under one budget."""

    name: str
    budget: str
    question: str
    paper: str
    rows: Sequence[Row]
    contrasts: Sequence[Contrast]
    labels: str
    """The right characters of the predictions."""
    facts: Mapping[str, Any]
    """Machine, versions, commit, settings and time."""

    @property
    def measures(self) -> list[str]:
        """All that some row was measured by, in the order of the rows."""
        return list(dict.fromkeys(measure for row in self.rows for measure in row.measures))


def path_of(name: str, budget: str, root: Path = HERE) -> Path:
    """Where a result lies."""
    return root / name / "results" / f"{budget}.json"


def write(outcome: Outcome, root: Path = HERE) -> Path:
    """Into the study's folder of results; an older one is replaced whole."""
    path = path_of(outcome.name, outcome.budget, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "format": FORMAT,
        **{key: getattr(outcome, key) for key in ("name", "budget", "question", "paper")},
    }
    values |= {"facts": outcome.facts, "labels": outcome.labels}
    values["contrasts"] = [
        asdict(one) | {"noise": one.noise, "verdict": one.verdict} for one in outcome.contrasts
    ]
    values["rows"] = [asdict(row) for row in outcome.rows]
    write_atomically(path, as_json(values))
    return path


def read(path: Path) -> Outcome:
    """A result. Raises ``ValueError`` for another format."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["format"] != FORMAT:
        raise ValueError(f"{path} has format {values['format']}; this version reads {FORMAT}: run it again")
    rows = [
        Row(
            row["name"],
            {m: [[Entry(**e) for e in run] for run in runs] for m, runs in row["measures"].items()},
            row["given"],
            row["facts"],
        )
        for row in values["rows"]
    ]
    contrasts = [
        Contrast(**{key: value for key, value in one.items() if key not in ("noise", "verdict")})
        for one in values["contrasts"]
    ]
    told = {key: values[key] for key in ("name", "budget", "question", "paper", "labels", "facts")}
    return Outcome(rows=rows, contrasts=contrasts, **told)
