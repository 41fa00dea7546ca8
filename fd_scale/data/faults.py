"""What becomes of a sample that cannot be used? It is masked, counted, written down, and has a budget.

The reader turns a bad sample into a zero image that is not valid; this module keeps the books of one process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from fd_scale.errors import ShardError

GRACE_SAMPLES = 8
"""Bad samples that are borne before their share is judged; the first one is always a large share."""


class SampleError(Exception):
    """One sample that cannot be used, and why; ``stage`` is the step of the way at which it failed."""

    stage: ClassVar[str]


class ReadError(SampleError):
    """Bytes that cannot be read from their shard."""

    stage = "read"


class LabelError(SampleError):
    """A label that is missing or no whole number."""

    stage = "label"


@dataclass(frozen=True)
class Fault:
    """A bad sample: where the plan met it, which one it is, what is wrong."""

    epoch: int
    step: int
    shard: str
    key: str
    stage: str
    error: str


class Ledger:
    """Counts the samples that one process was given, and writes each bad one down once, as a line of JSON.

    Bad samples may number ``GRACE_SAMPLES`` or the share ``max_bad_fraction`` of all samples seen, whichever
    is more; with ``max_bad_fraction=0`` none is borne. ``path=None`` counts without writing.
    """

    def __init__(self, path: Path | None, *, max_bad_fraction: float, rank: int = 0) -> None:
        self.path, self.max_bad_fraction, self.rank = path, max_bad_fraction, rank
        self.seen = 0
        self.bad = 0
        self._written: set[tuple[str, str, str]] = set()

    def record(self, seen: int, faults: Sequence[Fault]) -> None:
        """Book ``seen`` more samples with their faults; raises ``ShardError`` when the budget is spent."""
        self.seen += seen
        self.bad += len(faults)
        if not faults:
            return
        self._write(faults)
        grace = GRACE_SAMPLES if self.max_bad_fraction > 0 else 0
        if self.bad > max(grace, self.max_bad_fraction * self.seen):
            self._stop(faults[-1])

    def _write(self, faults: Sequence[Fault]) -> None:
        new = {(fault.shard, fault.key, fault.stage): fault for fault in faults}
        fresh = [fault for name, fault in new.items() if name not in self._written]
        self._written.update(new)
        if self.path is None or not fresh:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [json.dumps({"time": now, "rank": self.rank, **asdict(fault)}) + "\n" for fault in fresh]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _stop(self, last: Fault) -> None:
        listed = f"; all are listed in {self.path}" if self.path else ""
        raise ShardError(
            f"{self.bad:,} of {self.seen:,} samples could not be used, more than "
            f"data.max_bad_fraction={self.max_bad_fraction} allows; the last one: shard {last.shard}, "
            f"key {last.key}, {last.stage}: {last.error}{listed}. "
            "Repair or replace these images, or raise data.max_bad_fraction"
        )
