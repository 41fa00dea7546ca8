"""The method: a student regresses the whitened feature maps of frozen teachers.

Every teacher and the student see the same crop; the student's projected map is compared with each teacher's
whitened map. How a run steps, saves and goes on is the loop's business (``training.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_scale import training
from fd_scale.compiled import compile_blocks
from fd_scale.data import color
from fd_scale.data.reader import Batch
from fd_scale.data.sets import open_together
from fd_scale.engine.zero import Engine
from fd_scale.errors import RunError
from fd_scale.export import export
from fd_scale.objective.losses import Objective
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import Resolved
from fd_scale.run.world import World
from fd_scale.student import Student, build_student
from fd_scale.teachers import FrozenTeacher, Guest, Teacher, difference, load
from fd_scale.teachers.sharded import placed

log = logging.getLogger("fd_scale")


def distill(recipe: Recipe) -> None:
    """Run a recipe to its end, going on from its newest checkpoint; ends the process and never returns.

    For the exit status see ``training.run``.
    """

    def prepare(world: World) -> training.Run:
        resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
        shards = open_together(recipe, world)
        return training.Run(recipe, Distillation(recipe, resolved, world), shards, resolved, world)

    training.run(prepare)


class Distillation:
    """The networks and the objective of a recipe, on this rank's device; a ``training.Task``."""

    labels = False
    groups = None

    def __init__(self, recipe: Recipe, resolved: Resolved, world: World) -> None:
        self.device = world.device
        dtype = torch.bfloat16 if resolved.bf16 else torch.float32
        teachers = world.together(lambda: load_teachers(recipe, world.device, dtype))
        self.teachers = placed(teachers, resolved, world)
        self.guests = [Guest(teacher, recipe.objective) for teacher in self.teachers]
        self.objective = Objective(recipe.objective)
        self.module = world.together(lambda: seeded_student(recipe, self.teachers, resolved))
        self.sizes = sorted({self.module.input_size, *(teacher.input_size for teacher in self.teachers)})
        self.student_size = self.module.input_size

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """The method: one crop for all, the teachers' maps as they are, the student's prediction, their
        distance."""
        pixels = self.pixels(batch)
        valid = batch.valid.to(self.device, non_blocking=True)
        taught = [guest(pixels) for guest in self.guests]
        predicted = engine(pixels[self.student_size])
        return self.objective(predicted, taught, valid)

    def pixels(self, batch: Batch) -> dict[int, Tensor]:
        """The views on this rank's device, in the colours that were drawn for them."""
        views = {size: tensor.to(self.device, non_blocking=True) for size, tensor in batch.pixels.items()}
        if batch.colors is None:
            return views
        colors = batch.colors.to(self.device, non_blocking=True)
        return {size: color.apply(view, colors) for size, view in views.items()}

    def maps(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """The teachers' tokens and the student's prediction."""
        pixels = self.pixels(batch)
        taught = {f"teacher {guest.teacher.name}": guest(pixels) for guest in self.guests}
        return taught | {"student": engine(pixels[self.student_size])[0]}

    @property
    def facts(self) -> dict[str, Any]:
        """Whose features are learnt."""
        return {"teacher": self.teachers[0].fingerprint}

    def check(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``RunError`` for a checkpoint that was made with another teacher."""
        if differences := difference(facts["teacher"], self.teachers[0].fingerprint):
            raise RunError(f"{checkpoint} was made with another teacher: {'; '.join(differences)}")

    def finish(self, run: training.Run) -> None:
        """Export the student of the last step."""
        written = run.world.on_main(lambda: export(run.folder.path))
        log.info("student: %s", written.weights)


def load_teachers(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[FrozenTeacher]:
    """The recipe's frozen teachers on their device."""
    return [load(recipe.teacher, device=device, dtype=dtype, seed=recipe.seed)]


def seeded_student(recipe: Recipe, teachers: Sequence[Teacher], resolved: Resolved) -> Student:
    """The student with random weights that depend on the recipe's seed alone, hence equal on every rank."""
    torch.manual_seed(recipe.seed)
    student = build_student(recipe, teachers)
    student.set_grad_checkpointing(resolved.activation_checkpointing, **resolved.granularity)
    if resolved.compile:
        compile_blocks(student.backbone)
    return student
