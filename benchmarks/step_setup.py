"""Which networks take the step that is timed, and what of it is ready beforehand?

For ``benchmarks/step.py`` and ``benchmarks/peers.py``: recipe, teacher, student, objective and engine as a
run puts them together, and batches of random images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Clock, Protocol
from benchmarks.plan_cases import OFF, SWIN_B, ZERO_1, Case
from fd_scale.distill import load_teachers, seeded_student
from fd_scale.engine.zero import Engine
from fd_scale.objective import Objective
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
