"""How often is the right class first, or among the first five? Exact over any number of processes.

Every process has its own part of the images, and none is counted twice. Where parameters are sharded, all
processes must call the network equally often: those that run out of images call it on a grey one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.evaluate.features import EvaluationError
from fd_scale.run.world import World

Predict = Callable[[Tensor], Tensor]
"""uint8 pixels (B, 3, S, S) on the device to logits (B, C)."""


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1] of the images that could be read."""

    top1: float
    top5: float | None
    """None where there are fewer than five classes to be among."""
    num_images: int
    num_left_out: int

    @property
    def metrics(self) -> dict[str, list[float]]:
        """By name, as records hold them."""
        return {"top1": [self.top1]} | ({} if self.top5 is None else {"top5": [self.top5]})


@torch.no_grad()
def measure(
    predict: Predict,
    shards: ShardSet,
    world: World,
    *,
    size: int,
    crop_pct: float,
    batch: int,
    workers: int = 0,
    beat: Callable[[str], None] | None = None,
) -> Accuracy:
    """Accuracy on all of ``shards``, of views of ``size`` pixels; ``beat`` is called after every batch.
    Collective.

    Raises ``EvaluationError`` where no sample can be read, and for a label that there is no logit for.
    """
    batches = evaluation_batches(
        shards,
        size=size,
        crop_pct=crop_pct,
        batch=batch,
        rank=world.rank,
        world_size=world.size,
        workers=workers,
    )
    counts = torch.zeros(5, dtype=torch.int64)
    done = 0
    for part in batches:
        logits_BC = predict(part.pixels[size].to(world.device)).float().cpu()
        done += 1
        if beat is not None:
            beat(f"batch {done} of a measurement")
        valid = part.valid
        labels = torch.as_tensor(part.labels)[valid]
        hits = _hits(logits_BC[valid], labels)
        among_five = len(labels) if logits_BC.shape[1] >= 5 else 0
        counts += torch.tensor([*hits, among_five, len(labels), int((~valid).sum())])
    share = -(-shards.num_samples // world.size)
    for _ in range(math.ceil(share / batch) - done):
        predict(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=world.device))
    first, five, among_five, images, left_out = torch.stack(world.gather(counts)).sum(0).tolist()
    if not images:
        raise EvaluationError(f"none of the {left_out} samples could be read")
    return Accuracy(first / images, five / images if among_five else None, images, left_out)


def _hits(logits_BC: Tensor, labels_B: Tensor) -> tuple[int, int]:
    num_classes = logits_BC.shape[1]
    if len(labels_B) and not 0 <= int(labels_B.min()) <= int(labels_B.max()) < num_classes:
        raise EvaluationError(
            f"labels from {int(labels_B.min())} to {int(labels_B.max())} were met, and there are logits for "
            f"{num_classes} classes: are these shards of the same classes?"
        )
    right_B5 = logits_BC.topk(min(5, num_classes), dim=1).indices == labels_B[:, None]
    return int(right_B5[:, 0].sum()), int(right_B5.sum())
