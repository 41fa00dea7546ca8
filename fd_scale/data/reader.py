"""What pixels does a list of places in the data set give?

The one path from the plan's samples to a batch, for training and evaluation alike: read, decode, make the
views. Runs in a worker process as well as in the main one, and gives the same bytes in both. Order is the
plan's business, worker processes and the budget for bad samples the loader's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from fd_scale.data.color import NUM_PARAMETERS
from fd_scale.data.decode import Exif, Picture, read
from fd_scale.data.faults import Fault, LabelError, SampleError
from fd_scale.data.index import RawSample, ShardSet
from fd_scale.data.jpeg import Decoder
from fd_scale.data.plan import Samples

Views = Callable[[Picture, np.ndarray, Sequence[int]], dict[int, Tensor]]
"""Picture, the sample's key, sizes -> uint8 (3, size, size) by size; must pickle."""
Colors = Callable[[np.ndarray], np.ndarray]
"""The sample's key -> float32 (``color.NUM_PARAMETERS``,); must pickle."""
Sizes = Callable[[int], Sequence[int]]
"""Running global step -> the input sizes of its views, pixels; must pickle."""


@dataclass(frozen=True)
class Batch:
    """Samples of a micro-batch, in the order of the plan."""

    pixels: dict[int, Tensor]
    """By input size: uint8 (B, 3, size, size), channels last in memory; all sizes show the same crops. Zeros
    where not valid."""
    valid: Tensor
    """bool (B,): false for a sample that could not be used; it has no part in the loss."""
    keys: list[str]
    labels: Tensor | None = None
    """int64 (B,), -1 where not valid; ``None`` when labels were not asked for."""
    colors: Tensor | None = None
    """float32 (B, ``color.NUM_PARAMETERS``) for ``color.apply``; ``None`` where no colours are changed."""

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a copy to a GPU can overlap with work on it."""
        return replace(
            self,
            pixels={size: pixels.pin_memory() for size, pixels in self.pixels.items()},
            valid=self.valid.pin_memory(),
            labels=None if self.labels is None else self.labels.pin_memory(),
            colors=None if self.colors is None else self.colors.pin_memory(),
        )


def joined(parts: Sequence[Batch]) -> Batch:
    """Batches end to end."""
    first = parts[0]
    return Batch(
        pixels={size: torch.cat([part.pixels[size] for part in parts]) for size in first.pixels},
        valid=torch.cat([part.valid for part in parts]),
        keys=[key for part in parts for key in part.keys],
        labels=_joined([part.labels for part in parts]),
        colors=_joined([part.colors for part in parts]),
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None


@dataclass(frozen=True)
class Wanted:
    """What is made of every sample."""

    views: Views
    sizes: Sizes
    exif: Exif
    decoder: Decoder
    labels: bool = False
    colors: Colors | None = None


def read_batch(
    shards: ShardSet,
    samples: Samples,
    wanted: Wanted,
    note: Callable[[int, int], None] = lambda shard, index: None,
) -> tuple[Batch, list[Fault]]:
    """Read, decode and crop; a sample that cannot be used is a row of zeros that is not valid, and a fault.

    ``note`` is told (shard, index) of every sample before it is read. Raises ``ShardError`` when a table of
    offsets cannot be used, since then not even the key of a sample is known.
    """
    count, sizes = len(samples), wanted.sizes(samples.step)
    # Channels last is how pictures are decoded and resampled: a row is then one copy of memory.
    pixels = {size: _black(count, size, size, 3) for size in sizes}
    valid = torch.zeros(count, dtype=torch.bool)
    labels = torch.full((count,), -1, dtype=torch.int64) if wanted.labels else None
    colors = torch.zeros(count, NUM_PARAMETERS) if wanted.colors else None
    keys: list[str] = []
    faults: list[Fault] = []
    places = zip(samples.shard.tolist(), samples.index.tolist(), samples.key, strict=True)
    for row, (shard, index, seed) in enumerate(places):
        note(shard, index)
        try:
            sample = shards.read(shard, index, label=wanted.labels)
            picture = read(sample.image, exif=wanted.exif, decoder=wanted.decoder)
            made = wanted.views(picture, seed, sizes)
            label = _label(sample) if wanted.labels else -1
        except SampleError as error:
            key, epoch = shards.key(shard, index), int(samples.epoch[row])
            faults.append(Fault(epoch, samples.step, shards.names[shard], key, error.stage, str(error)))
            keys.append(key)
            continue
        keys.append(sample.key)
        valid[row] = True
        for size, view in made.items():
            pixels[size][row] = view.permute(1, 2, 0)
        if labels is not None:
            labels[row] = label
        if colors is not None and wanted.colors is not None:
            colors[row] = torch.from_numpy(wanted.colors(seed))
    planes = {size: rows.permute(0, 3, 1, 2) for size, rows in pixels.items()}
    return Batch(planes, valid, keys, labels, colors), faults


def _black(*shape: int) -> Tensor:
    """uint8 zeros; in a worker in shared memory, through which batches travel: a copy is spared."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)


def _label(sample: RawSample) -> int:
    if sample.label is None:
        raise LabelError("the sample has no label: neither a .cls nor a .json with a label")
    return sample.label
