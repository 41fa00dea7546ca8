"""The papers' questions in miniature: what there is, what it costs, and running it.

    python studies/run.py --list
    python studies/run.py --study granularity --budget laptop --data cifar10.tar.gz

A study says how long it will take before it starts. Every finished piece (a teacher, a student, a
fine-tuning) is kept in ``--work``, so that Ctrl-C loses one piece at most and the same command goes on.
Results, tables and pictures go to ``studies/<study>/results/``.
"""

# ruff: noqa: E402  (the path is set before anything of the project is imported)
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

# As a script its own folder comes first, where modules would hide those of other packages.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks import record
from fd_scale.errors import UserError, near_misses
from fd_scale.run.folder import as_json, write_atomically
from studies import pictures, report, settings
from studies.measures import DIGITS
from studies.outcome import Outcome, write
from studies.rate import images_per_second, scaled
from studies.settings import Bench, Study
from studies.store import Store
from studies.verdicts import Row, contrasts
from studies.workbench import Workbench

STUDIES = (
    "does_it_help",
    "granularity",
    "normaliser",
    "position",
    "drop_path",
    "length",
    "diagnostics",
    "ftclip",
    "engine",
    "alike",
)
"""In the order of the README; each is a folder here with ``study.py`` and ``settings.toml``."""
BUDGETS = ("smoke", "laptop", "gpu")
WORK = Path("runs/studies")
THREADS = 1
"""More are slower on networks this small; two studies run side by side instead."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 done, 2 wrong input, 130 stopped."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    try:
        if asked.list:
            show_list(asked.budget, asked.work)
        elif asked.tables:
            retell()
        else:
            for name in STUDIES if asked.study == "all" else (_known(asked.study),):
                run(name, asked.budget, asked.data, asked.work, asked.results)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; all finished pieces are kept, and the same command goes on", file=sys.stderr)
        return 130
    return 0


def run(name: str, budget: str, data: Path | None, work: Path, results: Path) -> Outcome:
    """Plan a study, say how long it will take, make what is missing, and publish what came out."""
    begin_s = time.perf_counter()
    study, bench = settings.load(name, budget)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, bench = _fitted(bench, budget, device, work)
    parts = pictures.load(data, bench.data, work).to(device)
    measure = import_module(f"studies.{name}.study").measure
    plan = Workbench(bench, parts, Store(work, _quiet, planning=True), device)
    measure(plan, study)
    todo = sum(plan.store.todo.values())
    say(
        f"{name}, budget {budget}, on {device.type}: {len(plan.store.todo)} pieces to make, "
        f"{todo:,.0f} images at {rate:,.0f} images/s: about {_duration(todo / rate)}"
    )
    bench_now = Workbench(bench, parts, Store(work, say), device)
    rows: list[Row] = measure(bench_now, study)
    found = Outcome(
        name=name,
        budget=budget,
        question=study.question,
        paper=study.paper,
        rows=rows,
        contrasts=(),
        labels="".join(DIGITS[label] for label in parts.test.labels.tolist()),
        facts=_facts(study, bench, data, bench_now.store, rate, time.perf_counter() - begin_s),
    )
    found = replace(found, contrasts=_contrasts(name, found, study))
    write(found, results)
    say(f"{report.publish(found, results)}: {report.sentence(found)}")
    for one in found.contrasts:
        say(f"  {one.measure}: {one.first} over {one.second} {100 * one.difference:+.2f}: {one.verdict}")
    if results == settings.HERE:
        report.write_overview(STUDIES)
    return found


def _contrasts(name: str, found: Outcome, study: Study) -> list[Any]:
    """The study's own where it has an idea of its own of what to compare."""
    own = getattr(import_module(f"studies.{name}.study"), "compare", None)
    return own(found) if own else contrasts(found.rows, study.contrasts, found.labels)


def retell() -> None:
    """Make all tables, pictures and the overview anew from the results."""
    from studies import outcome

    for name in STUDIES:
        for path in sorted((settings.HERE / name / "results").glob("*.json")):
            found = outcome.read(path)
            study = settings.load(name, found.budget)[0]
            found = replace(found, contrasts=_contrasts(name, found, study))
            write(found)
            say(str(report.publish(found)))
    report.write_overview(STUDIES)


def show_list(budget: str, work: Path) -> None:
    """Every study with its question and its cost, if nothing of it is there yet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in STUDIES:
        study, bench = settings.load(name, budget)
        rate, bench = _fitted(bench, budget, device, work)
        plan = Workbench(bench, pictures.outline(bench.data), Store(work, _quiet, planning=True), device)
        import_module(f"studies.{name}.study").measure(plan, study)
        todo = sum(plan.store.todo.values())
        say(f"{name:<14} {study.question}")
        say(f"{'':<14} {budget}: {todo:,.0f} images, about {_duration(todo / rate)} at {rate:,.0f} images/s")


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def _quiet(text: str) -> None:
    """While planning nothing is told."""


def _fitted(bench: Bench, budget: str, device: torch.device, work: Path) -> tuple[float, Bench]:
    """The measured rate, and the lengths that it allows. Where lengths follow the rate it is kept, or a study
    could not go on with the pieces that it has."""
    if bench.for_images_per_s is None:
        return images_per_second(bench, device), bench
    kept = work / f"rate-{budget}-{bench.network.identity}.json"
    if kept.is_file():
        rate = float(json.loads(kept.read_text())["images_per_s"])
    else:
        rate = images_per_second(bench, device)
        work.mkdir(parents=True, exist_ok=True)
        write_atomically(kept, as_json({"images_per_s": rate}))
    return rate, scaled(bench, rate)


def _facts(
    study: Study, bench: Bench, data: Path | None, store: Store, rate: float, wall_s: float
) -> dict[str, Any]:
    """Everything beside the numbers."""
    pieces: Mapping[str, Any] = {
        name: {"seconds": round(piece.record.get("seconds", 0.0), 2)} for name, piece in store.used.items()
    }
    return {
        "machine": record.facts(),
        "data": "drawn scenes" if data is None else "CIFAR-10",
        "study": study.model_dump(mode="json"),
        "bench": bench.model_dump(mode="json"),
        "images_per_s": rate,
        "threads": torch.get_num_threads(),
        "pieces": pieces,
        "seconds": sum(piece["seconds"] for piece in pieces.values()),
        "this_call": {"wall_s": round(wall_s, 1), "processor_s": round(time.process_time(), 1)},
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def _known(name: str | None) -> str:
    if name is None:
        raise UserError(
            f"--study is not given: one of {', '.join(STUDIES)}, or all (--list tells their cost)"
        )
    if name not in STUDIES:
        raise UserError(f"--study {name!r}{near_misses(name, STUDIES)} (studies: {', '.join(STUDIES)}, all)")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="store_true", help="name the studies with their cost on this machine"
    )
    parser.add_argument("--study", metavar="NAME", help="one of the list, or all")
    parser.add_argument("--budget", choices=BUDGETS, default="laptop", help="default: laptop")
    parser.add_argument(
        "--data",
        type=Path,
        help="CIFAR-10 as .tar.gz or folder of train/CLASS and test/CLASS; drawn scenes without",
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help=f"folder of finished pieces (default: {WORK})"
    )
    parser.add_argument(
        "--results", type=Path, default=settings.HERE, help="folder of the results (default: studies/)"
    )
    parser.add_argument("--threads", type=int, default=THREADS, help=f"of the processor (default: {THREADS})")
    parser.add_argument(
        "--tables", action="store_true", help="make tables and pictures anew from the results"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
