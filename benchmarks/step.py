"""How fast is a step of feature distillation, and where does its time go?

    python -m benchmarks.step [--model vitb ...] [--variant compiled ...]    writes results/step-DEVICE.json
    python -m benchmarks.step --smoke                                        tiny, in seconds, written nowhere

The step is the product's: recipe, teacher, student, objective and DeepSpeed engine as ``fd-scale distill``
puts them together, on random weights and random uint8 pixels in pinned memory, several batches in turn; AdamW
and clipping included, reading and decoding not. Variants: eager, blocks compiled, blocks recomputed in the
backward pass, and both. Beside the whole step, by the same clock: its parts one after the other, and the step
of the student alone on targets that are there already.

TFLOP/s counts the useful operations: teacher forward, student forward and backward, never what is
recomputed; ``share_of_matmul`` sets them against a large square product in the same dtype, measured in the
same run (model FLOPs utilisation against what this card does, not against its data sheet). ``waits`` are the
times the host waited for the device in one step.

``--parts`` times alternatives that are no part of the product, each of which must pay here first: images
sent on a stream of their own, other AdamWs, the teacher under inference mode, as a CUDA graph, and in float8
(torchao), with the error of its targets.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, record
from benchmarks.alternatives import measure_bias, measure_optimizers, measure_teacher, measure_transfer
from benchmarks.clock import Protocol
from benchmarks.step_setup import (
    BATCHES,
    CPU,
    CPU_MODELS,
    GPU,
    GPU_MODELS,
    SMOKE_MODELS,
    VARIANTS,
    Clocks,
    Model,
    Setup,
    case_of,
)
from fd_scale.plan.trace import BACKWARD, FORWARD, TEACHER, Networks
from fd_scale.run.world import World

MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}


def useful_flops(model: Model, folder: Path) -> dict[str, float]:
    """Operations per image, by part, without what is recomputed."""
    recipe, _ = case_of(replace(model, micro_batch=2), VARIANTS["eager"]).build(folder, 1)
    trace = Networks.build(recipe, bf16=model.bf16, device="cuda").trace(
        2, recompute=False, keeps_gradients=True
    )
    return {part: trace.flops(part) / 2 for part in (TEACHER, FORWARD, BACKWARD)}


def measure(
    model: Model, name: str, world: World, folder: Path, protocol: Protocol, matmul_tflops: float
) -> dict[str, Any]:
    """The row of a model in a variant, units in the names."""
    device = world.device.type
    torch.compiler.reset()  # each variant compiles for itself
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    setup = Setup.of(model, VARIANTS[name], world, folder)
    following = setup.in_turn()
    first_s = clock.wall_seconds(lambda: setup.step(following()), device)
    taught = setup.targets()
    works: dict[str, clock.Work] = {
        "step": lambda: setup.step(following()),
        "student": lambda: setup.step(following(), taught),
    }
    times = clock.interleaved(works, device, protocol)
    clocks = Clocks(device)
    for _ in range(protocol.runs):
        setup.step(following(), clocks=clocks)
    parts = clocks.medians()
    num_waits = len(clock.waits(works["step"], device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    setup.engine.deepspeed.destroy()
    seconds = times["step"]["median"] / 1e6
    flops = useful_flops(model, folder)
    tflops = sum(flops.values()) * model.micro_batch / seconds / 1e12
    return {
        "model": model.name,
        "variant": name,
        "micro_batch": model.micro_batch,
        "dtype": "bfloat16" if model.bf16 else "float32",
        "images_per_s": round(model.micro_batch / seconds, 2),
        "step_us": times["step"],
        "student_only_us": times["student"],
        "step_over_student_only": round(times["step"]["median"] / times["student"]["median"], 3),
        "gflop_per_image": {part: round(count / 1e9, 4) for part, count in flops.items()},
        "tflop_per_s": round(tflops, 3),
        "share_of_matmul": round(tflops / matmul_tflops, 4),
        "part_us": parts,
        "part_share": {part: round(us / sum(parts.values()), 4) for part, us in parts.items()},
        "waits_per_step": num_waits,
        "peak_gib": None if peak is None else round(peak / 2**30, 3),
        "first_step_s": round(first_s, 2),
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    for row in found["results"]:
        if "failed" in row:
            yield f"{row['model']:10} {row['variant']:22} failed: {row['failed']}"
            continue
        said = f"{row['images_per_s']:9.1f} images/s {row['tflop_per_s']:8.2f} TFLOP/s"
        share = (
            f"{row['share_of_matmul']:6.1%} of matmul, {row['step_over_student_only']:.2f} x student alone"
        )
        yield f"{row['model']:10} {row['variant']:22} {said} {share}, {row['waits_per_step']} waits"
    for row in found["parts"]:
        said = row["left_out"] if "left_out" in row else f"{row['us']['median']:11.1f} us"
        yield f"{row['part']:10} {row['name']:26} {said}"
    yield from clock.named(found["left_out"])


def run(
    world: World,
    models: Sequence[Model],
    variants: Sequence[str],
    *,
    alternatives: bool,
    protocol: Protocol,
    keep: Callable[[dict[str, Any]], object],
) -> dict[str, Any]:
    """All rows; ``keep`` is handed what there is after each of them, for a run that may be cut off."""
    device = world.device.type
    side, dtype = MATMUL[device]
    tflops = clock.matmul_tflops(device, protocol, side, dtype)
    found: dict[str, Any] = {
        "question": "a step of feature distillation: images per second, and where its time goes",
        "device": device,
        "protocol": asdict(protocol) | {"batches_in_turn": BATCHES},
        "matmul_tflop_per_s": round(tflops, 3),
        "results": [],
        "parts": [],
        "left_out": [],
    }
    with tempfile.TemporaryDirectory(prefix="fd-step-") as name:
        folder = Path(name)
        pairs = [(model, variant) for model in models for variant in variants]
        for model, variant in clock.in_time(pairs, _label, found["left_out"]):
            try:
                row = measure(model, variant, world, folder, protocol, tflops)
            except torch.cuda.OutOfMemoryError as error:
                row = {"model": model.name, "variant": variant, "failed": str(error).splitlines()[0]}
            found["results"].append(row)
            keep(found)
            gc.collect()  # engines lie in reference cycles
            if device == "cuda":
                torch.cuda.empty_cache()
        if alternatives and clock.is_late():
            found["left_out"].append("alternatives")
        elif alternatives:
            setup = Setup.of(models[0], VARIANTS["eager"], world, folder)
            for measure_part in (measure_transfer, measure_optimizers, measure_teacher, measure_bias):
                found["parts"] += measure_part(setup, protocol)
                keep(found)
    keep(found)
    return found


def _label(pair: tuple[Model, str]) -> str:
    return f"{pair[0].name}, {pair[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write unless it was only a look."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = GPU_MODELS if device == "cuda" else CPU_MODELS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=[model.name for model in models])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--parts", action="store_true", help="alternatives for optimizer and teacher as well")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; writes nothing")
    clock.add_within(parser)
    asked = parser.parse_args(arguments)
    clock.begin(asked.within)
    wanted = [model for model in models if asked.model is None or model.name in asked.model]
    default = list(VARIANTS) if device == "cuda" else ["eager", "recomputed"]
    protocol = {"cuda": GPU, "cpu": CPU}[device]
    if asked.smoke:
        wanted, default, protocol = list(SMOKE_MODELS), ["eager", "recomputed"], clock.SMOKE
    name = f"step-{device}" + "".join(f"-{model}" for model in asked.model or ())

    def keep(found: dict[str, Any]) -> None:
        if not asked.smoke:
            record.write(name, found | {"load_average": round(os.getloadavg()[0], 1)})

    variants = asked.variant or default
    alternatives = asked.parts or asked.smoke
    world = World.start()
    found = run(world, wanted, variants, alternatives=alternatives, protocol=protocol, keep=keep)
    print(*lines(found), sep="\n")
    return 1 if any("failed" in row for row in found["results"]) else 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # DeepSpeed's threads may outlive the answer
