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
import importlib.util
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import clock, record
from benchmarks.clock import Clock, Protocol
from benchmarks.plan_cases import OFF, SWIN_B, ZERO_1, Case
from fd_scale.distill import load_teachers, seeded_student
from fd_scale.engine.zero import Engine
from fd_scale.objective import Objective
from fd_scale.plan.trace import BACKWARD, FORWARD, TEACHER, Networks
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import Resolved
from fd_scale.run.world import World
from fd_scale.student import Student
from fd_scale.teachers import Guest, targets
from fd_scale.teachers.sharded import placed

BATCHES = 4
"""Batches in turn, so that no cache holds one."""

GPU = Protocol(warm_up=3, runs=10, passes=2)
CPU = Protocol(warm_up=1, runs=4, passes=2)
MATMUL = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}
PARTS = ("transfer", "teacher", "forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class Model:
    """A pair of teacher and student, and the micro-batch of its step."""

    name: str
    recipe: str
    changes: dict[str, Any]
    micro_batch: int
    bf16: bool = True


@dataclass(frozen=True)
class Variant:
    """How the blocks are run."""

    compile: bool = False
    recompute: bool = False


VARIANTS = {
    "eager": Variant(),
    "compiled": Variant(compile=True),
    "recomputed": Variant(recompute=True),
    "compiled, recomputed": Variant(compile=True, recompute=True),
}
GPU_MODELS = (
    Model("vitb", "fd_clip_vitb16", OFF, 256),
    Model("swinv2b", "fd_swinv2g", OFF | SWIN_B, 128),
    Model("vitl", "fd_clip_vitl14", OFF, 128),
    Model("swinv2g", "fd_swinv2g", OFF, 32),
)
TINY = {
    "student.architecture": "vit_tiny_patch16",
    "teacher.library": "timm",
    "teacher.architecture": "vit_tiny_patch16_224",
}
CPU_MODELS = (Model("vit_tiny", "fd_clip_vitb16", OFF | TINY, 4, bf16=False),)
SMOKE_MODELS = (Model("demo", "demo", OFF, 2, bf16=False),)


def case_of(model: Model, variant: Variant) -> Case:
    """Recipe and scale of a model in a variant: ZeRO-1 with float32 sums in bfloat16, stage 0 in float32."""
    own = {"activation_checkpointing": variant.recompute, "compile": variant.compile}
    zero = ZERO_1 if model.bf16 else {"stage": 0}
    return Case(
        model.name,
        model.recipe,
        model.changes,
        model.micro_batch,
        zero,
        bf16=model.bf16,
        more={"fd_scale": own},
    )


@dataclass
class Setup:
    """Everything of a step, ready to be taken."""

    recipe: Recipe
    engine: Engine
    guests: list[Guest]
    objective: Objective
    student: Student
    resolved: Resolved
    batches: list[Tensor]
    """uint8 (B, 3, S, S) on the host, pinned where there is a GPU."""
    device: torch.device

    @classmethod
    def of(cls, model: Model, variant: Variant, world: World, folder: Path) -> Setup:
        """The networks and the engine of a model as a run would have them."""
        recipe, resolved = case_of(model, variant).build(folder, world.size)
        dtype = torch.bfloat16 if model.bf16 else torch.float32
        with world.device:  # random weights are drawn where it is fast
            teachers = placed(load_teachers(recipe, world.device, dtype), resolved, world)
            student = seeded_student(recipe, teachers, resolved)
        side = student.input_size
        pixels = [
            torch.randint(0, 256, (model.micro_batch, 3, side, side), dtype=torch.uint8)
            for _ in range(BATCHES)
        ]
        if world.device.type == "cuda":
            pixels = [batch.pin_memory() for batch in pixels]
        return cls(
            recipe,
            Engine(student, recipe, resolved, world),
            [Guest(teacher, recipe.objective) for teacher in teachers],
            Objective(recipe.objective),
            student,
            resolved,
            pixels,
            world.device,
        )

    def step(self, pixels: Tensor, taught: list[Tensor] | None = None, clocks: Clocks | None = None) -> None:
        """One optimizer step, as ``Distillation.loss`` and ``Engine.step`` take it; ``taught``: targets that
        are there already; ``clocks``: of the parts."""
        part = clocks or Clocks(self.device.type)
        with part("transfer"):
            pixels = pixels.to(self.device, non_blocking=True)
            valid = torch.ones(len(pixels), dtype=torch.bool, device=self.device)
        with part("teacher"):
            if taught is None:
                taught = targets(self.guests, {pixels.shape[-1]: pixels})
        with part("forward"):
            predicted = self.engine(pixels)
        with part("loss"):
            loss = self.objective(predicted, taught, valid)
            del predicted, taught
        if clocks is None:
            self.engine.step(loss)
            return
        with part("backward"):
            self.engine.deepspeed.backward(loss)
        with part("optimizer"):
            self.engine.deepspeed.step()

    def in_turn(self) -> Callable[[], Tensor]:
        """The batches, one after the other, for ever."""
        turns: Iterator[int] = iter(range(10**9))
        return lambda: self.batches[next(turns) % len(self.batches)]

    def targets(self) -> list[Tensor]:
        """What the teachers say of the first batch."""
        pixels = self.batches[0].to(self.device)
        return targets(self.guests, {pixels.shape[-1]: pixels})


class Clocks:
    """A clock for each part of a step."""

    def __init__(self, device: str) -> None:
        self.of = {part: Clock(device) for part in PARTS}
        self._now = ""

    def __call__(self, part: str) -> Clocks:
        self._now = part
        return self

    def __enter__(self) -> None:
        self.of[self._now].begin()

    def __exit__(self, *_: object) -> None:
        self.of[self._now].end()

    def medians(self) -> dict[str, float]:
        """Microseconds by part."""
        return {part: round(statistics.median(c.seconds()) * 1e6, 1) for part, c in self.of.items()}


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


# Alternatives.


def optimizers(parameters: Sequence[Tensor], device: str) -> dict[str, Callable[[], Any] | str]:
    """How AdamW could be computed over float32 copies of these parameters: makers, or why there is none."""

    def torch_adamw(**how: bool) -> Callable[[], Any]:
        return lambda: torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, **how)

    found: dict[str, Callable[[], Any] | str] = {
        "torch, fused": torch_adamw(fused=True),
        "torch, foreach": torch_adamw(foreach=True),
        "torch, one by one": torch_adamw(foreach=False, fused=False),
    }
    if device != "cuda":
        return found | {"DeepSpeed FusedAdam": "needs a CUDA device", "apex FusedAdam": "needs a CUDA device"}
    from deepspeed.ops.adam import FusedAdam

    found["DeepSpeed FusedAdam"] = lambda: FusedAdam(parameters, lr=1e-4, weight_decay=0.05)
    found["apex FusedAdam"] = "apex is not installed"
    if importlib.util.find_spec("apex") is not None:
        from apex.optimizers import FusedAdam as Apex

        found["apex FusedAdam"] = lambda: Apex(parameters, lr=1e-4, weight_decay=0.05, adam_w_mode=True)
    return found


def measure_optimizers(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each AdamW; the floor is 28 bytes per parameter."""
    device, rows = setup.device.type, []
    shapes = [parameter.shape for parameter in setup.student.parameters()]
    parameters = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    count = sum(parameter.numel() for parameter in parameters)
    for name, make in optimizers(parameters, device).items():
        if isinstance(make, str):
            rows.append({"part": "optimizer", "name": name, "left_out": make})
            continue
        optimizer = make()
        times = clock.timed(optimizer.step, device, protocol)
        rows.append(
            {
                "part": "optimizer",
                "name": name,
                "us": times,
                "num_parameters": count,
                "gb_per_s": round(28 * count / times["median"] / 1e3, 2),
            }
        )
    return rows


def measure_teacher(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each way of running the teacher, with the relative L2 error of its whitened targets."""
    device, guest = setup.device.type, setup.guests[0]
    pixels = setup.batches[0].to(setup.device)
    side = pixels.shape[-1]

    def plain() -> list[Tensor]:
        return [guest({side: pixels})]

    def inference() -> list[Tensor]:
        with torch.inference_mode():
            return plain()

    ways: dict[str, Callable[[], Any] | str] = {"no_grad": plain, "inference mode": inference}
    graph, float8 = "CUDA graph", "float8 (torchao, per row)"
    ways |= {graph: "needs a CUDA device", float8: "needs a CUDA device"}
    exact = whitened(plain()[0])
    outputs: dict[str, list[Tensor]] = {}
    if device == "cuda":
        ways[graph], outputs[graph] = clock.captured(plain, device)
        ways[float8] = "torchao is not installed"
    rows = [_teacher_row(name, way, outputs.get(name), exact, device, protocol) for name, way in ways.items()]
    if device == "cuda" and importlib.util.find_spec("torchao") is not None:
        from torchao import quantization

        # Last, for it replaces the teacher's weights.
        how = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(guest.teacher.network, how)
        rows[-1] = _teacher_row(float8, plain, None, exact, device, protocol)
    return rows


def measure_transfer(setup: Setup, protocol: Protocol) -> list[dict[str, Any]]:
    """A row for each way of sending the images: on the stream of the step, which stands still meanwhile, or
    on one of its own, beside the work that is under way."""
    if setup.device.type != "cuda":
        return [{"part": "transfer", "name": "own stream", "left_out": "needs a CUDA device"}]
    pixels, own = setup.batches[0], torch.cuda.Stream()
    side = pixels.shape[-1]
    there = {side: pixels.to(setup.device)}

    def same() -> None:
        setup.guests[0](there)
        pixels.to(setup.device, non_blocking=True)

    def beside() -> None:
        with torch.cuda.stream(own):
            moved = pixels.to(setup.device, non_blocking=True)
        setup.guests[0](there)
        torch.cuda.current_stream().wait_stream(own)
        moved.record_stream(torch.cuda.current_stream())

    works: dict[str, clock.Work] = {
        "none, the teacher alone": lambda: setup.guests[0](there),
        "the step's stream": same,
        "own stream": beside,
    }
    times = clock.interleaved(works, setup.device.type, protocol)
    return [{"part": "transfer", "name": name, "us": found} for name, found in times.items()]


def whitened(tokens_BMD: Tensor) -> Tensor:
    """Targets as the loss makes them."""
    return torch.nn.functional.layer_norm(tokens_BMD.float(), tokens_BMD.shape[-1:])


def _teacher_row(
    name: str,
    way: Callable[[], Any] | str,
    outputs: list[Tensor] | None,
    exact: Tensor,
    device: str,
    protocol: Protocol,
) -> dict[str, Any]:
    if isinstance(way, str):
        return {"part": "teacher", "name": name, "left_out": way}
    times = clock.timed(way, device, protocol)
    found = way() if outputs is None else outputs
    error = (whitened(found[0]) - exact).norm() / exact.norm()
    return {"part": "teacher", "name": name, "us": times, "target_error": round(error.item(), 6)}


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
    }
    with tempfile.TemporaryDirectory(prefix="fd-step-") as name:
        folder = Path(name)
        for model in models:
            for variant in variants:
                try:
                    row = measure(model, variant, world, folder, protocol, tflops)
                except torch.cuda.OutOfMemoryError as error:
                    row = {"model": model.name, "variant": variant, "failed": str(error).splitlines()[0]}
                found["results"].append(row)
                keep(found)
                gc.collect()  # engines lie in reference cycles
                if device == "cuda":
                    torch.cuda.empty_cache()
        if alternatives:
            setup = Setup.of(models[0], VARIANTS["eager"], world, folder)
            found["parts"] += measure_transfer(setup, protocol)
            found["parts"] += measure_optimizers(setup, protocol)
            found["parts"] += measure_teacher(setup, protocol)
            keep(found)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write unless it was only a look."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = GPU_MODELS if device == "cuda" else CPU_MODELS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=[model.name for model in models])
    parser.add_argument("--variant", action="append", choices=list(VARIANTS))
    parser.add_argument("--parts", action="store_true", help="alternatives for optimizer and teacher as well")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, seconds; writes nothing")
    asked = parser.parse_args(arguments)
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
