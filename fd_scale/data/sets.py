"""Which shards does a recipe ask for, in which order, and is there room for how they are read?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fd_scale.data.index import Access, ShardSet
from fd_scale.data.plan import Plan
from fd_scale.errors import RecipeError
from fd_scale.run.recipe import RunRecipe

if TYPE_CHECKING:
    from fd_scale.run.world import World

_GIB = 2**30


def access_of(recipe: RunRecipe) -> Access:
    """How the recipe reaches remote shards."""
    run = recipe.run
    return Access(
        cache=None if run.cache is None else Path(run.cache),
        cache_bytes=None if run.cache_gib is None else int(run.cache_gib * _GIB),
        allow_pipe=run.allow_pipe,
    )


def open_shards(recipe: RunRecipe, *, check: bool = True) -> ShardSet:
    """The recipe's shards; raises ``RecipeError`` when it names none, and as ``ShardSet.open`` does."""
    folders = list(recipe.data.sources) if recipe.data.shards is None else [recipe.data.shards]
    if not folders:
        raise RecipeError(
            "data.shards is not set: give the folder of shards with --set data.shards=FOLDER "
            "(make one with `fd-scale shards pack IMAGES FOLDER`)"
        )
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        field = "data.sources" if recipe.data.shards is None else "data.shards"
        raise RecipeError(
            f"{field} names {', '.join(missing)}, which is no folder; fd-scale shards pack makes one from "
            "images"
        )
    return ShardSet.open(*folders, access=access_of(recipe), check=check)


def open_together(recipe: RunRecipe, world: World) -> ShardSet:
    """The same on every rank, each looking at its part of the files; collective.

    What any rank finds missing is refused by all, in one list.
    """
    shards = world.together(lambda: open_shards(recipe, check=False))
    shards.refuse_faults(*world.gather(shards.faults(world.rank, world.size)))
    return shards


def plan_of(recipe: RunRecipe, shards: ShardSet) -> Plan:
    """The order of the run's samples; raises as ``Plan`` does."""
    weights = list(recipe.data.sources.values()) or [1.0]
    return Plan(
        shards.counts,
        seed=recipe.seed,
        global_batch=recipe.global_batch,
        mix=list(zip(shards.shards_per_folder, weights, strict=True)),
        block=recipe.data.block,
        fingerprint=shards.fingerprint,
    )


def refuse_want_of_room(shards: ShardSet, plan: Plan, world_size: int) -> None:
    """Raise ``RecipeError`` when streaming would fill the memory, or a cache would drop what is in use."""
    streams = plan.streams // world_size
    if shards.needs_telling:
        held = 2 * streams * plan.block * shards.num_bytes / max(1, plan.num_samples)
        memory = psutil.virtual_memory().total
        if held > memory / 2:
            raise RecipeError(
                f"streaming {streams} streams per process with data.block={plan.block} holds up to "
                f"{held / _GIB:.1f} GiB in memory, this machine has {memory / _GIB:.1f}: lower data.block, "
                "use more processes, or keep copies on disk with run.cache"
            )
    limit = shards.access.cache_bytes
    needed = streams * shards.largest_remote_bytes
    if shards.access.cache is not None and limit is not None and limit < needed:
        raise RecipeError(
            f"run.cache_gib={limit / _GIB:g} cannot hold the {streams} shards that one process reads at a "
            f"time, {needed / _GIB:.1f} GiB: every batch would fetch them anew. Raise it, or stream with "
            "run.cache=null"
        )
