"""How did the student come to be what it is? Its checkpoints, set against the last one.

Step 0 is made again from the recipe's seed. Checkpoints that the run did not keep cannot be shown; how many
it keeps is the recipe's (``run.keep_last``, ``run.keep_every_steps``).

Shape letters: n images, B images of a batch, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import evenly_spaced
from fd_scale.diagnose.similarity import cka
from fd_scale.diagnose.subjects import Run, Subject, student_of
from fd_scale.engine.checkpoint import committed
from fd_scale.evaluate.backbone import GAP, pool

MAX_CHECKPOINTS = 12
"""More are thinned out evenly."""


@dataclass(frozen=True)
class Drift:
    """Per checkpoint, by rising step."""

    steps: Sequence[int]
    weight_distance: Sequence[float]
    """Length of the difference from the last checkpoint's backbone, relative to the length of that."""
    cka_to_last: Sequence[float]
    """Similarity (``similarity.cka``) of mean patches with the last checkpoint's."""
    loss: Sequence[float]
    """The run's distillation loss on these images, centre view; empty without a teacher."""
    num_images: int


def drift(
    run: Run,
    batches: Sequence[dict[int, Tensor]],
    device: torch.device,
    *,
    on_checkpoint: Callable[[int], None] = lambda _: None,
) -> Drift:
    """Look at every kept checkpoint up to the diagnosed one; ``batches`` are uint8 pixels on
    the device, by input size; ``on_checkpoint`` hears how many are done."""
    kept = [found for found in committed(run.folder.checkpoints) if found.step <= run.checkpoint.step]
    last = student_of(run, run.checkpoint, device)
    reference = {name: tensor.cpu() for name, tensor in last.network.named_parameters()}
    length = _length(list(reference.values()))
    features = _pooled(last, batches)
    steps, distances, similarities, losses = [], [], [], []
    for checkpoint in [None, *evenly_spaced(kept, MAX_CHECKPOINTS)]:
        subject = student_of(run, checkpoint, device)
        parameters = dict(subject.network.named_parameters())
        change = [parameters[name].cpu() - value for name, value in reference.items()]
        steps.append(0 if checkpoint is None else checkpoint.step)
        distances.append(_length(change) / length)
        similarities.append(float(cka([_pooled(subject, batches)], [features])))
        losses += _loss(subject, batches)
        on_checkpoint(len(steps))
    count = len(features)
    return Drift(steps, distances, similarities, losses, count)


def _length(tensors: Sequence[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors)) ** 0.5


def _pooled(subject: Subject, batches: Sequence[dict[int, Tensor]]) -> Tensor:
    size = subject.backbone.input_size
    return torch.cat([pool(subject.backbone.tokens(pixels[size]))[GAP].cpu() for pixels in batches])


@torch.no_grad()
def _loss(subject: Subject, batches: Sequence[dict[int, Tensor]]) -> list[float]:
    """The mean over images, or nothing where there is no teacher."""
    if subject.distillation is None:
        return []
    total = sum(float(subject.distillation(pixels)) for pixels in batches)
    return [total / sum(len(pixels[subject.backbone.input_size]) for pixels in batches)]
