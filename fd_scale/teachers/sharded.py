"""Where a teacher's parameters lie: whole on every process, or, when it is too large, sharded over them.

How parameters are sharded is the engine's; here a frozen teacher becomes one module that an engine can take,
and that engine becomes a teacher again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from fd_scale.compiled import compile_blocks
from fd_scale.engine.zero import shard_frozen
from fd_scale.objective.features import Features
from fd_scale.run.scale import Resolved
from fd_scale.run.world import World
from fd_scale.teachers.frozen import Read, Teacher


def placed(teachers: Sequence[Teacher], resolved: Resolved, world: World) -> list[Teacher]:
    """The teachers as the scale asks: whole on every process, compiled or not, or in shares.

    Raises ``ValueError`` while the placement is still to be decided (``plan.placement``).
    """
    if resolved.teacher == "auto":
        raise ValueError("whether the teacher is whole or in shares is not decided yet (plan.placement)")
    if resolved.compile:
        for teacher in teachers:
            compile_blocks(teacher.network)
    if resolved.teacher == "replicate" or world.size == 1:
        return list(teachers)
    return [shard(teacher, partial(shard_frozen, world=world, bf16=resolved.bf16)) for teacher in teachers]


class MapReader(nn.Module):
    """A network and the way to read its map, as one module: normalised pixels (B, 3, S, S) to tokens
    (B, N, D)."""

    def __init__(self, network: nn.Module, read: Read) -> None:
        super().__init__()
        self.network = network
        self._read = read

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """The tokens, prefix tokens first."""
        return self._read(self.network, pixels_BCHW).tokens_BND


def shard(teacher: Teacher, engine_of: Callable[[nn.Module], Any]) -> Teacher:
    """The same teacher, held in shares by all processes; ``engine_of`` shards a module.

    Its ``features`` are collective from then on: every process must ask for them equally often.
    """

    def read(engine: nn.Module, pixels_BCHW: Tensor) -> Features:
        return Features(engine(pixels_BCHW), teacher.grid, teacher.num_prefix_tokens)

    return replace(teacher, network=engine_of(MapReader(teacher.network, teacher.read)), read=read)
