"""One recipe run in many ways through the public commands: pack, distil, stop, go on, evaluate.

This is the product as users have it, engine, shards and checkpoints, where the other studies use its parts on
images in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fd_scale.run.folder import as_json, write_atomically
from fd_scale.run.recipe import derive
from studies.commands import fd_scale, shards
from studies.outcome import Outcome
from studies.pictures import Pictures
from studies.settings import Study
from studies.store import Piece
from studies.verdicts import Contrast, Entry, Row, contrasts
from studies.workbench import Workbench

TASKS = {"knn": "knn gap", "linear_fast": "linear gap"}
"""By task of ``fd-scale evaluate``, the measure."""
STREAMS = 8
"""Micro-batches of a step on one process: some of it accumulates whatever the number of processes."""


def measure(work: Workbench, study: Study) -> list[Row]:
    """One row per way, a run for each seed."""
    teacher = work.teacher(work.bench.teacher)
    rows = []
    for name, way in study.choices["ways"]:
        runs = [_ran(work, teacher, way, seed, study) for seed in work.bench.seeds.distill]
        measures = {task: [[Entry(run.record[task])] for run in runs] for task in TASKS.values()}
        rows.append(Row(name, measures))
    return rows


def compare(found: Outcome) -> list[Contrast]:
    """Every way against the first."""
    names = [row.name for row in found.rows]
    return contrasts(found.rows, [(name, names[0]) for name in names[1:]], found.labels)


def _ran(work: Workbench, teacher: Piece, way: Mapping[str, Any], seed: int, study: Study) -> Piece:
    save = study.choices["save_every_steps"]
    recipe = work.bench.distilling.model_dump()
    facts = {
        **work.shared,
        "from": teacher.identity,
        "length": recipe,
        "way": way,
        "seed": seed,
        "save": save,
    }
    suppose = dict.fromkeys(TASKS.values(), 0.0)
    # Decoding and the engine about double the work on networks this small.
    images = 2 * work.bench.distilling.images
    make = partial(_run, work, teacher, way, seed, save)
    return work.store.piece("run", facts, make, work=images, suppose=suppose)


def _run(
    work: Workbench, teacher: Piece, way: Mapping[str, Any], seed: int, save: int, folder: Path
) -> dict[str, Any]:
    sets = _sets(work)
    scale = folder / "scale.json"
    write_atomically(scale, as_json(_scale(way, work.bench.distilling.batch)))
    recipe = derive(
        work.recipe(teacher, {}, seed),
        **{
            "scale": str(scale),
            "data.shards": str(sets["distilled"]),
            "run.root": str(folder / "runs"),
            "run.workers": 0,
            "run.save_every_steps": save,
        },
    )
    asked = folder / "recipe.json"
    write_atomically(asked, recipe.to_json())
    processes = way.get("processes", 1)
    command = partial(
        fd_scale, "distill", "--recipe", str(asked), log=folder / "distill.log", processes=processes
    )
    finished = command(stop_when=folder / "runs") if way.get("stopped") else False
    if not finished:
        command()
    record = {
        measure: _evaluated(folder / "runs" / recipe.run_name, task, sets, folder)
        for task, measure in TASKS.items()
    }
    work.store.say(
        f"{dict(way)}, seed {seed}: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in record.items())
    )
    return record | {"stopped": bool(way.get("stopped")) and not finished}


def _scale(way: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """A file as those of ``ds_configs``."""
    scale: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": max(1, batch // STREAMS),
        "zero_optimization": {"stage": way["zero"]},
        "fd_scale": {"activation_checkpointing": False},
    }
    if way.get("bf16"):
        scale |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return scale


def _sets(work: Workbench) -> dict[str, Path]:
    """Shards of the parts, packed once."""
    folder = work.store.root / f"shards-{work.parts.fingerprint}"
    parts = work.parts
    students = Pictures(parts.distilled, parts.taught.labels.new_zeros(len(parts.distilled)))
    made = {}
    for name, pictures in (
        ("distilled", students),
        ("labelled", parts.labelled),
        ("test", parts.test),
    ):
        made[name] = folder / name
        if not (made[name] / "index.json").is_file():
            shards(pictures, parts.classes, made[name])
    return made


def _evaluated(run: Path, task: str, sets: Mapping[str, Path], folder: Path) -> float:
    """The headline of ``fd-scale evaluate`` by the mean patch, in [0, 1]."""
    out = folder / "records"
    fd_scale(
        *(
            "evaluate",
            str(run),
            "--task",
            task,
            "--train",
            str(sets["labelled"]),
            "--test",
            str(sets["test"]),
        ),
        *("--crop-pct", "1", "--out", str(out)),
        log=folder / "evaluate.log",
    )
    records = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob(f"{task}-gap-*.json")]
    return float(records[0]["mean"])
