"""Which samples does a rank see in a step? The plan's answer by name, for whoever wants to check it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fd_scale.data.index import ShardSet
from fd_scale.data.plan import Plan
from fd_scale.errors import ShardError


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
