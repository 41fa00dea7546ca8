"""Does a run take the memory and the time that its plan foretold?

    python -m benchmarks.plan_vs_measured [--case vitb --case swinv2g ...] [--steps 6]

Each case runs in a process of its own: random weights, synthetic pixels, the engine, teacher and loss of a
real run, one process. On a GPU the peak is the one of PyTorch's allocator
(``torch.cuda.max_memory_allocated``), on a CPU that of its CPU allocator, which
the profiler records: unlike the plan's count it also sees what operations take inside, and DeepSpeed.
SwinV2-G is run with and without recomputation, and through ZeRO-3 and ZeRO-1, whose times give a ratio.
Writes results/plan_vs_measured-DEVICE.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_scale.distill import load_teachers, seeded_student
from fd_scale.engine.zero import Engine
from fd_scale.objective import Objective
from fd_scale.plan.memory import Layout, Memory, Sizes, memory, sharding
from fd_scale.plan.trace import Networks
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import Recipe, derive
from fd_scale.run.world import World
from fd_scale.teachers import Guest

MARK = "the step that is measured"
SLACK = 0.05
"""Share by which a measured peak may differ from the planned one."""


@dataclass(frozen=True)
class Case:
    """One run: a recipe with changes, on a scale that is written here."""

    name: str
    recipe: str
    changes: dict[str, Any]
    micro_batch: int
    zero: dict[str, Any]
    bf16: bool = True
    recompute: bool = False
    accumulation: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of the scale."""

    def scale(self) -> dict[str, Any]:
        """The scale file's content."""
        values: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "zero_optimization": self.zero,
            "fd_scale": {"activation_checkpointing": self.recompute},
            **self.more,
        }
        if self.bf16:
            values["bf16"] = {"enabled": True}
            if self.zero["stage"] > 0:
                values["data_types"] = {"grad_accum_dtype": "fp32"}
        return values

    def build(self, folder: Path, world: int) -> tuple[Recipe, scale.Resolved]:
        """Recipe and resolved scale for so many processes."""
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(self.scale()))
        batch = self.micro_batch * self.accumulation * world
        changes = {
            "global_batch": batch,
            "scale": str(path),
            "schedule.images": 100 * batch,
            "schedule.warmup_images": 0,
            "teacher.weights": "random",
            **self.changes,
        }
        recipe = derive(recipes.get(self.recipe), **changes)
        return recipe, scale.resolve(scale.load(str(path)), recipe, world)


ZERO_1 = {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 50_000_000}
ZERO_3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 100_000_000,
    "stage3_param_persistence_threshold": 1_000_000,
}
OFF = {"student.drop_path": 0.0}
SWIN_B = {
    "student.architecture": "swinv2_base",
    "teacher.architecture": "swinv2_base",
    "teacher.arguments": {},
}
CASES = (
    Case("vitb", "fd_clip_vitb16", OFF, 256, ZERO_1),
    Case("vitl", "fd_clip_vitl14", OFF, 128, ZERO_1),
    Case("swinv2b", "fd_swinv2g", OFF | SWIN_B, 128, ZERO_1),
    Case("swinv2g", "fd_swinv2g", OFF, 32, ZERO_1),
    Case("swinv2g_recompute", "fd_swinv2g", OFF, 64, ZERO_1, recompute=True),
    Case("swinv2g_zero3", "fd_swinv2g", OFF, 32, ZERO_3),
)


def planned(case: Case, folder: Path, *, world: int, device: Any) -> Memory:
    """What the planner foretells for a case."""
    recipe, resolved = case.build(folder, world)
    networks = Networks.build(recipe, bf16=case.bf16, device=device)
    layout, sizes = Layout.of(resolved, world), Sizes.of(networks)
    trace = networks.trace(
        case.micro_batch,
        recompute=case.recompute,
        keeps_gradients=layout.keeps_gradients,
        accumulates=layout.gradients_are_there,
        sharding=sharding(layout, sizes, device),
        granularity=resolved.granularity,
    )
    return memory(layout, sizes, trace, device)


def measured(world: World, case: Case, folder: str, num_steps: int) -> dict[str, Any]:
    """Peak bytes of the last of ``num_steps`` steps of a real run on this process, and seconds of each."""
    if world.device.type == "cuda":
        return _run(world, case, folder, num_steps, lambda: None)
    begins: list[float] = []
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:

        def begin() -> None:
            begins.append(time.time_ns())
            with torch.profiler.record_function(MARK):
                torch.empty(0)

        found = _run(world, case, folder, num_steps, begin)
    return found | {"peak_bytes": _profiled_peak(profile)}


def _run(world: World, case: Case, folder: str, num_steps: int, begin: Callable[[], None]) -> dict[str, Any]:
    recipe, resolved = case.build(Path(folder), world.size)
    dtype = torch.bfloat16 if resolved.bf16 else torch.float32
    teachers = load_teachers(recipe, world.device, dtype)
    guests = [Guest(teacher, recipe.objective) for teacher in teachers]
    objective = Objective(recipe.objective)
    student = seeded_student(recipe, teachers, resolved)
    side = student.input_size
    engine = Engine(student, recipe, resolved, world)
    seconds = []
    for step in range(num_steps):
        if step == num_steps - 1:
            gc.collect()  # what building and the first steps left in reference cycles
            begin()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(case.accumulation):
            pixels = torch.randint(0, 256, (case.micro_batch, 3, side, side), dtype=torch.uint8)
            _micro_step(engine, guests, objective, pixels.to(world.device))
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() if world.device.type == "cuda" else None
    return {"peak_bytes": peak, "seconds": seconds}


def _micro_step(engine: Engine, guests: list[Guest], objective: Objective, pixels: Tensor) -> None:
    valid = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    taught = [guest({pixels.shape[-1]: pixels}) for guest in guests]
    predicted = engine(pixels)
    loss = objective(predicted, taught, valid)
    del predicted, taught
    engine.step(loss)


def _profiled_peak(profile: Any) -> int:
    """The most that lived at once after the last mark, bytes.

    Summed by address: a tensor that gloo's own threads let go of last is freed where the profiler does not
    look, which shows when its address is given out again.
    """
    events = []
    mark = 0
    pending = list(reversed(profile.profiler.kineto_results.experimental_event_tree()))
    while pending:
        event = pending.pop()
        pending += reversed(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name == MARK:
            mark = max(mark, event.start_time_ns)
    live: dict[int, int] = {}
    total = peak = 0
    for at, address, size in sorted(events, key=lambda event: event[0]):
        total -= live.pop(address, 0)
        if size > 0:
            live[address] = size
            total += size
        peak = max(peak, total if at >= mark else 0)
    return peak


def _in_a_process(case: Case, num_steps: int) -> dict[str, Any]:
    """A case's figures, from a process that leaves the device empty behind it."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(send, case, num_steps))
    process.start()
    send.close()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        found = {"failed": f"the process ended with status {process.exitcode}"}
    process.join()
    return found


def _child(send: Any, case: Case, num_steps: int) -> None:
    world = World.start()
    with tempfile.TemporaryDirectory(prefix="fd-plan-") as folder:
        plan = planned(case, Path(folder), world=1, device=world.device.type)
        try:
            found = measured(world, case, folder, num_steps)
        except torch.cuda.OutOfMemoryError as error:
            found = {"failed": str(error).splitlines()[0]}
    send.send(summary(case, plan, found, world.device))
    send.close()
    os._exit(0)


def summary(case: Case, plan: Memory, found: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Plan and measurement side by side, units in the names."""
    result: dict[str, Any] = {
        "case": asdict(case),
        "device": device.type,
        "planned_gib": {name: round(size / 2**30, 4) for name, size in plan.fullest.parts.items()},
        "planned_peak_gib": round(plan.peak_bytes / 2**30, 4),
    }
    if "failed" in found:
        return result | found
    seconds = found["seconds"][1:] or found["seconds"]
    images = case.micro_batch * case.accumulation
    return result | {
        "measured_peak_gib": round(found["peak_bytes"] / 2**30, 4),
        "measured_over_planned": round(found["peak_bytes"] / plan.peak_bytes, 4),
        "images_per_s": round(images / statistics.median(seconds), 2),
        "step_s": {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--steps", type=int, default=6, help="steps per case, the first one not timed")
    asked = parser.parse_args()
    from benchmarks import record

    found = {}
    for case in CASES:
        if asked.case is None or case.name in asked.case:
            found[case.name] = _in_a_process(case, asked.steps)
            print(json.dumps(found[case.name]), flush=True)
    ratio = None
    if all("images_per_s" in found.get(name, {}) for name in ("swinv2g", "swinv2g_zero3")):
        ratio = found["swinv2g"]["images_per_s"] / found["swinv2g_zero3"]["images_per_s"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(record.write(f"plan_vs_measured-{device}", {"cases": found, "zero3_time_ratio": ratio}))


if __name__ == "__main__":
    main()
