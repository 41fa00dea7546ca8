"""The method: a student regresses the whitened feature maps of frozen teachers.

Every teacher and the student see the same crop; the student's projected map is compared with each teacher's
whitened map. How a run steps, saves and goes on is the loop's business (``training.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fd_scale import training
from fd_scale.compiled import compile_blocks
from fd_scale.data.reader import Batch
from fd_scale.data.sets import open_together
from fd_scale.engine.adamw import adamw
from fd_scale.engine.zero import Engine
from fd_scale.errors import RunError
from fd_scale.export import export
from fd_scale.objective import kernels
from fd_scale.objective.chunked import ChunkedLoss
from fd_scale.objective.losses import Objective
from fd_scale.plan import placement
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import Resolved
from fd_scale.run.world import World
from fd_scale.student import Student, begin, build_student
from fd_scale.teachers import Guest, Teacher, difference, load, targets
from fd_scale.teachers.sharded import placed

log = logging.getLogger("fd_scale")


class Watch(Protocol):
    """Measures a run between its steps."""

    def __call__(self, task: Distillation, run: training.Run, step: int) -> dict[str, float]:
        """Figures when ``step`` steps are done; collective."""


def distill(recipe: Recipe, *, watch: Callable[[Recipe, World], Watch | None] | None = None) -> None:
    """Run a recipe to its end, going on from its newest checkpoint; ends the process and never returns.

    ``watch`` makes what measures the run between its steps. For the exit status see ``training.run``.
    """

    def prepare(world: World) -> training.Run:
        resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
        shards = open_together(recipe, world)
        resolved, settlement = placement.settle(recipe, resolved, world)
        task = Distillation(recipe, resolved, world, watch=watch(recipe, world) if watch else None)
        run = training.Run(recipe, task, shards, resolved, world)
        if settlement is not None:
            world.on_main(partial(settlement.record, run.folder))
        return run

    training.run(prepare)


class Distillation:
    """The networks and the objective of a recipe, on this rank's device; a ``training.Task``."""

    labels = False
    change = None
    groups = None
    make_optimizer = staticmethod(adamw)
    keep_steps = ()

    def __init__(
        self, recipe: Recipe, resolved: Resolved, world: World, *, watch: Watch | None = None
    ) -> None:
        self.device, self.watch = world.device, watch
        self.average_decay = recipe.optim.average_decay
        dtype = torch.bfloat16 if resolved.bf16 else torch.float32
        teachers = world.together(lambda: load_teachers(recipe, world.device, dtype))
        self.teachers = placed(teachers, resolved, world)
        self.guests = [Guest(teacher, recipe.objective) for teacher in self.teachers]
        self.objective = Objective(recipe.objective)
        log.info("loss: %s", what_computes(self.objective, self.teachers[0], world.device))
        self.chunk_tokens = resolved.loss_chunk_tokens
        self.module = world.together(lambda: seeded_student(recipe, self.teachers, resolved))
        self.sizes = sorted({self.module.input_size, *(teacher.input_size for teacher in self.teachers)})
        self.student_size = self.module.input_size

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """The method: one crop for all, the teachers' maps as they are, the student's prediction, their
        distance."""
        pixels = training.on_device(batch, self.device)
        valid = batch.valid.to(self.device, non_blocking=True)
        taught = targets(self.guests, pixels)
        if self.chunk_tokens is not None:
            in_pieces = ChunkedLoss(self.objective, taught, valid, self.chunk_tokens)
            return engine(pixels[self.student_size], loss=in_pieces)
        predicted = engine(pixels[self.student_size])
        return self.objective(predicted, taught, valid)

    def maps(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """The teachers' tokens and the student's prediction."""
        pixels = training.on_device(batch, self.device)
        taught = {f"teacher {guest.teacher.name}": guest(pixels) for guest in self.guests}
        return taught | {"student": engine(pixels[self.student_size])[0]}

    @property
    def facts(self) -> dict[str, Any]:
        """Whose features are learnt, and by which matrix its embedding is reached, if that is learnt too."""
        learnt: dict[str, Any] = {"teacher": self.teachers[0].fingerprint}
        projection = self.teachers[0].projection
        if self.module.embedder is not None and projection is not None:
            learnt["projection"] = projection.sha256
        return learnt

    def resume(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``RunError`` for a checkpoint that was made with another teacher."""
        if differences := difference(facts["teacher"], self.teachers[0].fingerprint):
            raise RunError(f"{checkpoint} was made with another teacher: {'; '.join(differences)}")
        if facts.get("projection") != self.facts.get("projection"):
            raise RunError(f"{checkpoint} was made with another projection of its teacher's class token")

    def figures(self, run: training.Run, step: int) -> dict[str, float]:
        """What ``watch`` measures, if there is one."""
        return {} if self.watch is None else self.watch(self, run, step)

    def finish(self, run: training.Run) -> None:
        """Export the student of the last step, and its moving average if there is one."""
        for average in (False, True)[: 1 + (self.average_decay is not None)]:
            written = run.world.on_main(partial(export, run.folder.path, average=average))
            log.info("student%s: %s", " (EMA)" if average else "", written.weights)


def what_computes(objective: Objective, teacher: Teacher, device: torch.device) -> str:
    """Which implementation the loss has for a teacher's tokens, and why; for the log."""
    token_BND = torch.empty(1, 1, teacher.width, dtype=teacher.dtype, device=device)
    chosen = kernels.choose(token_BND, token_BND, objective.spec.target)
    return f"{chosen.name} ({chosen.reason})"


def load_teachers(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[Teacher]:
    """The recipe's frozen teachers on their device."""
    return [load(recipe.teacher, device=device, dtype=dtype, seed=recipe.seed)]


def seeded_student(recipe: Recipe, teachers: Sequence[Teacher], resolved: Resolved) -> Student:
    """The student with random weights that depend on the recipe's seed alone, hence equal on every rank, or
    with those that the recipe gives its backbone."""
    torch.manual_seed(recipe.seed)
    student = build_student(recipe, teachers)
    begin(student, recipe.student)
    student.set_grad_checkpointing(resolved.activation_checkpointing, **resolved.granularity)
    if resolved.compile:
        compile_blocks(student.backbone)
    return student
