"""Teachers of four kinds against their students, with what a plain reader would ask for in the same table.

The controls: the teacher taught on by its own lesson for the seconds that its student took, a student with
the teacher's own kind of positions, and one that begins as the teacher instead of at random.
"""

from __future__ import annotations

from statistics import fmean

from studies.outcome import Outcome
from studies.rows import TEACHER, row_of, variant_students
from studies.settings import Study
from studies.verdicts import Contrast, Row, contrasts
from studies.workbench import Workbench

TAUGHT_ON = "teacher, taught on"


def measure(work: Workbench, study: Study) -> list[Row]:
    """For each kind of teacher: itself, taught on, and its students."""
    rows = []
    for lesson in study.choices["lessons"]:
        teacher = work.teacher(lesson)
        students = variant_students(work, teacher, study.variants)
        seconds = fmean(run.record["seconds"] for run in students["student"])
        taught_on = [work.taught_on(teacher, lesson, seconds, seed) for seed in work.bench.seeds.distill]
        rows += [
            row_of(work, named(lesson, TEACHER), [teacher], given=True),
            row_of(work, named(lesson, TAUGHT_ON), taught_on),
            *(row_of(work, named(lesson, name), runs) for name, runs in students.items()),
        ]
    return rows


def compare(found: Outcome) -> list[Contrast]:
    """The same pairs within each kind of teacher, the luck of a run pooled over all."""
    choices = found.facts["study"]["choices"]
    pairs = [
        (named(lesson, first), named(lesson, second))
        for lesson in choices["lessons"]
        for first, second in choices["contrasts"]
    ]
    return contrasts(found.rows, pairs, found.labels)


def named(lesson: str, row: str) -> str:
    """The row of a kind of teacher."""
    return f"{lesson.replace('_', ' ')}: {row}"
