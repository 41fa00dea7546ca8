"""What becomes of a sample that cannot be used? It is masked, counted, written down, and has a budget.

The reader turns a bad sample into a zero image that is not valid; this module keeps the books of one process,
and puts those of all processes together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from fd_scale.errors import ShardError

GRACE_SAMPLES = 8
"""Bad samples that are borne before their share is judged; the first one is always a large share."""


class SampleError(Exception):
    """One sample that cannot be used, and why; ``stage`` is the step of the way at which it failed."""

    stage: ClassVar[str]


class LostShardError(SampleError):
    """A shard that can no longer be read: gone, cut, changed, or out of reach."""

    stage = "shard"


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


@dataclass(frozen=True)
class Budget:
    """How much damage is borne (``recipe.Data``): a share of samples, and a number of lost shards."""

    max_bad_fraction: float
    max_bad_shards: int = 0


@dataclass(frozen=True)
class Totals:
    """Samples that were given out, those among them that could not be used, and the shards that were lost.

    Samples of a lost shard are bad, but have no part in the share that is judged: the shard is.
    """

    seen: int = 0
    bad: int = 0
    bad_in_lost_shards: int = 0
    lost_shards: tuple[str, ...] = ()

    def __add__(self, other: Totals) -> Totals:
        lost = tuple(sorted({*self.lost_shards, *other.lost_shards}))
        in_lost = self.bad_in_lost_shards + other.bad_in_lost_shards
        return Totals(self.seen + other.seen, self.bad + other.bad, in_lost, lost)


class Ledger:
    """The books of one process: how many samples it was given, and each bad one, as a line of JSON, once.

    Bad samples may number ``GRACE_SAMPLES`` or the share of all samples seen that the budget allows,
    whichever is more; at a share of 0 none is borne. A process alone judges and writes at once. Of
    ``world_size`` processes each stops by itself only when the budget of all is spent for certain, and lines
    are written when they ``settle`` or ``flush``. ``path=None`` counts without writing. ``verify_command``
    tells how to look into a shard of this name.
    """

    def __init__(
        self,
        path: Path | None,
        budget: Budget,
        *,
        rank: int = 0,
        world_size: int = 1,
        verify_command: Callable[[str], str] = "fd-scale shards verify {}".format,
    ) -> None:
        self.path, self.budget, self.rank, self.world_size = path, budget, rank, world_size
        self.totals = Totals()
        self._verify_command = verify_command
        self._last: Fault | None = None
        self._pending: list[dict[str, Any]] = []
        self._named: set[tuple[str, str, str]] = set()

    def record(self, seen: int, faults: Sequence[Fault]) -> None:
        """Book ``seen`` more samples with their faults; raises ``ShardError`` when the budget is spent."""
        lost = [fault for fault in faults if fault.stage == LostShardError.stage]
        names = tuple(sorted({fault.shard for fault in lost}))
        self.totals += Totals(seen, len(faults), len(lost), names)
        if not faults:
            return
        self._last = lost[-1] if lost else faults[-1]
        self._note(faults)
        if self.world_size == 1:
            self.flush()
        certain = Totals(
            self.totals.seen * self.world_size,
            self.totals.bad,
            self.totals.bad_in_lost_shards,
            self.totals.lost_shards,
        )
        self._judge(certain, self._last)

    def settle(self, gather: Callable[[Any], list[Any]]) -> Totals:
        """The totals of all processes; collective. Writes what they found, raises on all when it is too much.

        ``gather`` gives the list of every rank's value, in rank order, on every rank.
        """
        books = gather((self.totals, self._pending, self._last))
        if self.rank == 0:
            _append(self.path, [line for _, pending, _ in books for line in pending])
        self._pending = []
        totals = sum((own for own, _, _ in books), Totals())
        self._judge(totals, next((last for _, _, last in books if last), None))
        return totals

    def flush(self) -> None:
        """Write the lines that no settling has taken."""
        _append(self.path, self._pending)
        self._pending = []

    def _note(self, faults: Sequence[Fault]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        for fault in faults:
            name = (fault.shard, fault.key, fault.stage)
            if name not in self._named:
                self._named.add(name)
                self._pending.append({"time": now, "rank": self.rank, **asdict(fault)})

    def _judge(self, totals: Totals, last: Fault | None) -> None:
        if last is None:
            return
        where = f"the last one: shard {last.shard}, key {last.key}, {last.stage}: {last.error}"
        what_next = (f"; all are listed in {self.path}" if self.path else "") + (
            f". Look into it with: {self._verify_command(last.shard)}\n"
            "With --exclude it leaves bad samples out of the data set; or repair the shard, or raise data."
        )
        budget, excess = self.budget, len(totals.lost_shards) > self.budget.max_bad_shards
        if excess:
            self.flush()
            raise ShardError(
                f"{len(totals.lost_shards)} shards were lost while they were read, more than "
                f"data.max_bad_shards={budget.max_bad_shards} allows ({', '.join(totals.lost_shards[:8])}); "
                f"{where}{what_next}max_bad_shards"
            )
        seen, bad = totals.seen - totals.bad_in_lost_shards, totals.bad - totals.bad_in_lost_shards
        grace = GRACE_SAMPLES if budget.max_bad_fraction > 0 else 0
        if bad > max(grace, budget.max_bad_fraction * seen):
            self.flush()
            raise ShardError(
                f"{bad:,} of {seen:,} samples could not be used, more than "
                f"data.max_bad_fraction={budget.max_bad_fraction} allows; {where}{what_next}max_bad_fraction"
            )


def _append(path: Path | None, lines: Sequence[dict[str, Any]]) -> None:
    """Add lines that are not in the file yet, by shard, key and stage, in one write."""
    if path is None or not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {_name(json.loads(line)) for line in path.read_text().splitlines()} if path.exists() else set()
    fresh: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in lines:
        if _name(line) not in known:
            fresh.setdefault(_name(line), line)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in fresh.values()))


def _name(line: dict[str, Any]) -> tuple[str, str, str]:
    return line["shard"], line["key"], line["stage"]
