"""How does a micro-step grow with its micro-batch? A line through two traces.

What grows with the images and what does not (a position bias, a norm's gradient) are told apart by tracing
two micro-batches; all others follow. At a traced micro-batch the trace itself is given back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fd_scale.plan.ledger import Work
from fd_scale.plan.trace import Networks, Trace


@dataclass(frozen=True)
class Growth:
    """Two traces of one setting, the smaller micro-batch first."""

    small: Trace
    large: Trace

    @classmethod
    def of(
        cls,
        networks: Networks,
        micro_batch: int,
        *,
        recompute: bool,
        keeps_gradients: bool,
        granularity: Mapping[str, Any] | None = None,
    ) -> Growth:
        """Traced at ``micro_batch`` and at a quarter of it (at 1 and 2 when it is 1)."""
        low, high = (max(1, micro_batch // 4), micro_batch) if micro_batch > 1 else (1, 2)
        small, large = (
            networks.trace(
                size, recompute=recompute, keeps_gradients=keeps_gradients, granularity=granularity
            )
            for size in (low, high)
        )
        return cls(small, large)

    def at(self, micro_batch: int) -> Trace:
        """The micro-step of so many images."""
        for trace in (self.small, self.large):
            if trace.micro_batch == micro_batch:
                return trace
        at_peak = self._line(self.small.at_peak, self.large.at_peak, micro_batch)
        share = micro_batch / self.large.micro_batch
        work: Counter[Work] = Counter()
        for item, times in self.large.work.items():
            work[Work(item.phase, round(item.flops * share), round(item.moved_bytes * share))] += times
        return Trace(
            micro_batch=micro_batch,
            kept_bytes=self._line(self.small.kept_bytes, self.large.kept_bytes, micro_batch),
            peak_bytes=sum(at_peak.values()),
            peak_phase=self.large.peak_phase,
            at_peak=at_peak,
            held_after_bytes=self.large.held_after_bytes,
            work=work,
        )

    @property
    def constant_bytes(self) -> int:
        """Of the peak, what does not grow."""
        return max(0, sum(self._line(self.small.at_peak, self.large.at_peak, 0).values()))

    @property
    def bytes_per_image(self) -> float:
        """Of the peak, what each further image adds."""
        images = self.large.micro_batch - self.small.micro_batch
        return (self.large.peak_bytes - self.small.peak_bytes) / images

    def _line(self, low: dict[str, int], high: dict[str, int], micro_batch: int) -> dict[str, int]:
        first, last = self.small.micro_batch, self.large.micro_batch
        share = (micro_batch - first) / (last - first)
        return {
            label: round(low.get(label, 0) + (high.get(label, 0) - low.get(label, 0)) * share)
            for label in {**low, **high}
        }
