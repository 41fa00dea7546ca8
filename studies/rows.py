"""From pieces to the rows of a table: networks measured by every label count, kNN and probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from studies.settings import Study
from studies.store import Piece
from studies.verdicts import Entry, Row
from studies.workbench import Workbench

TEACHER = "teacher"
FROZEN = ("knn cls", "knn gap", "linear cls", "linear gap")


def variant_rows(work: Workbench, study: Study) -> list[Row]:
    """The teacher, and one row per variant of the study with a run for each distillation seed."""
    teacher = work.teacher(work.bench.teacher)
    students = variant_students(work, teacher, study.variants)
    rows = [row_of(work, TEACHER, [teacher], given=True)]
    return rows + [row_of(work, name, runs) for name, runs in students.items()]


def variant_students(
    work: Workbench,
    teacher: Piece,
    variants: Mapping[str, Mapping[str, Any]],
    images: int | None = None,
) -> dict[str, list[Piece]]:
    """By variant, a student for each distillation seed."""
    by_seed = [work.students(teacher, variants, seed, images) for seed in work.bench.seeds.distill]
    return {name: [students[name] for students in by_seed] for name in variants}


def tuned_students(
    work: Workbench,
    teacher: Piece,
    variants: Mapping[str, Mapping[str, Any]],
    lrs: Sequence[float],
) -> dict[str, tuple[float, list[Piece]]]:
    """As ``variant_students``, with the peak of the distillation chosen for each variant by itself: the best
    on held-out images after fine-tuning, by the first seed of both; with it, of equals the lower."""
    labels, first = work.bench.finetuning.labels[0], work.bench.seeds.distill[0]
    scores: dict[str, dict[float, float]] = {name: {} for name in variants}
    for lr in sorted(lrs):
        students = work.students(teacher, _at(lr, variants), first)
        for name, student in students.items():
            found = work.measures
            peak = found.best_lr(student, labels=labels)
            seed = work.bench.seeds.finetune[0]
            tuned = found.finetuned(student, labels=labels, lr=peak, seed=seed)
            scores[name][lr] = tuned.record["held_out_top1"]
    chosen = {name: max(found, key=lambda lr: found[lr]) for name, found in scores.items()}
    students_of = {}
    for name, lr in chosen.items():
        runs = [
            work.students(teacher, _at(lr, {name: variants[name]}), s)[name] for s in work.bench.seeds.distill
        ]
        students_of[name] = (lr, runs)
    return students_of


def _at(lr: float, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The variants with another peak, first and last learning rates in proportion."""
    rates = {"optim.lr": lr, "schedule.warmup_lr": lr / 100, "schedule.min_lr": lr / 100}
    return {name: {**changes, **rates} for name, changes in variants.items()}


def row_of(
    work: Workbench,
    name: str,
    networks: Sequence[Piece],
    *,
    given: bool = False,
    changes: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Row:
    """Everything that is measured of the runs of one setting; the learning rate of each label count is chosen
    for the first run and serves all."""
    found = work.measures
    measures: dict[str, list[list[Entry]]] = {}
    lrs: dict[str, float] = {}
    for labels in work.bench.finetuning.labels:
        measure = f"fine-tuned, {labels:,} labels"
        lrs[measure] = found.best_lr(networks[0], labels=labels, changes=changes)
        measures[measure] = [
            [
                entry_of(
                    found.finetuned(
                        network, labels=labels, lr=lrs[measure], seed=seed, changes=changes
                    ).record
                )
                for seed in work.bench.seeds.finetune
            ]
            for network in networks
        ]
    if work.bench.frozen:
        records = [found.frozen(network).record for network in networks]
        measures |= {task: [[entry_of(record[task])] for record in records] for task in FROZEN}
    known = {"lr": lrs, "pieces": [network.identity for network in networks], **spent(networks)}
    return Row(name, measures, given, known | dict(facts or {}))


def entry_of(record: Mapping[str, Any]) -> Entry:
    """An accuracy with its predictions."""
    return Entry(record["top1"], record["predictions"])


def spent(networks: Sequence[Piece]) -> dict[str, Any]:
    """How long the networks of a row learnt, and how well in the end."""
    records = [network.record for network in networks]
    return {
        "seconds": [round(record["seconds"], 1) for record in records],
        "images": [record.get("images") for record in records],
        "last_loss": [record["losses"][-1] for record in records if record.get("losses")],
    }
