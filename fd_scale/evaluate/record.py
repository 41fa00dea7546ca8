"""What exactly was measured? One JSON per evaluation, and when two of them may stand in one table.

A record holds everything that decides its numbers, in three parts: the network (by the SHA-256 of its
weights), the protocol (all that a person chose), and the data (by their fingerprints). Two records compare
when task, protocol and data are the same; the network is what is compared. How they are shown is the business
of ``suite.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from fd_scale.errors import UserError
from fd_scale.evaluate.features import standard_error
from fd_scale.run.folder import as_json, write_atomically

FORMAT = 1
ONE_SEED_STD = 0.0008
"""Standard deviation over seeds that is assumed of a trained task with a single seed: MAE's four seeds of
fine-tuning on ImageNet-1K had 83.63, 83.66, 83.52 and 83.46."""


class RecordError(UserError):
    """A record that cannot be read, or two that must not be compared."""


@dataclass(frozen=True)
class Record:
    """One evaluation of one network, over one or more seeds."""

    task: str
    """``knn``, ``linear_fast``, ``linear``, ``finetune``, ``zeroshot``, ``retrieval``."""
    model: str
    feature: str
    """What the task read: ``cls``, ``gap``, or the head's input."""
    network: Mapping[str, Any]
    """The backbone's fingerprint."""
    protocol: Mapping[str, Any]
    """All that was chosen: equal for what may be compared."""
    data: Mapping[str, Any]
    """Fingerprints of the data by role (``train``, ``test``)."""
    metrics: Mapping[str, Sequence[float]]
    """By name, one value per seed; accuracies in [0, 1]."""
    headline: str
    """The name of the metric that goes into tables."""
    num_test: int
    seeds: Sequence[int] = (0,)
    trained: bool = False
    """Whether chance has a part in the result beyond the choice of test images."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What follows from the protocol or is of interest: effective learning rates, samples left out, both
    normalisations."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    wall_s: float = math.nan

    @property
    def values(self) -> Sequence[float]:
        """The headline, one value per seed."""
        return self.metrics[self.headline]

    @property
    def mean(self) -> float:
        """Of the headline over the seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        """Of the headline over the seeds, with n - 1; None for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def uncertainty(self) -> float:
        """One standard error of the mean, by what is known.

        Over two and more seeds it is theirs. Otherwise it is the binomial one of the choice of test images,
        and for a trained task not below ``ONE_SEED_STD``.
        """
        if self.std is not None and self.trained:
            return self.std / math.sqrt(len(self.values))
        binomial = standard_error(self.mean, self.num_test)
        return max(binomial, ONE_SEED_STD) if self.trained else binomial

    @property
    def protocol_hash(self) -> str:
        """Eight hex digits of task, feature and protocol."""
        return _hash({"task": self.task, "feature": self.feature, "protocol": self.protocol})

    @property
    def data_hash(self) -> str:
        """Eight hex digits of the data."""
        return _hash(self.data)

    @property
    def weights_sha256(self) -> str:
        """Of the network's tensors."""
        return str(self.network.get("sha256", ""))

    @property
    def file_name(self) -> str:
        """A name that no other evaluation has."""
        parts = [self.protocol_hash, self.data_hash, self.network, list(self.seeds), self.headline]
        identity = _hash(parts)
        model = "".join(c if c.isalnum() or c in "-_.@" else "_" for c in self.model)
        return f"{self.task}-{self.feature}-{model}-{identity}.json"

    def to_json(self) -> str:
        """The record form: all fields, and what follows from them."""
        derived = {
            "format": FORMAT,
            "mean": self.mean,
            "std": self.std,
            "uncertainty": self.uncertainty,
            "protocol_hash": self.protocol_hash,
            "data_hash": self.data_hash,
            "weights_sha256": self.weights_sha256,
        }
        wall_s = self.wall_s if math.isfinite(self.wall_s) else None
        return as_json(derived | asdict(self) | {"wall_s": wall_s})


def write(record: Record, folder: Path) -> Path:
    """Write a record into ``folder``, which is made at need; an equal evaluation replaces the former."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / record.file_name
    write_atomically(path, record.to_json())
    return path


def write_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """``write`` each of them."""
    return [write(record, folder) for record in records]


def read(path: Path) -> Record:
    """The record in a file; raises ``RecordError`` for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise RecordError(f"{path} has format {values['format']}; this version reads {FORMAT}")
        known = {name: values[name] for name in Record.__dataclass_fields__}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is no record of an evaluation ({type(error).__name__}: {error})") from None
    return Record(**known | {"wall_s": math.nan if known["wall_s"] is None else known["wall_s"]})


def over_seeds(records: Sequence[Record]) -> Record:
    """One record of evaluations that differ in their seeds alone. Raises ``RecordError`` for others."""
    first = records[0]
    for other in records[1:]:
        if lines := differences(first, replace(other, seeds=first.seeds)):
            raise RecordError("these are not seeds of one evaluation:\n  " + "\n  ".join(lines))
    return replace(
        first,
        seeds=[seed for record in records for seed in record.seeds],
        metrics={name: [v for r in records for v in r.metrics[name]] for name in first.metrics},
        wall_s=sum(record.wall_s for record in records),
    )


def table(records: Sequence[Record]) -> Table:
    """One line per record, for the console."""
    grid = Table("model", "task", "feature", "metric", "%", "+-", box=None)
    for column in grid.columns[-2:]:
        column.justify = "right"
    for record in records:
        for name, values in record.metrics.items():
            mean = 100 * sum(values) / len(values)
            error = f"{100 * record.uncertainty:.2f}" if name == record.headline else ""
            grid.add_row(record.model, record.task, record.feature, name, f"{mean:.2f}", error)
    return grid


def differences(first: Record, second: Record) -> list[str]:
    """What keeps two records from being compared, one line each; empty where they may be."""
    lines = []
    for part in ("task", "feature", "protocol", "data", "seeds"):
        before, after = (_flat(_plain(getattr(record, part)), part) for record in (first, second))
        names = sorted(before.keys() | after.keys())
        lines += [
            f"{name}: {before.get(name, 'absent')!r} of {first.model}, {after.get(name, 'absent')!r} of "
            f"{second.model}"
            for name in names
            if before.get(name, "absent") != after.get(name, "absent")
        ]
    return lines


def change(before: Record, after: Record) -> tuple[float, float]:
    """``after`` minus ``before``, and its noise: two standard errors of a difference.

    Raises ``RecordError`` for records that are not comparable.
    """
    if lines := differences(before, after):
        raise RecordError("these evaluations cannot be compared:\n  " + "\n  ".join(lines))
    return after.mean - before.mean, 2 * math.hypot(before.uncertainty, after.uncertainty)


def _plain(value: Any) -> Any:
    """As JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(value))


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= _flat(part, f"{prefix}.{key}")
    return flat


def _hash(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
