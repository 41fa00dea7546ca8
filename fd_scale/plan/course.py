"""What comes and goes in the course of a micro-step, and so what any number of images would take?

One trace answers for all micro-batches. It is made with so many images, a prime number that no other size is
a multiple of, that each storage and each operation shows whether it grows with them; the fullest moment is
then looked for at the micro-batch that is asked for, and may be another one for few images than for many.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fd_scale.plan.ledger import Ledger, Work

MANY = 997
"""Images of a trace that answers for others."""


@dataclass(frozen=True)
class Trace:
    """One micro-step of ``micro_batch`` images."""

    micro_batch: int
    kept_bytes: dict[str, int]
    """Held when the forward pass ends, by the part that made it: what the backward pass needs."""
    peak_bytes: int
    peak_phase: str
    at_peak: dict[str, int]
    """The composition of the peak, by label; sums to ``peak_bytes``."""
    at_teacher_peak: dict[str, int]
    """The composition of the fullest moment while the teacher runs."""
    held_after_bytes: int
    """Held when the micro-step ends (gradients, where the engine leaves them)."""
    work: dict[Work, int]
    """Operations by cost, with how often each occurs."""
    sharded: bool = False
    """Whether gathered weights and reductions are part of it."""

    def flops(self, *phases: str) -> int:
        """Floating-point operations of these phases, of all by default; a multiply-add is two."""
        return sum(w.flops * n for w, n in self.work.items() if not phases or w.phase in phases)

    @property
    def num_kernels(self) -> int:
        """Operations that run on the device."""
        return sum(self.work.values())


@dataclass(frozen=True, eq=False)
class Course:
    """One micro-step of ``images`` images, storage by storage."""

    images: int
    names: Sequence[str]
    """Labels of storages."""
    labels: np.ndarray[Any, np.dtype[np.int64]]
    """Of each storage that comes or goes, which of the ``names``."""
    sizes: np.ndarray[Any, np.dtype[np.int64]]
    """Its bytes, negative where it goes."""
    phases: Sequence[tuple[int, str]]
    """What has happened before a phase begins, and its name."""
    taught: int
    """What has happened when the teacher is done."""
    forwarded: int
    """What has happened when the student's forward pass is done."""
    work: Mapping[Work, int]
    sharded: bool

    @classmethod
    def of(cls, ledger: Ledger, *, taught: int, forwarded: int, sharded: bool) -> Course:
        """What a ledger has seen."""
        names = sorted({label for label, _ in ledger.history})
        number = {name: index for index, name in enumerate(names)}
        return cls(
            images=ledger.images,
            names=names,
            labels=np.array([number[label] for label, _ in ledger.history], np.int64),
            sizes=np.array([size for _, size in ledger.history], np.int64),
            phases=tuple(ledger.phases),
            taught=taught,
            forwarded=forwarded,
            work=dict(ledger.work),
            sharded=sharded,
        )

    def at(self, micro_batch: int) -> Trace:
        """The micro-step of so many images."""
        sizes = self._sizes(micro_batch)
        live = sizes.cumsum()
        peak, taught = int(live.argmax()), int(live[: self.taught].argmax())
        phase = bisect.bisect(self.phases, peak, key=lambda start: start[0]) - 1
        return Trace(
            micro_batch=micro_batch,
            kept_bytes=self._holding(sizes, self.forwarded),
            peak_bytes=int(live[peak]),
            peak_phase=self.phases[phase][1],
            at_peak=self._holding(sizes, peak + 1),
            at_teacher_peak=self._holding(sizes, taught + 1),
            held_after_bytes=int(live[-1]),
            work=self._work(micro_batch),
            sharded=self.sharded,
        )

    def bytes_per_image(self, micro_batch: int) -> int:
        """What one more image adds to the peak of so many."""
        sizes = self._sizes(micro_batch)
        peak = int(sizes.cumsum().argmax()) + 1
        return int(self._sizes(micro_batch + 1)[:peak].sum() - sizes[:peak].sum())

    def _sizes(self, micro_batch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        grows = self.sizes % self.images == 0
        return np.where(grows, self.sizes // self.images * micro_batch, self.sizes)

    def _holding(self, sizes: np.ndarray[Any, np.dtype[np.int64]], count: int) -> dict[str, int]:
        """By label, after the first ``count`` have come or gone."""
        # float64 counts bytes exactly up to 8 PiB.
        held = np.bincount(self.labels[:count], weights=sizes[:count], minlength=len(self.names))
        return {name: int(size) for name, size in zip(self.names, held, strict=True) if size}

    def _work(self, micro_batch: int) -> dict[Work, int]:
        found: Counter[Work] = Counter()
        for item, times in self.work.items():
            flops = _grown(item.flops, self.images, micro_batch)
            moving = _grown(item.moved_bytes - item.fixed_bytes, self.images, micro_batch)
            found[Work(item.phase, flops, item.fixed_bytes + moving, item.fixed_bytes)] += times
        return dict(found)


def _grown(number: int, images: int, micro_batch: int) -> int:
    return number if number % images else number // images * micro_batch
