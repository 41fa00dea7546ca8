"""What pixels does a list of places in the data set give?

The one path from the plan's samples to a batch, for training and evaluation alike: read, decode, make the
views. Runs in a worker process as well as in the main one, and gives the same bytes in both. Order is the
plan's business, worker processes and the budget for bad samples the loader's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fd_scale.data.decode import Exif, decode
from fd_scale.data.faults import Fault, LabelError, SampleError
from fd_scale.data.index import ShardSet
from fd_scale.data.plan import Samples

Views = Callable[[np.ndarray, np.ndarray], dict[int, Tensor]]
"""Decoded image (H, W, 3) and the sample's key -> uint8 (3, size, size) by size; must pickle."""


@dataclass(frozen=True)
class Batch:
    """Samples of a micro-batch, in the order of the plan."""

    pixels: dict[int, Tensor]
    """By input size: uint8 (B, 3, size, size); all sizes show the same crops. Zeros where not valid."""
    valid: Tensor
    """bool (B,): false for a sample that could not be used; it has no part in the loss."""
    keys: list[str]
    labels: Tensor | None = None
    """int64 (B,), -1 where not valid; ``None`` when labels were not asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a copy to a GPU can overlap with work on it."""
        pixels = {size: pixels.pin_memory() for size, pixels in self.pixels.items()}
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, pixels=pixels, valid=self.valid.pin_memory(), labels=labels)


def read_batch(
    shards: ShardSet, samples: Samples, views: Views, sizes: Sequence[int], *, labels: bool, exif: Exif
) -> tuple[Batch, list[Fault]]:
    """Read, decode and crop; a sample that cannot be used is a row of zeros that is not valid, and a fault.

    Raises ``ShardError`` when a table of offsets cannot be used, since then not even the key of a sample is
    known.
    """
    count = len(samples)
    pixels = {size: torch.zeros(count, 3, size, size, dtype=torch.uint8) for size in sizes}
    valid = torch.zeros(count, dtype=torch.bool)
    label_B = torch.full((count,), -1, dtype=torch.int64)
    keys: list[str] = []
    faults: list[Fault] = []
    places = zip(samples.shard.tolist(), samples.index.tolist(), samples.key, strict=True)
    for row, (shard, index, seed) in enumerate(places):
        keys.append(shards.key(shard, index))
        try:
            sample = shards.read(shard, index, label=labels)
            if labels and sample.label is None:
                raise LabelError("the sample has no label: neither a .cls nor a .json with a label")
            made = views(decode(sample.image, exif=exif), seed)
        except SampleError as error:
            name = shards.names[shard]
            faults.append(Fault(samples.epoch, samples.step, name, keys[-1], error.stage, str(error)))
            continue
        for size, view in made.items():
            pixels[size][row] = view
        valid[row] = True
        if sample.label is not None:
            label_B[row] = sample.label
    return Batch(pixels, valid, keys, label_B if labels else None), faults
