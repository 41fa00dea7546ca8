"""What distillation changes inside: ``fd-scale diagnose`` on students and their teachers, as users call it.

Every measure is written so that more is what the papers report; the page of each diagnosis, with its figures,
lies in the piece's folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from studies.commands import fd_scale, shards
from studies.outcome import Outcome
from studies.rows import TEACHER, spent, variant_students
from studies.settings import Study
from studies.store import Piece
from studies.verdicts import Contrast, Entry, Row, contrasts
from studies.workbench import Workbench

STUDENT = "student"
MEASURES: Mapping[str, tuple[str, float]] = {
    "spread of heads, deep layers, px": ("Spread of heads, deep layers", 1.0),
    "difference of heads, deep layers": ("Similarity of heads, deep layers", -1.0),
    "diagonality, deep layers": ("Diagonality, deep layers", 1.0),
    "freedom from columns, deep layers": ("Column dominance, deep layers", -1.0),
    "flatness of a linear head's loss": ("Rise of cross entropy at 0.25", -1.0),
}
"""By measure, the headline of the report, and -1 where less of it is what the papers report."""


def measure(work: Workbench, study: Study) -> list[Row]:
    """A teacher and its students by every measure, for each lesson."""
    rows = []
    for lesson in study.choices["lessons"]:
        teacher = work.teacher(lesson)
        students = variant_students(work, teacher, {STUDENT: {}})[STUDENT]
        found = [_diagnosed(work, student, teacher, study) for student in students]
        for kind, networks in ((TEACHER, [teacher]), (STUDENT, students)):
            given = kind == TEACHER
            records = [one.record[kind] for one in (found[:1] if given else found)]
            measures = {
                name: [[Entry(record[name], is_share=False)] for record in records] for name in records[0]
            }
            rows.append(Row(f"{lesson}: {kind}", measures, given, spent(networks)))
    return rows


def compare(found: Outcome) -> list[Contrast]:
    """Every student against its teacher."""
    lessons = found.facts["study"]["choices"]["lessons"]
    pairs = [(f"{lesson}: {STUDENT}", f"{lesson}: {TEACHER}") for lesson in lessons]
    return contrasts(found.rows, pairs, found.labels)


def _diagnosed(work: Workbench, student: Piece, teacher: Piece, study: Study) -> Piece:
    facts = {**work.shared, "student": student.identity, "teacher": teacher.identity, **study.choices}
    # Per image once through both networks with attention, and 5 directions of 17 points of the landscape.
    work_images = 4 * study.choices["images"] + 85 * study.choices["landscape_images"]
    suppose = {kind: dict.fromkeys(MEASURES, 0.0) for kind in (TEACHER, STUDENT)} | {"seconds": 0.0}
    make = partial(_diagnose, work, student, teacher, study)
    return work.store.piece("diagnosis", facts, make, work=work_images, suppose=suppose)


def _diagnose(work: Workbench, student: Piece, teacher: Piece, study: Study, folder: Path) -> dict[str, Any]:
    data = folder / "shards"
    if not (data / "index.json").is_file():
        shards(work.parts.labelled, work.parts.classes, data)
    choices = study.choices
    fd_scale(
        *("diagnose", str(student.weights), "--against", str(teacher.weights), "--data", str(data)),
        *("--images", str(choices["images"]), "--landscape-images", str(choices["landscape_images"])),
        *("--out", str(folder / "page")),
        log=folder / "diagnose.log",
    )
    work.store.say(f"diagnosed: {folder / 'page' / 'report.html'}")
    return read_report(folder / "page" / "report.json")


def read_report(path: Path) -> dict[str, dict[str, float]]:
    """The measures of both networks, by ``student`` and ``teacher``."""
    report = json.loads(path.read_text(encoding="utf-8"))
    headlines = {one["name"]: one for one in report["headlines"]}
    return {
        kind: {name: sign * headlines[of][side] for name, (of, sign) in MEASURES.items()}
        for kind, side in ((TEACHER, "before"), (STUDENT, "after"))
    }
