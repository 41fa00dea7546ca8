"""Which samples does a rank see in a step? The plan's answer by name, for whoever wants to check it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fd_scale.data.index import ShardSet
from fd_scale.data.plan import Plan
from fd_scale.errors import RecipeError, ShardError
from fd_scale.run.recipe import RunRecipe, checked, derive
from fd_scale.run.recipes import chosen


class Listed(NamedTuple):
    """One sample of a step."""

    shard: str
    place: int
    """In its shard, samples that are excluded not counted."""
    key: str


def samples(
    shards: ShardSet, plan: Plan, *, epoch: int, step: int, rank: int = 0, world_size: int = 1
) -> Iterator[Listed]:
    """The samples of a rank's part of a step, in order; ``step`` counts within the epoch.

    An epoch of a mix ends when every data set has gone round. Raises ``ShardError`` for a step that an epoch
    has not, or a rank that there is not, and ``ScaleError`` for a world size that the plan does not allow.
    """
    if not 0 <= step < plan.steps_per_epoch:
        raise ShardError(
            f"--step {step}: an epoch has {plan.steps_per_epoch:,} steps of {plan.global_batch:,} samples, "
            f"0 to {plan.steps_per_epoch - 1}"
        )
    if not 0 <= rank < world_size:
        raise ShardError(f"--rank {rank}: {world_size} processes have ranks 0 to {world_size - 1}")
    found = plan.samples(epoch * plan.steps_per_epoch + step, rank, world_size)
    for shard, index in zip(found.shard.tolist(), found.index.tolist(), strict=True):
        yield Listed(shards.names[shard], index, shards.key(shard, index))


def run_of(
    folders: Sequence[str], recipe: str | None, assignments: Sequence[str], fields: Mapping[str, int | None]
) -> RunRecipe:
    """The run whose order is asked for: a recipe's, or one over ``folders`` with nothing else to it.

    A folder is written ``FOLDER``, or ``FOLDER=WEIGHT`` where several are mixed. ``fields`` are the recipe's
    that decide the order, by dotted name, ``None`` where not given. Raises ``RecipeError`` for what is
    missing, given twice, or no weight.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if recipe is not None:
        changes = ["data.shards=FOLDER"] * bool(folders) + [
            f"{name}={value}" for name, value in given.items()
        ]
        if changes:
            remedy = " ".join(f"--set {change}" for change in changes)
            raise RecipeError(f"--recipe {recipe} says which folders in which order; change it with {remedy}")
        return chosen(recipe, assignments)
    if assignments:
        raise RecipeError(f"--set {assignments[0]} changes a recipe: name one with --recipe")
    if not folders or "global_batch" not in given:
        raise RecipeError("give FOLDER (or several FOLDER=WEIGHT) and --global-batch, or --recipe")
    data: dict[str, Any] = {"shards": folders[0]} if _is_alone(folders) else {"sources": _weights(folders)}
    return derive(checked(RunRecipe, {"name": "order", "scale": "none", "data": data}), **given)


def _is_alone(words: Sequence[str]) -> bool:
    """Whether this is one folder without a weight; a folder whose name has an equals sign is one."""
    return len(words) == 1 and ("=" not in words[0] or Path(words[0]).is_dir())


def _weights(words: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        folder, separator, weight = word.rpartition("=")
        try:
            value = float(weight) if separator else 0.0
        except ValueError:
            value = 0.0
        if not (0 < value < float("inf")):
            raise RecipeError(
                f"{word!r} is not FOLDER=WEIGHT with a weight above 0, as each of several must be"
            )
        if folder in found:
            raise RecipeError(f"{folder} is given twice: add up its weights")
        found[folder] = value
    return found
