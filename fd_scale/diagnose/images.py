"""Which images is a diagnosis made of, how many, and how do they arrive?

The first ones of a folder of shards, whose order is that of packing, through the view of evaluation. A number
that nobody chose is taken from what the networks cost, so that a diagnosis takes about as long for each.

Shape letters: B images, S pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fd_scale.data.decode import decode
from fd_scale.data.faults import SampleError
from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.manifest import MANIFEST
from fd_scale.data.view import centre_view
from fd_scale.diagnose.subjects import DiagnoseError, Subject
from fd_scale.evaluate.features import CROP_PCT
from fd_scale.run.world import World

PAPERS_IMAGES = 50_000
"""The papers' number: all validation images of ImageNet-1K."""
CPU_FLOP, GPU_FLOP = 1e11, 2e15
"""Of forward passes that a default may spend on one network: some seconds of a few cores, or of a GPU."""
MIN_IMAGES, CPU_IMAGES = 16, 512
"""Fewest, whatever they cost, and most on a CPU."""


@dataclass(frozen=True, eq=False)
class Images:
    """The first ``count`` samples of a shard set, seen by every network at its own size."""

    shards: ShardSet
    count: int
    batch: int = 32
    workers: int = 0
    max_bad_fraction: float = 1e-3

    def batches(self, size: int, world: World) -> Iterator[Tensor]:
        """uint8 (B, 3, S, S) of this process's contiguous share; unreadable samples are left out."""
        return (seen.pixels for seen in self._seen(size, world, labels=False))

    def labelled(self, size: int, world: World) -> Iterator[Seen]:
        """The same with labels. Raises ``ShardError`` where there are none."""
        return self._seen(size, world, labels=True)

    def first(self, count: int) -> Images:
        """The first ``count`` of them, or all where there are fewer."""
        return replace(self, count=min(count, self.count))

    @property
    def facts(self) -> dict[str, object]:
        """What decides which pixels are seen, as JSON."""
        # The fingerprint knows shards by their sizes; the manifest has their SHA-256 where we packed them.
        manifest = hashlib.sha256()
        for part in self.shards.folders:
            manifest.update((part.folder / MANIFEST).read_bytes())
        data = {"data": self.shards.fingerprint, "manifest": manifest.hexdigest()}
        return {**data, "images": self.count, "crop_pct": CROP_PCT}

    def _seen(self, size: int, world: World, *, labels: bool) -> Iterator[Seen]:
        place = self.count * world.rank // world.size
        for batch in evaluation_batches(
            self.shards,
            size=size,
            crop_pct=CROP_PCT,
            batch=self.batch,
            rank=world.rank,
            world_size=world.size,
            labels=labels,
            workers=self.workers,
            max_bad_fraction=self.max_bad_fraction,
            limit=self.count,
        ):
            places = torch.arange(place, place + len(batch))
            place += len(batch)
            if batch.valid.any():
                found = torch.full_like(places, -1) if batch.labels is None else batch.labels
                yield Seen(batch.pixels[size][batch.valid], places[batch.valid], found[batch.valid])


@dataclass(frozen=True, eq=False)
class Seen:
    """Readable samples of a batch."""

    pixels: Tensor
    """uint8 (B, 3, S, S)."""
    places: Tensor
    """int64 (B,): where they stand in the data."""
    labels: Tensor
    """int64 (B,); -1 where they were not asked for."""


def choose(
    shards: ShardSet, asked: int | None, subjects: Iterable[Subject], *, batch: int, workers: int, bad: float
) -> Images:
    """The images of a diagnosis: ``asked`` of them, or as many as the networks can be shown in fair time.

    ``bad`` is the share of samples that may be unreadable. Raises ``DiagnoseError`` for more than there are.
    """
    if asked is not None and asked > shards.num_samples:
        raise DiagnoseError(
            f"--images {asked:,} is more than the {shards.num_samples:,} of the data: give fewer, or --data "
            "with more"
        )
    count = min(default_count(subject) for subject in subjects) if asked is None else asked
    return Images(shards, min(count, shards.num_samples), batch, workers, bad)


def default_count(subject: Subject) -> int:
    """How many images a network is shown when nobody says: by its cost on its device."""
    on_cpu = subject.backbone.device.type == "cpu"
    budget, most = (CPU_FLOP, CPU_IMAGES) if on_cpu else (GPU_FLOP, PAPERS_IMAGES)
    return int(min(max(budget / flop_per_image(subject), MIN_IMAGES), most))


def flop_per_image(subject: Subject) -> float:
    """Of a forward pass, roughly: two per parameter and token of the final map, four times that for a map
    that shrinks on its way."""
    parameters = sum(parameter.numel() for parameter in subject.network.parameters())
    size = subject.backbone.input_size
    final = subject.backbone.tokens(torch.zeros(1, 3, size, size, dtype=torch.uint8)).tokens_BND.shape[1]
    return 2.0 * parameters * final * (1 if size // max(final, 1) ** 0.5 <= 16 else 4)


def has_labels(shards: ShardSet) -> bool:
    """Whether the first sample has a label."""
    shard = int(np.flatnonzero(shards.counts)[0])
    try:
        return shards.read(shard, 0).label is not None
    except SampleError:
        return False


def read_file(path: Path, size: int) -> Tensor:
    """A user's own image through the same view: uint8 (3, S, S), upright. Raises ``DiagnoseError``."""
    try:
        return centre_view(decode(path.read_bytes(), exif="apply"), size=size, crop_pct=CROP_PCT)
    except (OSError, SampleError) as error:
        raise DiagnoseError(f"--image {path} cannot be read: {error}") from None
