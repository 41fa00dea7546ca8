"""Which loss is the landscape of? What can be asked of a network as it is, and what a classifier adds.

Stage ``raw``: a run's own distillation loss, and for any network how far its own map moves (both maps
whitened, in the paper's smooth L1), which needs neither labels nor a teacher and can be set side by side.
Stage ``linear head``: cross entropy and accuracy of a linear classifier of mean patches, fitted on other
images with the network frozen; it stands in where there is no fine-tuned network, and is called so.
Stage ``fine-tuned``: the same of networks that bring a classifier, as in the papers.

Shape letters: B images, N tokens, D channels, n images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.diagnose.images import Images
from fd_scale.diagnose.landscape import Task
from fd_scale.diagnose.subjects import DiagnoseError, Distillation, Subject
from fd_scale.evaluate import linear_fast
from fd_scale.evaluate.backbone import GAP, pool
from fd_scale.objective.features import Features
from fd_scale.objective.losses import whitened_smooth_l1
from fd_scale.objective.targets import whiten
from fd_scale.run.world import World
from fd_scale.teachers.fingerprint import digest

DISTILLATION, SHIFT = "distillation loss", "shift of its own map"
CROSS_ENTROPY, TOP1 = "cross entropy", "top-1 accuracy"
L2 = 1e-2
"""Penalty of the classifier (``evaluate.linear_fast``); fixed, as no probe's table is compared with it."""
FIT_PER_SCORED = 8
"""Images that a classifier is fitted on for each one that the landscape is measured on."""


class Reading(nn.Module):
    """A subject's network as a module of pixels, so that its weights can be replaced for one call."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network = subject.network
        self._backbone = subject.backbone

    def forward(self, pixels: Tensor) -> Features:
        """The map of uint8 pixels (B, 3, S, S)."""
        return self._backbone.tokens(pixels)


def shift(subject: Subject, batches: Sequence[Tensor], facts: dict[str, Any]) -> Task:
    """How far the map (B, N, D) moves from where it is now: 0 at the network itself."""
    still = [whiten(subject.backbone.tokens(pixels).tokens_BND) for pixels in batches]

    def score(moved: Features, number: int) -> Tensor:
        # Neither a teacher's map nor a student's has a scale of its own: whitened on both sides.
        change = whitened_smooth_l1(whiten(moved.tokens_BND), still[number], target="none")
        return (change.double() * len(still[number])).reshape(1)

    return Task(
        network=subject.name,
        stage="raw",
        quantities=(SHIFT,),
        module=Reading(subject),
        moved="network.",
        score=score,
        facts={**facts, "network": subject.facts, "loss": SHIFT},
    )


def distillation(subject: Subject, batches: Sequence[dict[int, Tensor]], facts: dict[str, Any]) -> Task:
    """The run's own loss between student and teacher. ``batches`` are pixels by size, as in a run."""
    held = _distillation_of(subject)
    taught = [held.taught(pixels) for pixels in batches]

    def score(predicted: tuple[Tensor, ...], number: int) -> Tensor:
        return held.loss(predicted, taught[number]).reshape(1)

    return Task(
        network=subject.name,
        stage="raw",
        quantities=(DISTILLATION,),
        module=held.student,
        moved="backbone.",
        score=score,
        facts={
            **facts,
            "network": subject.facts,
            "teachers": [guest.teacher.fingerprint for guest in held.guests],
            "objective": held.objective.spec.model_dump(mode="json"),
            "loss": DISTILLATION,
        },
    )


@dataclass(frozen=True, eq=False)
class HeadData:
    """What a linear head is measured on, this process's share, and the head, which all processes have."""

    classifier: linear_fast.Classifier
    batches: list[Tensor]
    labels: list[Tensor]
    num_fitted: int


def fit_head(subject: Subject, images: Images, num_scored: int, world: World) -> HeadData:
    """Fit a classifier on all labelled images but every k-th, which are to be measured on. Collective.

    Raises ``DiagnoseError`` for fewer than two classes.
    """
    every = max(images.count // num_scored, 2)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    scored: list[tuple[Tensor, Tensor]] = []
    for seen in images.labelled(subject.backbone.input_size, world):
        is_scored = seen.places % every == 0
        scored.append((seen.pixels[is_scored], seen.labels[is_scored]))
        pooled = pool(subject.backbone.tokens(seen.pixels[~is_scored]))[GAP]
        features.append(pooled.float().cpu())
        labels.append(seen.labels[~is_scored])
    parts = world.gather((features, labels))
    features_nD = torch.cat([rows for part, _ in parts for rows in part])
    labels_n = torch.cat([rows for _, part in parts for rows in part])
    known = labels_n.unique()
    if len(known) < 2:
        raise DiagnoseError(
            f"a linear head needs images of two classes or more; the {len(labels_n)} labelled ones have "
            f"{len(known)}: give more with --images, or other --data"
        )
    device = subject.backbone.device
    classifier = linear_fast.fit(
        features_nD.to(device), labels_n.to(device), num_classes=int(known.max()) + 1, l2=L2
    )
    kept = [(pixels, labels, torch.isin(labels, known)) for pixels, labels in scored]
    return HeadData(
        classifier,
        [pixels[known].to(device) for pixels, _, known in kept if known.any()],
        [labels[known].to(device) for _, labels, known in kept if known.any()],
        len(labels_n),
    )


def head(subject: Subject, data: HeadData, facts: dict[str, Any]) -> Task:
    """Cross entropy and accuracy under the linear head."""

    def score(moved: Features, number: int) -> Tensor:
        return classified(data.classifier.logits(pool(moved)[GAP]), data.labels[number])

    return Task(
        network=subject.name,
        stage="linear head",
        quantities=(CROSS_ENTROPY, TOP1),
        module=Reading(subject),
        moved="network.",
        score=score,
        facts={**facts, "network": subject.facts, "loss": CROSS_ENTROPY, "fitted": data.num_fitted, "l2": L2},
    )


def fine_tuned(
    subject: Subject,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor],
    facts: dict[str, Any],
    *,
    num_classes: int | None = None,
) -> Task:
    """Cross entropy and accuracy of a fine-tuned network, whose weights are all moved, the classifier's too.

    ``batches`` and ``labels`` lie on its device; ``num_classes`` is how many the data say that they have.
    Raises ``DiagnoseError`` for a network without a classifier, or with one of other classes.
    """
    if subject.classifier is None:
        raise DiagnoseError(
            f"{subject.name} has no classifier of its own, so no fine-tuned stage: name fine-tuned networks "
            "(a fine-tuned run, timm:NAME.TAG, timm:NAME@FILE), or leave out --fine-tuned"
        )
    classifier = subject.classifier()

    def score(logits: Tensor, number: int) -> Tensor:
        return classified(logits, labels[number])

    with torch.no_grad():
        known = classifier(torch.zeros_like(batches[0][:1])).shape[1] if batches else num_classes
    wanted = num_classes or 1 + max((int(labels_B.max()) for labels_B in labels), default=-1)
    if known is not None and (wanted > known or num_classes not in (None, known)):
        raise DiagnoseError(
            f"{subject.name} tells {known} classes apart, and the data have {wanted}: give --data of the "
            "classes that it was fine-tuned on"
        )
    return Task(
        network=subject.name,
        stage="fine-tuned",
        quantities=(CROSS_ENTROPY, TOP1),
        module=classifier,
        moved="network.",
        score=score,
        facts={
            **facts,
            "network": subject.facts,
            "loss": CROSS_ENTROPY,
            "stage": "fine-tuned",
            "classifier": digest(classifier.state_dict()),
        },
    )


def classified(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """Sums over images of cross entropy and of right answers, (2,)."""
    cost = F.cross_entropy(logits_BK.float(), labels_B, reduction="sum")
    return torch.stack((cost, (logits_BK.argmax(dim=1) == labels_B).sum().to(cost)))


def _distillation_of(subject: Subject) -> Distillation:
    if subject.distillation is None:
        raise DiagnoseError(f"{subject.name} has no teacher here, so no distillation loss")
    return subject.distillation
