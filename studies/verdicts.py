"""Is one row better than another, and can these numbers tell? Differences, their noise, and a word for them.

A row is a setting with one or more runs (distillations from different seeds), each measured several times
(fine-tunings from different seeds) on the same test images. Fine-tuning seeds and test images are shared by
all rows, so that differences are paired over them. Three things are noise, and their variances are added:

- the choice of test images: the standard error of the per-image difference over images;
- the choice of labelled images, order and head: that of the difference over fine-tuning seeds;
- the luck of a run: its variance, pooled over all rows with several runs, divided by the number of runs.

Part of the first is in the second and third as well, so that the sum is rather too large. A difference is
resolved beyond two standard errors, or more where few seeds make the error itself uncertain: beyond the
97.5 % quantile of Student's t, with degrees of freedom by Satterthwaite's formula. A row that is one given
network, such as the teacher that all rows come from, has no luck of a run: what is said then holds for that
network.

Shape letters: R runs, F measurements of a run, N test images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy import stats

Verdict = Literal["same direction", "unresolved", "opposite"]
NUM_ERRORS = 2.0
"""Standard errors that a difference must exceed at the least."""
QUANTILE = 0.975


@dataclass(frozen=True)
class Entry:
    """One measurement."""

    value: float
    """An accuracy in [0, 1], or another number, for which more is what the papers claim."""
    predictions: str = ""
    """A character per test image, where there are any."""
    is_share: bool = True
    """Whether the value is an accuracy."""


@dataclass(frozen=True)
class Row:
    """A setting: its runs, and what was measured of each."""

    name: str
    measures: Mapping[str, Sequence[Sequence[Entry]]]
    """By name: runs, each with its measurements."""
    given: bool = False
    """Whether it is one given network rather than the outcome of seeds."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Seconds, images, learning rates, whatever explains it."""

    def is_share(self, measure: str) -> bool:
        """Whether it is an accuracy in [0, 1], which tables show in per cent."""
        return all(entry.is_share for run in self.measures[measure] for entry in run)

    def values(self, measure: str) -> np.ndarray:
        """(R, F)."""
        return np.array([[entry.value for entry in run] for run in self.measures[measure]])


@dataclass(frozen=True)
class Contrast:
    """One row against another by one measure."""

    first: str
    second: str
    measure: str
    difference: float
    """First minus second."""
    error: float
    """Its standard error."""
    parts: Mapping[str, float]
    """The three standard errors."""
    freedom: float
    """Degrees of freedom of the error."""

    @property
    def noise(self) -> float:
        """What a difference must exceed to be resolved."""
        if self.error == 0:
            return 0.0
        return self.error * max(NUM_ERRORS, float(stats.t.ppf(QUANTILE, self.freedom)))

    @property
    def verdict(self) -> Verdict:
        """Whether the first is ahead, as the papers say, beyond noise."""
        if abs(self.difference) <= self.noise:
            return "unresolved"
        return "same direction" if self.difference > 0 else "opposite"


def contrast(first: Row, second: Row, measure: str, labels: str, luck: tuple[float, int]) -> Contrast:
    """``labels`` are the right characters; ``luck`` is ``pooled_variance`` of whatever is known.

    Raises ``ValueError`` for rows that were measured a different number of times.
    """
    values = first.values(measure), second.values(measure)
    if values[0].shape[1] != values[1].shape[1]:
        raise ValueError(
            f"{first.name} and {second.name} have {values[0].shape[1]} and {values[1].shape[1]} "
            f"measurements a run by {measure}: they cannot be paired"
        )
    by_seed_F = values[0].mean(0) - values[1].mean(0)
    runs = sum(luck[0] / len(row.measures[measure]) for row in (first, second) if not row.given)
    parts = {
        "test images": _image_error(first, second, measure, labels),
        "fine-tuning seeds": _standard_error(by_seed_F),
        "runs": math.sqrt(runs),
    }
    freedoms = {"test images": len(labels) - 1, "fine-tuning seeds": len(by_seed_F) - 1, "runs": luck[1]}
    error = math.sqrt(sum(part**2 for part in parts.values()))
    # Satterthwaite: the degrees of freedom of a sum of variances of which each has its own.
    uncertain = sum(part**4 / freedoms[name] for name, part in parts.items() if part > 0)
    freedom = error**4 / uncertain if uncertain else 1.0
    return Contrast(first.name, second.name, measure, float(by_seed_F.mean()), error, parts, freedom)


def pooled_variance(rows: Sequence[Row], measure: str) -> tuple[float, int]:
    """Variance of a run's mean over its measurements, and its degrees of freedom; (0, 0) without two runs of
    any row."""
    squares, freedom = 0.0, 0
    for row in rows:
        if row.given or measure not in row.measures:
            continue
        means_R = row.values(measure).mean(1)
        squares += float(((means_R - means_R.mean()) ** 2).sum())
        freedom += len(means_R) - 1
    return (squares / freedom, freedom) if freedom else (0.0, 0)


def contrasts(rows: Sequence[Row], pairs: Sequence[tuple[str, str]], labels: str) -> list[Contrast]:
    """All pairs by all measures that both have, with the variance of runs pooled over all rows."""
    known = {row.name: row for row in rows}
    return [
        contrast(known[first], known[second], measure, labels, pooled_variance(rows, measure))
        for first, second in pairs
        for measure in known[first].measures
        if measure in known[second].measures
    ]


def alike(rows: Sequence[Row], labels: str) -> list[Contrast]:
    """The first run of each row against its second: two seeds of one setting, which should be unresolved.

    The luck of a run is taken from the other rows alone: a pair's own would excuse any difference.
    """
    found = []
    for row in rows:
        others = [other for other in rows if other is not row]
        for measure, runs in row.measures.items():
            luck = pooled_variance(others, measure)
            if len(runs) < 2 or not luck[1]:
                continue
            one, other = (Row(f"{row.name}, seed {n}", {measure: [runs[n]]}) for n in (0, 1))
            found.append(contrast(one, other, measure, labels, luck))
    return found


def _image_error(first: Row, second: Row, measure: str, labels: str) -> float:
    right = [_right(row, measure, labels) for row in (first, second)]
    if any(part is None for part in right):
        return 0.0
    return _standard_error(right[0] - right[1])  # type: ignore[operator]


def _right(row: Row, measure: str, labels: str) -> np.ndarray | None:
    """(N,) shares of the row's measurements that are right about an image; None without predictions."""
    told = [entry.predictions for run in row.measures[measure] for entry in run]
    if not all(told):
        return None
    truth_N = np.frombuffer(labels.encode(), np.uint8)
    return np.mean([np.frombuffer(one.encode(), np.uint8) == truth_N for one in told], axis=0)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
