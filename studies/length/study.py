"""The gain against the length of distillation, each length with a schedule of its own, and beside each length
the teacher taught on for the seconds that it took."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean

from studies.outcome import Outcome
from studies.rows import TEACHER, row_of, variant_students
from studies.settings import Study
from studies.verdicts import Contrast, Row, contrasts
from studies.workbench import Workbench

BASE = "student"


def measure(work: Workbench, study: Study) -> list[Row]:
    """Two rows per length."""
    lesson = work.bench.teacher
    teacher = work.teacher(lesson)
    rows = [row_of(work, TEACHER, [teacher], given=True)]
    for factor in study.choices["factors"]:
        batch = work.bench.distilling.batch
        images = max(1, round(work.bench.distilling.images * factor / batch)) * batch
        runs = variant_students(work, teacher, {BASE: {}}, images)[BASE]
        seconds = fmean(run.record["seconds"] for run in runs)
        longer = [work.taught_on(teacher, lesson, seconds, seed) for seed in work.bench.seeds.distill]
        rows += [row_of(work, student(factor), runs), row_of(work, taught_on(factor), longer)]
    return rows


def compare(found: Outcome) -> list[Contrast]:
    """Each length against the teacher, the teacher taught on, and the length before it."""
    factors = found.facts["study"]["choices"]["factors"]
    pairs = [
        pair
        for factor in factors
        for pair in ((student(factor), TEACHER), (student(factor), taught_on(factor)))
    ]
    pairs += [(student(long), student(short)) for short, long in pairwise(factors)]
    return contrasts(found.rows, pairs, found.labels)


def student(factor: float) -> str:
    """The row of a length."""
    return f"student, x {factor:g}"


def taught_on(factor: float) -> str:
    """The row of the teacher beside it."""
    return f"teacher, taught on as long as x {factor:g}"
