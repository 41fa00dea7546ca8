"""Everything that only a GPU can tell, in one call: all benchmarks of the step, within ten minutes.

    python -m benchmarks.gpu [--limit 570] [--only loss ...]    results/*.json, and results/gpu.json about it
    python -m benchmarks.gpu --smoke                            every part at tiny sizes, on any machine

The parts run one after the other, the most telling first, each in a process of its own with a limit of its
own. A part that fails, or is cut off, leaves the others alone: those that write as they go leave what they
have. Parts that no longer fit into the limit are left out. Results/gpu.json says of every part how it ended
and how long it took; the exit status is 1 unless all of them ended well.
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

ROOT = Path(__file__).parents[1]
NO_GPU = "benchmarks/gpu.py times a GPU, and this machine has no CUDA device: run it where there is one"
LEAST_S = 15.0
"""Below it a part is not begun: importing takes as long."""
TAIL = 4000
"""Characters of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """One benchmark with its arguments; ``limit_s`` is the most it may take."""

    name: str
    words: tuple[str, ...]
    limit_s: float


def step(model: str, limit_s: float, *more: str) -> Part:
    """The step of one model, which writes its own file."""
    return Part(f"step {model}", ("step", "--model", model, *more), limit_s)


PARTS = (
    Part("loss", ("loss",), 100),
    step("vitb", 100, "--parts"),
    step("swinv2b", 100, "--variant", "eager", "--variant", "compiled"),
    Part("peers", ("peers",), 90),
    step("vitl", 80, "--variant", "eager", "--variant", "compiled"),
    step("swinv2g", 120, "--variant", "compiled"),
    Part("attention", ("attention",), 70),
    Part("loss in pieces", ("loss", "--chunked"), 40),
    Part("plan", ("plan_vs_measured",), 150),
    Part("diagnose", ("diagnose", "--images", "5000"), 60),
)
SMOKE = (
    Part("loss", ("loss", "--smoke"), 120),
    Part("loss in pieces", ("loss", "--chunked", "--smoke"), 120),
    Part("attention", ("attention", "--smoke"), 120),
    Part("step", ("step", "--smoke"), 240),
    Part("peers", ("peers", "--smoke"), 240),
)


def run_all(parts: Sequence[Part], limit_s: float, keep: Callable[[list[dict[str, Any]]], object]) -> int:
    """Run the parts in turn; the exit status. ``keep`` is handed what there is after each of them."""
    begin = time.monotonic()
    found: list[dict[str, Any]] = []
    for part in parts:
        left = limit_s - (time.monotonic() - begin)
        row = {"part": part.name, "words": list(part.words)}
        if left < LEAST_S:
            row |= {"ended": "left out", "reason": f"{left:.0f} s were left of {limit_s:.0f}"}
        else:
            row |= run(part, min(part.limit_s, left))
        print(f"== {part.name}: {row['ended']}, {row.get('wall_s', 0):.1f} s", flush=True)
        found.append(row)
        keep(found)
    return 0 if all(row["ended"] == "well" for row in found) else 1


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Run one part in a session of its own, and end all of it when its time is up."""
    print(f"== {part.name}: at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, "-m", f"benchmarks.{part.words[0]}", *part.words[1:]]
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
    return row if ended == "well" else row | {"output": said[-TAIL:]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, default=570.0, help="seconds for all parts together (570)")
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
            record.write("gpu", {"limit_s": asked.limit, "parts": found})

    return run_all(wanted, asked.limit, keep)


if __name__ == "__main__":
    sys.exit(main())
