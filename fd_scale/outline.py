"""What would this run be? The resolved plan of a recipe on these processes, before anything is loaded or
written.

Networks are built without storage, so the largest recipe is outlined in seconds on any machine. Memory and
time are foretold by ``plan``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.table import Table
from torch import nn

from fd_scale.data.index import ShardSet
from fd_scale.data.sets import open_shards, plan_of
from fd_scale.engine.optim import parameter_groups
from fd_scale.plan.networks import without_storage
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import Resolved
from fd_scale.run.world import place
from fd_scale.student import Student
from fd_scale.teachers import Teacher


def outline(recipe: Recipe) -> Table:
    """A table of two columns; raises the same errors for wrong input as the run itself would.

    The number of processes is the one that the launcher says, 1 without a launcher.
    """
    size = place().size
    resolved = scale.resolve(scale.load(recipe.scale), recipe, size)
    named = recipe.data.shards is not None or recipe.data.sources
    shards = open_shards(recipe) if named else None
    teacher, student = without_storage(recipe)
    table = Table(title=f"{recipe.run_name} (dry run)", show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(recipe, resolved, size, shards, teacher, student):
        table.add_row(name, text)
    return table


def _rows(
    recipe: Recipe, resolved: Resolved, size: int, shards: ShardSet | None, teacher: Teacher, student: Student
) -> Iterator[tuple[str, str]]:
    yield from _networks_rows(recipe, teacher, student)
    yield from _data_rows(recipe, resolved, size, shards)
    yield from _optimizer_rows(recipe, student)
    yield "engine", _engine(resolved, recipe.scale)
    yield "run directory", str(Path(recipe.run.root) / recipe.run_name)


def _engine(resolved: Resolved, scale: str) -> str:
    granularity = "".join(f", {name} {value}" for name, value in resolved.granularity.items())
    recomputed = f"on{granularity}" if resolved.activation_checkpointing else "off"
    parts = [f"ZeRO-{resolved.zero_stage}", "bf16" if resolved.bf16 else "fp32"]
    teacher = "decided at the start, see plan" if resolved.teacher == "auto" else resolved.teacher
    parts += [f"activation checkpointing {recomputed}", f"teacher: {teacher}"]
    parts += ["compiled blocks"] * resolved.compile
    if resolved.loss_chunk_tokens is not None:
        parts.append(f"loss in pieces of {resolved.loss_chunk_tokens} tokens")
    return f"{', '.join(parts)} (scale {scale})"


def _networks_rows(recipe: Recipe, teacher: Teacher, student: Student) -> Iterator[tuple[str, str]]:
    spec, objective = recipe.teacher, recipe.objective
    yield "teacher", f"{spec.library} {teacher.name}, weights {spec.weights}"
    yield "its map", f"{_form(teacher)} at {teacher.input_size} px"
    yield "student", f"{recipe.student.architecture}, {_count(student.backbone)} parameters"
    yield "its input", f"{student.input_size} px"
    yield "projector", f"{_count(student.projectors)} parameters, to {teacher.width} channels"
    yield (
        "objective",
        f"{objective.granularity} map, target {objective.target}, smooth L1, beta {objective.beta:g}",
    )
    if student.embedder is not None:
        count = _count(student.embedder)
        yield "embedding", f"cosine, weight {objective.embedding_weight:g}, by a head of {count} parameters"
    yield "class token", f"{objective.cls}, weight {objective.cls_weight:g} ({objective.normaliser})"


def _data_rows(
    recipe: Recipe, resolved: Resolved, size: int, shards: ShardSet | None
) -> Iterator[tuple[str, str]]:
    images = recipe.schedule.images
    if shards is None:
        yield "data", "data.shards is not set"
        yield "to see", f"{images:,} images"
    else:
        yield from _plan_rows(recipe, shards)
    yield "steps", f"{recipe.steps:,}, the first {recipe.warmup_steps:,} of them warm-up"
    shares = f"{size} processes x {resolved.micro_batch} images x {resolved.accumulation} accumulated"
    yield "global batch", f"{recipe.global_batch:,} = {shares}"


def _plan_rows(recipe: Recipe, shards: ShardSet) -> Iterator[tuple[str, str]]:
    plan = plan_of(recipe, shards)
    for folder, streams in zip(shards.folders, plan.streams_per_source, strict=True):
        count = int(folder.counts.sum())
        share = "" if len(plan.mix) == 1 else f", {streams / plan.streams:.1%} of every batch"
        seen = recipe.steps * plan.per_step * streams / count
        holds = f"{count:,} images in {len(folder.urls):,} shards"
        yield "data", f"{folder.folder}: {holds}{share}, seen {seen:,.1f} times"
    yield "to see", f"{recipe.schedule.images:,} images"
    yield "order", f"{plan.streams:,} streams, shuffled in blocks of {plan.block:,}"
    yield "processes", f"numbers that can share it: {', '.join(map(str, plan.allowed_world_sizes()))}"


def _optimizer_rows(recipe: Recipe, student: Student) -> Iterator[tuple[str, str]]:
    optim, schedule = recipe.optim, recipe.schedule
    yield "learning rate", f"{schedule.warmup_lr:g} -> {optim.lr:g} -> {schedule.min_lr:g}"
    groups = parameter_groups(student, weight_decay=optim.weight_decay, decay_position=optim.decay_position)
    for group in groups:
        total = sum(parameter.numel() for parameter in group["params"])
        contents = f"{len(group['params'])} tensors, {total:,} parameters"
        yield f"group {group['name']}", f"{contents}, weight decay {group['weight_decay']:g}"
    yield "EMA", "none" if optim.average_decay is None else f"decay {optim.average_decay:g} per step"
    yield "clip", "none" if optim.clip_norm is None else f"global L2 norm {optim.clip_norm:g}"


def _form(teacher: Teacher) -> str:
    return f"{teacher.num_prefix_tokens} + {teacher.grid[0]}x{teacher.grid[1]} tokens of {teacher.width}"


def _count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"
