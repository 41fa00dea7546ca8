"""Ways to normalise a teacher's token, each with the learning rate that suits it (FD paper, ablation)."""

from __future__ import annotations

from studies.rows import TEACHER, row_of, tuned_students
from studies.settings import Study
from studies.verdicts import Row
from studies.workbench import Workbench


def measure(work: Workbench, study: Study) -> list[Row]:
    """One row per normaliser; learning rates are chosen on held-out images after fine-tuning."""
    teacher = work.teacher(work.bench.teacher)
    students = tuned_students(work, teacher, study.variants, study.choices["lrs"])
    rows = [row_of(work, TEACHER, [teacher], given=True)]
    return rows + [
        row_of(work, name, runs, facts={"distill_lr": lr}) for name, (lr, runs) in students.items()
    ]
