"""How fast, how well, and waiting for what? Figures of a run between two log lines.

Losses, and whether steps were applied, are gathered on the device, so that no step waits for a number; they
are read for a log line or a checkpoint. Who shows them is ``run/report.py``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from fd_scale.data.reader import Batch
from fd_scale.engine.zero import StepOutcome
from fd_scale.run.world import World


@dataclass(frozen=True)
class Row:
    """Steps in a row that changed nothing: how many, and the number of the last one."""

    length: int = 0
    last: int = -1


@dataclass
class Meter:
    """What is gathered between two log lines."""

    global_batch: int
    steps: int = 0
    skipped: int = 0
    row: Row = Row()
    """Of skipped steps, up to the last step that was read; none where that one was applied."""
    wait_s: float = 0.0
    stall_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)
    """Of steps that were not read so far."""
    outcome: StepOutcome | None = None

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for them added up."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Note the time for which training stands still to save."""
        begin = time.perf_counter()
        yield
        self.stall_s += time.perf_counter() - begin

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch."""
        self.losses.append(loss.detach())

    def end_step(self, outcome: StepOutcome) -> None:
        """Note the end of an optimizer step."""
        self.steps += 1
        self.outcomes.append(outcome)
        self.outcome = outcome

    def settle(self) -> Row:
        """Read which steps were applied since this was asked last; the longest row of skipped ones that has
        grown since. Waits for the device; the same on every rank."""
        longest = Row()
        if self.outcomes:
            applied = torch.stack([outcome.applied for outcome in self.outcomes]).tolist()
            for outcome, good in zip(self.outcomes, applied, strict=True):
                self.row = Row() if good else Row(self.row.length + 1, outcome.step)
                longest = max(longest, self.row, key=lambda row: row.length)
                self.skipped += not good
        self.outcomes = []
        return longest

    def read(self, world: World) -> dict[str, float]:
        """Global figures since the last reading, units in the names; starts anew. Collective, and waits for
        the device."""
        self.settle()
        loss = float(world.mean(torch.stack(self.losses).mean()))
        elapsed = time.perf_counter() - self.since
        figures = {
            "loss": loss,
            "lr": self.outcome.lr if self.outcome else float("nan"),
            "grad_norm": float(self.outcome.grad_norm) if self.outcome else float("nan"),
            "images_per_s": self.steps * self.global_batch / elapsed,
            "data_wait_share": self.wait_s / elapsed,
            "memory_gib": memory_gib(world.device),
            "checkpoint_stall_s": self.stall_s,
            "skipped_steps": float(self.skipped),
        }
        self.steps, self.skipped, self.wait_s, self.stall_s, self.losses = 0, 0, 0.0, 0.0, []
        self.since = time.perf_counter()
        return figures


def memory_gib(device: torch.device) -> float:
    """Peak memory of the device's allocator, or the resident memory of a CPU process, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
