"""Everything that only a GPU can tell, in one call: all benchmarks of the step, within ten minutes.

    python -m benchmarks.gpu [--budget 560] [--only loss ...]    results/*.json, and results/gpu.json about it
    python -m benchmarks.gpu --smoke                             every part at tiny sizes, on any machine

The parts run one after the other, the most telling first, each in a process of its own, with its share of the
seconds that are left: what one part does not need, the later ones have. Shortly before its share is over, a
part measures fewer runs and leaves out cases, by name; when it is over, the part is cut off, which leaves
what it has written. A part whose share is too little to begin is left out. Results/gpu.json says of every
part how it ended, what it left out, and how long it took; the exit status is 1 unless all of them ended well.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.clock import LEFT_OUT

ROOT = Path(__file__).parents[1]
NO_GPU = "benchmarks/gpu.py times a GPU, and this machine has no CUDA device: run it where there is one"
BUDGET_S = 560.0
"""Of ten minutes; the rest is for the start of a call and for its files on their way."""
LEAST_S = 15.0
"""Below it a part is not begun: importing takes as long."""
MARGIN_S = 12.0
"""So long before its share is over, and after two thirds of it at the earliest, a part goes faster."""
TAIL = 4000
"""Characters of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One benchmark with its arguments; ``share`` of the budget, against the other parts' shares.

    ``paced``: it takes ``--within``, and goes faster when its time is nearly over.
    """

    name: str
    words: tuple[str, ...]
    share: float
    paced: bool = True


def step(model: str, share: float, *more: str) -> Part:
    """The step of one model, which writes its own file."""
    return Part(f"step {model}", ("step", "--model", model, *more), share)


PARTS = (
    Part("loss", ("loss",), 80),
    step("vitb", 80, "--variant", "compiled", "--variant", "eager", "--parts"),
    step("vitl", 55, "--variant", "compiled", "--variant", "eager"),
    step("swinv2b", 70, "--variant", "compiled", "--variant", "eager"),
    step("swinv2g", 80, "--variant", "compiled"),
    Part("peers", ("peers",), 65),
    Part("attention", ("attention",), 45),
    Part("loss in pieces", ("loss", "--chunked"), 25),
    Part("plan", ("plan_vs_measured", "--limit", "40"), 40, paced=False),
    Part("diagnose", ("diagnose", "--images", "2000"), 20, paced=False),
)
"""In the order of the goals in docs/performance.md. The shares add up to the budget: they are seconds."""
SMOKE = (
    Part("loss", ("loss", "--smoke"), 1),
    Part("step", ("step", "--smoke"), 2),
    Part("peers", ("peers", "--smoke"), 2),
    Part("attention", ("attention", "--smoke"), 1),
    Part("loss in pieces", ("loss", "--chunked", "--smoke"), 1),
)


def run_all(parts: Sequence[Part], budget_s: float, keep: Callable[[list[dict[str, Any]]], object]) -> int:
    """Run the parts in turn; the exit status. ``keep`` is handed what there is after each of them."""
    begin = time.monotonic()
    found: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        left = budget_s - (time.monotonic() - begin)
        given = left * part.share / sum(later.share for later in parts[index:])
        row = {"part": part.name, "words": list(part.words), "given_s": round(given, 1)}
        if given < LEAST_S:
            row |= {"ended": "left out", "reason": f"its share of {left:.0f} s left is {given:.0f} s"}
        else:
            row |= run(part, given)
        print(f"== {part.name}: {row['ended']}, {row.get('wall_s', 0):.1f} s", flush=True)
        found.append(row)
        keep(found)
    return 0 if all(row["ended"] == "well" for row in found) else 1


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Run one part in a session of its own, and end all of it when its time is up."""
    print(f"== {part.name}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{part.words[0]}", *part.words[1:]]
    if part.paced:
        command += ["--within", f"{max(limit_s - MARGIN_S, limit_s * 2 / 3):.1f}"]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=limit_s)
        ended = "well" if process.returncode == 0 else f"with status {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        ended = "cut off"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    print(said, end="", flush=True)
    row: dict[str, Any] = {"ended": ended, "wall_s": round(time.monotonic() - begin, 1)}
    if left_out := [line.removeprefix(LEFT_OUT) for line in said.splitlines() if line.startswith(LEFT_OUT)]:
        row["left_out"] = left_out
    return row if ended == "well" else row | {"output": said[-TAIL:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help=f"seconds for all parts together ({BUDGET_S:g})"
    )
    parser.add_argument("--only", action="append", help="a part by name; may be given several times")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any machine; writes nothing")
    asked = parser.parse_args(arguments)
    parts = SMOKE if asked.smoke else PARTS
    names = [part.name for part in parts]
    if unknown := [name for name in asked.only or () if name not in names]:
        print(f"--only {unknown[0]!r} is no part; there are: {', '.join(names)}")
        return 2
    if not asked.smoke and not torch.cuda.is_available():
        print(NO_GPU)
        return 2
    wanted = [part for part in parts if asked.only is None or part.name in asked.only]

    def keep(found: list[dict[str, Any]]) -> None:
        if not asked.smoke:
            record.write("gpu", {"budget_s": asked.budget, "parts": found})

    return run_all(wanted, asked.budget, keep)


if __name__ == "__main__":
    sys.exit(main())
