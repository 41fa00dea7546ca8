"""What do kNN and the fast linear probe work on? Frozen features of every labelled image, computed once.

One pass over a labelled shard set through the view of evaluation, kept in memory and, where a folder is
given, on disk under the fingerprints of network and data. What is concluded from them is for the tasks.

Shape letters: N images, D channels.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.manifest import MANIFEST
from fd_scale.errors import UserError
from fd_scale.evaluate.backbone import Backbone

CROP_PCT = 224 / 256
"""Share of the resized image's side that the central crop keeps: resize 256, crop 224 (DINO's protocol)."""

VERSION = 2
"""Part of a cached file's name: raised when a change here would alter what is in it."""


class EvaluationError(UserError):
    """An evaluation that cannot be made of these data: no labels, too few images, one class."""


class LabelledBatch(Protocol):
    """What is needed of a batch; ``fd_scale.data.reader.Batch`` is one."""

    @property
    def pixels(self) -> Mapping[int, Tensor]:
        """By input size: uint8 (B, 3, S, S)."""

    @property
    def labels(self) -> Tensor | None:
        """int64 (B,)."""

    @property
    def valid(self) -> Tensor:
        """bool (B,)."""


@dataclass(frozen=True, eq=False)
class LabelledFeatures:
    """Pooled features of a data set, in its order, without the samples that could not be read."""

    model: str
    pooled: dict[str, Tensor]
    """float32 (N, D) on the CPU, by kind of pooling."""
    labels: Tensor
    """int64 (N,)."""
    num_left_out: int
    """Samples that could not be read."""
    facts: dict[str, Any]
    """What decided them: fingerprints of network and data, size and crop; goes into results."""

    def __len__(self) -> int:
        return len(self.labels)


def of_shards(
    backbone: Backbone,
    shards: ShardSet,
    *,
    crop_pct: float = CROP_PCT,
    batch: int = 256,
    workers: int = 0,
    cache: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> LabelledFeatures:
    """Features of a labelled shard set: short side to size / ``crop_pct``, central square; of several
    processes each has its own contiguous part (``together`` makes the whole).

    With ``cache``, a folder, features of the same network, data and crop are read from it, or kept there.
    Raises ``ShardError`` for shards without labels and for more unreadable samples than is borne.
    """
    facts = {
        "network": backbone.fingerprint,
        "data": shards.fingerprint,
        "input_size": backbone.input_size,
        "crop_pct": crop_pct,
    }
    part = f"-{rank}of{world_size}" if world_size > 1 else ""
    kept = None if cache is None else cache / f"{_identity(facts, shards)}{part}.safetensors"
    if kept is not None and kept.is_file():
        return _read(kept, backbone.name, facts)
    batches = evaluation_batches(
        shards,
        size=backbone.input_size,
        crop_pct=crop_pct,
        batch=batch,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )
    features = extract(backbone, batches, facts)
    if kept is not None:
        _write(kept, features)
    return features


def extract(
    backbone: Backbone, batches: Iterable[LabelledBatch], facts: Mapping[str, Any] | None = None
) -> LabelledFeatures:
    """Pooled features of all valid samples of ``batches``, which hold pixels of the backbone's input size.

    Raises ``EvaluationError`` when there are no labels or no valid sample.
    """
    parts: list[dict[str, Tensor]] = []
    labels: list[Tensor] = []
    num_left_out = 0
    for batch in batches:
        if batch.labels is None:
            raise EvaluationError(
                "the samples have no labels, and kNN and linear probes need them: pack images from one "
                "folder per class (fd-scale shards pack)"
            )
        pooled = backbone.pooled(batch.pixels[backbone.input_size])
        valid = batch.valid.cpu()
        parts.append({kind: values.float().cpu()[valid] for kind, values in pooled.items()})
        labels.append(batch.labels.cpu()[valid])
        num_left_out += int((~valid).sum())
    if not sum(len(part) for part in labels):
        raise EvaluationError(f"there is no readable labelled sample to evaluate {backbone.name} on")
    together = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
    _check_finite(backbone.name, together)
    return LabelledFeatures(backbone.name, together, torch.cat(labels), num_left_out, dict(facts or {}))


def together(parts: Sequence[LabelledFeatures]) -> LabelledFeatures:
    """The whole of a data set from the parts of all processes, in rank order."""
    first = parts[0]
    pooled = {kind: torch.cat([part.pooled[kind] for part in parts]) for kind in first.pooled}
    labels = torch.cat([part.labels for part in parts])
    return LabelledFeatures(
        first.model, pooled, labels, sum(part.num_left_out for part in parts), first.facts
    )


def common_classes(train: Tensor, test: Tensor) -> int:
    """How many classes there are by the labels (N,) and (M,): one more than the largest of ``train``.

    Raises ``EvaluationError`` for a negative label, fewer than two classes to learn, and test labels that
    ``train`` has no example of.
    """
    known, asked = set(train.unique().tolist()), set(test.unique().tolist())
    if min(known | asked) < 0:
        raise EvaluationError(f"label {min(known | asked)} is negative; labels count from 0")
    if len(known) < 2:
        raise EvaluationError(f"all {len(train)} training samples have label {known.pop()}: nothing to tell")
    if strangers := sorted(asked - known):
        raise EvaluationError(
            f"{len(strangers)} labels of the test set do not occur in the training set ({strangers[:5]}): "
            "are they shards of the same classes?"
        )
    return max(known) + 1


def standard_error(accuracy: float, num_images: int) -> float:
    """The binomial standard error of an accuracy over so many images, both in [0, 1]."""
    return math.sqrt(accuracy * (1 - accuracy) / num_images)


def _check_finite(model: str, pooled: Mapping[str, Tensor]) -> None:
    for kind, values in pooled.items():
        wrong = int((~values.isfinite().all(dim=1)).sum())
        if wrong:
            raise EvaluationError(
                f"{model} gives {wrong} of {len(values)} images {kind} features that are not finite: its "
                "weights are damaged or it diverged"
            )


def data_record(shards: ShardSet) -> dict[str, Any]:
    """What a record of an evaluation says of a shard set: its size, and a digest of its manifest, which holds
    the SHA-256 of tars that this package wrote."""
    digest = hashlib.sha256()
    for folder in _folders(shards):
        digest.update((folder / MANIFEST).read_bytes())
    return {"num_samples": shards.num_samples, "sha256": digest.hexdigest()}


def check_classes(train: ShardSet, test: ShardSet) -> None:
    """Raise ``EvaluationError`` where both sets name their classes, and not the same ones in one order."""
    if train.classes is None or test.classes is None or train.classes == test.classes:
        return
    if len(train.classes) != len(test.classes):
        raise EvaluationError(
            f"the training shards have {len(train.classes)} classes and the test shards "
            f"{len(test.classes)}: pack both from folders of the same classes"
        )
    number, (known, asked) = next(
        (n, pair)
        for n, pair in enumerate(zip(train.classes, test.classes, strict=True))
        if len(set(pair)) > 1
    )
    raise EvaluationError(
        f"label {number} is {known!r} in the training shards and {asked!r} in the test shards: pack both "
        "from folders of the same classes"
    )


def _folders(shards: ShardSet) -> list[Path]:
    return [folder.folder.resolve() for folder in shards.folders]


def _identity(facts: Mapping[str, Any], shards: ShardSet) -> str:
    """Hex digits that no other network, data set or crop has.

    The fingerprint of the data does not suffice: it knows the sizes of shards, and small tars are often of
    equal size. The manifest holds their SHA-256 where this package wrote them, else the folder must do.
    """
    folders = _folders(shards)
    identity = {"version": VERSION, "folders": [str(folder) for folder in folders], **facts}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for folder in folders:
        digest.update((folder / MANIFEST).read_bytes())
    return digest.hexdigest()[:16]


def _write(path: Path, features: LabelledFeatures) -> None:
    """Under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    tensors = {kind: values.contiguous() for kind, values in features.pooled.items()}
    save_file(
        {**tensors, "labels": features.labels},
        partial,
        metadata={"num_left_out": str(features.num_left_out)},
    )
    partial.replace(path)


def _read(path: Path, model: str, facts: dict[str, Any]) -> LabelledFeatures:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        num_left_out = int(file.metadata()["num_left_out"])
    labels = tensors.pop("labels")
    return LabelledFeatures(model, tensors, labels, num_left_out, facts)
