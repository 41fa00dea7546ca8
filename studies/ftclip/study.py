"""FT-CLIP's recipe step by step (arXiv 2212.06138), on a teacher and on its students.

The first recipe's learning rate is chosen on held-out images; the step "low rate" then fixes it, as in that
paper, and the later ones keep it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from studies.outcome import Outcome
from studies.rows import TEACHER, row_of, variant_students
from studies.settings import Study
from studies.verdicts import Contrast, Row, contrasts
from studies.workbench import Workbench

STUDENT = "student"


def measure(work: Workbench, study: Study) -> list[Row]:
    """Two rows per step."""
    teacher = work.teacher(work.bench.teacher)
    students = variant_students(work, teacher, {STUDENT: {}})[STUDENT]
    rows, changes = [], dict[str, Any]()
    for name, more in study.choices["steps"]:
        changes |= more
        for kind, networks in ((TEACHER, [teacher]), (STUDENT, students)):
            given = kind == TEACHER
            rows.append(row_of(work, named(kind, name), networks, given=given, changes=changes))
    return rows


def compare(found: Outcome) -> list[Contrast]:
    """Every step against the one before it, on both; and the student against the teacher by every recipe."""
    names = [name for name, _ in found.facts["study"]["choices"]["steps"]]
    pairs = [
        (named(kind, after), named(kind, before))
        for kind in (TEACHER, STUDENT)
        for before, after in pairwise(names)
    ]
    pairs += [(named(STUDENT, name), named(TEACHER, name)) for name in names]
    return contrasts(found.rows, pairs, found.labels)


def named(kind: str, step: str) -> str:
    """The row of a network by a recipe."""
    return f"{kind}, {step}"
