"""How should a run lie on these machines? The largest micro-batch that fits, and the scale to choose.

Tried are ZeRO stages 1, 2 and 3, each with and without recomputation, at the largest micro-batch that fits
and that the global batch allows; the fastest by the estimate wins, and of equals the lowest stage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from fd_scale.errors import ScaleError
from fd_scale.plan.cluster import Cluster
from fd_scale.plan.course import Course, Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import GIB, Memory, memory, with_gradients
from fd_scale.plan.placement import Decision, settled
from fd_scale.plan.step_time import Assumptions, StepTime, step_time
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import MICRO_BATCH, Scale

STAGES = (1, 2, 3)
NEAR = 1.02
"""A lower stage is preferred to one that is faster by less than this ratio."""


@dataclass(frozen=True)
class Choice:
    """One way to lie on the machines."""

    layout: Layout
    memory: Memory
    time: StepTime
    decision: Decision | None = None
    """On the teacher, where its scale leaves that to the plan; the layout has it."""

    @property
    def images_per_step(self) -> int:
        return self.layout.world * self.layout.micro_batch * self.layout.accumulation


@dataclass(frozen=True)
class Shapes:
    """What was counted of a recipe: its parameters, and its micro-step without and with recomputation, each
    traced with gradients taken as they come."""

    sizes: Sizes
    courses: dict[bool, Course]

    def trace(self, layout: Layout) -> Trace:
        """The micro-step of a layout."""
        return with_gradients(self.courses[layout.recompute].at(layout.micro_batch), layout, self.sizes)


def judge(layout: Layout, shapes: Shapes, cluster: Cluster, assumed: Assumptions) -> Choice:
    """Memory and time of a layout on the cluster."""
    trace = shapes.trace(layout)
    layout, decision = settled(layout, shapes.sizes, trace, cluster.gpu.memory_gib, "cuda")
    held = memory(layout, shapes.sizes, trace, "cuda")
    return Choice(layout, held, step_time(layout, shapes.sizes, trace, cluster, assumed), decision)


def fits(choice: Choice, cluster: Cluster) -> bool:
    """Whether a GPU holds it, with holes and what lies outside the allocator."""
    return choice.memory.needed_bytes <= cluster.gpu.memory_gib * GIB


def micro_batches(wanted: Scale, recipe: Recipe, world: int) -> list[int]:
    """The micro-batches that share the global batch evenly among so many processes, the largest first."""
    found = []
    for size in range(recipe.global_batch // world, 0, -1):
        if recipe.global_batch % (size * world) == 0:
            try:
                scale.resolve(_with(wanted, {MICRO_BATCH: size}), recipe, world)
            except ScaleError:
                continue
            found.append(size)
    return found


def largest_micro_batch(layout: Layout, shapes: Shapes, cluster: Cluster, assumed: Assumptions) -> int:
    """The most images per process that a GPU holds in this layout, whatever the global batch; 0 for none.

    Memory grows with the micro-batch, so that halving finds it.
    """

    def holds(size: int) -> bool:
        return fits(judge(replace(layout, micro_batch=size), shapes, cluster, assumed), cluster)

    low, high = 0, 1
    while high <= 2**20 and holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def choices(
    wanted: Scale,
    recipe: Recipe,
    shapes: Shapes,
    cluster: Cluster,
    assumed: Assumptions,
    stages: tuple[int, ...] = STAGES,
) -> Iterator[Choice]:
    """For each stage and recomputation, the one at the largest micro-batch that fits and divides."""
    world = cluster.num_gpus
    allowed = micro_batches(wanted, recipe, world)
    for stage in stages:
        if stage == 3 and wanted.compile:
            continue  # a scale may not ask for both
        config = with_stage(wanted, stage)
        for recompute in shapes.courses:
            for size in allowed:
                resolved = scale.resolve(_with(config, {MICRO_BATCH: size}), recipe, world)
                layout = replace(Layout.of(resolved, world), recompute=recompute)
                choice = judge(layout, shapes, cluster, assumed)
                if fits(choice, cluster):
                    yield choice
                    break


def best(found: list[Choice]) -> Choice | None:
    """The fastest, or one that is about as fast at a lower stage; None of nothing."""
    if not found:
        return None
    fastest = min(choice.time.total_s for choice in found)
    return next(choice for choice in found if choice.time.total_s <= NEAR * fastest)


def ds_config(wanted: Scale, choice: Choice) -> dict[str, Any]:
    """The scale file of a choice: the asked one with other stage, micro-batch and recomputation."""
    config = _with(with_stage(wanted, choice.layout.zero_stage), {MICRO_BATCH: choice.layout.micro_batch})
    recomputed = dict(wanted.granularity) if choice.layout.recompute and wanted.granularity else None
    own: dict[str, Any] = {
        "activation_checkpointing": recomputed or choice.layout.recompute,
        "teacher": choice.layout.teacher,
    }
    own |= {"compile": True} if wanted.compile else {}
    own |= {} if wanted.loss_chunk_tokens is None else {"loss_chunk_tokens": wanted.loss_chunk_tokens}
    return {**config.deepspeed, "fd_scale": own}


def with_stage(wanted: Scale, stage: int) -> Scale:
    """The scale at another ZeRO stage, without the keys that only its own stage knows."""
    zero = json.loads(json.dumps(wanted.deepspeed.get("zero_optimization", {})))
    if zero.get("stage", 0) == stage:
        return wanted
    kept = {
        key: value
        for key, value in zero.items()
        if stage == 3
        or not (
            key.startswith("stage3_") or key in ("zero_hpz_partition_size", "sub_group_size", "offload_param")
        )
    }
    return _with(wanted, {"zero_optimization": kept | {"stage": stage}})


def _with(wanted: Scale, changes: dict[str, Any]) -> Scale:
    return replace(wanted, deepspeed={**wanted.deepspeed, **changes})
