"""Does a run take the memory and the time that its plan foretold?

    python -m benchmarks.plan_vs_measured [--cpu] [--case vitb --case swinv2g ...] [--steps 6] [--plan-again]

Each case is random weights, synthetic pixels, and the engine, teacher and loss of a real run. On a GPU a case
is one process; the peak is that of PyTorch's allocator (``torch.cuda.max_memory_allocated``), and SwinV2-G
runs with and without recomputation, and through ZeRO-3 and ZeRO-1, whose times give a ratio. ``--cpu`` has
small networks instead, in float32, on one process and on two: every stage, sharded teachers, offload,
two-level shards, averages and granular recomputation. There the peak is that of PyTorch's CPU allocator,
which the profiler records: unlike the plan's count it also sees what operations take inside, and DeepSpeed.

Writes results/plan_vs_measured-DEVICE.json, anew after every case; with ``--case`` the other cases on file
stay. A case that fails says why, and leaves the others alone. ``--plan-again`` measures nothing: it sets the
peaks on file beside what is planned now.
"""

from __future__ import annotations

import argparse
import bisect
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.plan_cases import CPU_CASES, GPU_CASES, Case
from fd_scale.distill import load_teachers, seeded_student
from fd_scale.engine.zero import Engine
from fd_scale.objective import Objective
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import Memory, memory, sharding
from fd_scale.plan.trace import Networks
from fd_scale.run.world import World, free_port
from fd_scale.teachers import Guest
from fd_scale.teachers.sharded import placed

MARK = "a step that is measured"
SLACK = 0.05
"""Share by which a measured peak may differ from the planned one."""


def planned(case: Case, folder: Path, *, world: int, device: Any) -> Memory:
    """What the planner foretells for a case."""
    recipe, resolved = case.build(folder, world)
    networks = Networks.build(recipe, bf16=case.bf16, device=device)
    layout, sizes = Layout.of(resolved, world), Sizes.of(networks)
    trace = networks.trace(
        case.micro_batch,
        recompute=layout.recompute,
        keeps_gradients=layout.keeps_gradients,
        accumulates=layout.gradients_are_there,
        sharding=sharding(layout, sizes, device),
        granularity=resolved.granularity,
    )
    return memory(layout, sizes, trace, device)


def planned_bytes(plan: Memory, device: str) -> int:
    """What one process is foretold to take at most; on a CPU what is offloaded to the host lies in the same
    memory."""
    return plan.peak_bytes + (plan.host_bytes if device == "cpu" else 0)


def measured(world: World, case: Case, folder: str, num_steps: int) -> dict[str, Any]:
    """Peak bytes of each step of a real run but the first, on this process, and seconds of each."""
    if world.device.type == "cuda":
        return _run(world, case, folder, num_steps, torch.cuda.reset_peak_memory_stats)
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:

        def begin() -> None:
            with torch.profiler.record_function(MARK):
                torch.empty(0)

        found = _run(world, case, folder, num_steps, begin)
    return found | {"peak_bytes": _profiled_peaks(profile)}


def _run(world: World, case: Case, folder: str, num_steps: int, begin: Callable[[], None]) -> dict[str, Any]:
    recipe, resolved = case.build(Path(folder), world.size)
    dtype = torch.bfloat16 if resolved.bf16 else torch.float32
    with world.device:  # three billion random weights are drawn in a minute by a CPU, at once by a GPU
        teachers = load_teachers(recipe, world.device, dtype)
        student = seeded_student(recipe, teachers, resolved)
    guests = [Guest(teacher, recipe.objective) for teacher in placed(teachers, resolved, world)]
    del teachers
    objective = Objective(recipe.objective)
    side = student.input_size
    engine = Engine(student, recipe, resolved, world, average_decay=recipe.optim.average_decay)
    is_cuda = world.device.type == "cuda"
    seconds, peaks = [], []
    for step in range(num_steps):
        if step:
            gc.collect()  # what building and the first step left in reference cycles
            begin()
        if is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(case.accumulation):
            pixels = torch.randint(0, 256, (case.micro_batch, 3, side, side), dtype=torch.uint8)
            _micro_step(engine, guests, objective, pixels.to(world.device))
        if is_cuda:
            torch.cuda.synchronize()
            peaks += [torch.cuda.max_memory_allocated()] if step else []
        seconds.append(time.perf_counter() - started)
    engine.deepspeed.destroy()
    return {"peak_bytes": peaks, "seconds": seconds}


def _micro_step(engine: Engine, guests: list[Guest], objective: Objective, pixels: Tensor) -> None:
    valid = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    taught = [guest({pixels.shape[-1]: pixels}) for guest in guests]
    predicted = engine(pixels)
    loss = objective(predicted, taught, valid)
    del predicted, taught
    engine.step(loss)


def _profiled_peaks(profile: Any) -> list[int]:
    """The most that lived at once after each mark and before the next, bytes.

    Summed by address: a tensor that gloo's own threads let go of last is freed where the profiler does not
    look, which shows when its address is given out again.
    """
    events, marks = [], []
    pending = list(profile.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name == MARK:
            marks.append(event.start_time_ns)
    marks.sort()
    live: dict[int, int] = {}
    total, peaks = 0, [0] * (1 + len(marks))
    for at, address, size in sorted(events, key=lambda event: event[0]):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        interval = bisect.bisect(marks, at)
        peaks[interval] = max(peaks[interval], total)
    return peaks[1:]


def _in_processes(
    cases: Sequence[Case], num_steps: int, limit_s: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and figures of each case, from processes that leave the device empty behind them. Those that take
    longer than ``limit_s`` for one case are ended."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    world, port = cases[0].world, free_port()
    processes = [
        context.Process(target=_child, args=(send, rank, world, port, cases, num_steps))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    send.close()
    for case in cases:
        try:
            found = receive.recv() if receive.poll(limit_s) else {"failed": f"no end after {limit_s:g} s"}
        except EOFError:
            found = {"failed": "its process ended before it; see what it printed"}
        yield case.name, found
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()


def _child(send: Any, rank: int, world_size: int, port: int, cases: Sequence[Case], num_steps: int) -> None:
    place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank}
    os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # operations take memory per thread
    world = World.start()
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="fd-plan-") as folder:
            try:
                plan = planned(case, Path(folder), world=world.size, device=world.device.type)
                found = summary(case, plan, world.gather(measured(world, case, folder, num_steps)), world)
            except Exception:
                found = {"failed": traceback.format_exc()}
        if world.is_main or "failed" in found:
            send.send(found)
        if "failed" in found:
            break  # the processes no longer agree on what comes next
    send.close()
    os._exit(0)


def summary(case: Case, plan: Memory, ranks: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Plan and measurement side by side, units in the names.

    What threads let go of late adds to the peak of a step, and nothing takes from it: of the steps the least
    counts, and of the processes the fullest.
    """
    device = world.device.type
    result = compared(case, plan, max(min(rank["peak_bytes"]) for rank in ranks), device)
    if device == "cpu":  # the profiler takes most of the time
        return result
    seconds = ranks[0]["seconds"][1:]
    images = case.micro_batch * case.accumulation
    return result | {
        "images_per_s": round(images / statistics.median(seconds), 2),
        "step_s": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
    }


def compared(case: Case, plan: Memory, peak_bytes: float, device: str) -> dict[str, Any]:
    """A planned peak beside a measured one."""
    expected = planned_bytes(plan, device)
    return {
        "case": asdict(case),
        "device": device,
        "planned_gib": {name: round(size / 2**30, 4) for name, size in plan.fullest.parts.items() if size},
        "planned_host_gib": round(plan.host_bytes / 2**30, 4),
        "planned_peak_gib": round(expected / 2**30, 4),
        "measured_peak_gib": round(peak_bytes / 2**30, 4),
        "measured_over_planned": round(peak_bytes / expected, 4),
    }


def plan_again(cases: Sequence[Case], device: str) -> dict[str, Any]:
    """The measurements on file, each beside what is planned now; no case runs."""
    measured_before, found = on_file(device), {}
    with tempfile.TemporaryDirectory(prefix="fd-plan-") as folder:
        for case in cases:
            figures = measured_before.get(case.name, {"failed": "was not measured"})
            if "failed" not in figures:
                plan = planned(case, Path(folder), world=case.world, device=device)
                figures |= compared(case, plan, figures["measured_peak_gib"] * 2**30, device)
            found[case.name] = figures
    return found


def on_file(device: str) -> dict[str, Any]:
    """The cases that the results hold."""
    path = record.RESULTS / f"plan_vs_measured-{device}.json"
    return dict(json.loads(path.read_text())["cases"]) if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cpu", action="store_true", help="small networks on the CPU (default without a GPU)"
    )
    parser.add_argument("--case", action="append", choices=[case.name for case in GPU_CASES + CPU_CASES])
    parser.add_argument("--steps", type=int, help="steps per case, the first one not measured (6; CPU: 3)")
    parser.add_argument("--limit", type=float, default=150, help="seconds after which a case is given up")
    parser.add_argument(
        "--plan-again", action="store_true", help="run nothing: compare the measurements on file anew"
    )
    asked = parser.parse_args()
    on_cpu = asked.cpu or not torch.cuda.is_available()
    if on_cpu:
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    cases = [c for c in (CPU_CASES if on_cpu else GPU_CASES) if asked.case is None or c.name in asked.case]
    if not cases:
        parser.error(f"--case {' '.join(asked.case)}: not among those for {'a CPU' if on_cpu else 'a GPU'}")
    if asked.plan_again:
        device = "cpu" if on_cpu else "cuda"
        print(_write(plan_again(cases, device), device))
        return
    steps = asked.steps or (3 if on_cpu else 6)
    # Imports are most of a small case: on a CPU, whose peaks are counted from a case's own start, those of as
    # many processes share them.
    groups = [[c for c in cases if c.world == world] for world in (1, 2)] if on_cpu else [[c] for c in cases]
    found = {} if asked.case is None else on_file("cpu" if on_cpu else "cuda")
    for group in filter(None, groups):
        for name, figures in _in_processes(group, steps, asked.limit):
            found[name] = figures
            print(name, json.dumps({k: v for k, v in figures.items() if k != "case"}), flush=True)
            written = _write(found, "cpu" if on_cpu else "cuda")
    print(written)


def _write(found: dict[str, Any], device: str) -> Path:
    results: dict[str, Any] = {"cases": found}
    if all("images_per_s" in found.get(name, {}) for name in ("swinv2g", "swinv2g_zero3")):
        rates = (found[name]["images_per_s"] for name in ("swinv2g", "swinv2g_zero3"))
        results["zero3_time_ratio"] = next(rates) / next(rates)
    ratios = [case["measured_over_planned"] for case in found.values() if "failed" not in case]
    if ratios:
        results["worst_measured_over_planned"] = max(ratios, key=lambda ratio: abs(ratio - 1))
    return record.write(f"plan_vs_measured-{device}", results)


if __name__ == "__main__":
    main()
