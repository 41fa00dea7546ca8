"""Where is each data worker? So that one that dies or hangs is reported with the sample it was at.

The workers write the place of every sample that they begin into memory shared with the training process.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import get_worker_info


class Watch:
    """One line per worker, of the last sample that it began."""

    def __init__(self, workers: int) -> None:
        self._places = torch.full((workers, 2), -1, dtype=torch.int64).share_memory_()

    def note(self) -> Callable[[int, int], None]:
        """A function that notes (shard, index) for the worker that asks; elsewhere it does nothing."""
        info = get_worker_info()
        if info is None:
            return lambda shard, index: None
        line: np.ndarray = self._places.numpy()[info.id]

        def note(shard: int, index: int) -> None:
            line[0], line[1] = shard, index

        return note

    def report(self, name: Callable[[int, int], str]) -> str:
        """What every worker was at, by ``name(shard, index)``, a line each."""
        lines = []
        for worker, (shard, index) in enumerate(self._places.tolist()):
            lines.append(f"worker {worker}: {name(shard, index) if shard >= 0 else 'no sample yet'}")
        return "\n  ".join(lines)
