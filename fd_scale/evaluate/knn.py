"""How well does a network cluster images, with nothing trained on top? Weighted k nearest neighbours.

DINO's protocol: features of unit length, cosine similarity, each of the k nearest training images votes for
its class with exp(similarity / T). One number per k; k = 20 is the headline. The training features may be
spread over processes: each finds the nearest of its own, and the votes are counted on the nearest of all.

Shape letters: N training images, M test images, D channels, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.evaluate.features import EvaluationError, LabelledFeatures, common_classes, standard_error

KS = (10, 20, 100, 200)
"""Numbers of neighbours (DINO)."""
HEADLINE = 20
TEMPERATURE = 0.07
"""T of the votes (DINO)."""
CHUNK = 1024
"""Test images whose similarities to all training images are held at once."""

Gather = Callable[[Any], list[Any]]
"""Every process's value, in rank order, on every process (``World.gather``)."""


def alone(value: Any) -> list[Any]:
    """``Gather`` of a single process."""
    return [value]


@dataclass(frozen=True)
class KnnResult:
    """Accuracies of one kind of feature, and the protocol that they were measured by."""

    model: str
    pooling: str
    accuracy: dict[int, float]
    """In [0, 1], by k."""
    num_train: int
    num_test: int
    num_classes: int
    num_left_out: int
    """Samples of both sets that could not be read."""
    temperature: float
    train: dict[str, Any]
    """What decided the training features (``LabelledFeatures.facts``)."""
    test: dict[str, Any]
    task: str = "knn"

    @property
    def headline(self) -> float:
        """Accuracy at k = 20, or at the largest k below that the training set allows."""
        return self.accuracy[max(k for k in self.accuracy if k <= HEADLINE)]

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the headline: of the choice of test images, not of training."""
        return standard_error(self.headline, self.num_test)

    def to_json(self) -> str:
        """The record form, indented, one trailing newline."""
        derived = {"headline": self.headline, "standard_error": self.standard_error}
        return json.dumps(asdict(self) | derived, indent=2) + "\n"


def evaluate(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
    gather: Gather = alone,
) -> list[KnnResult]:
    """One result per kind of pooling that the network has.

    ``train`` is this process's part of the training set, ``test`` the whole test set on every process. A k
    above the number of training images is left out of the result. Raises ``EvaluationError`` when that
    leaves no k up to 20, and for labels that cannot be used (``features.common_classes``).
    """
    labels_N = torch.cat(gather(train.labels))
    num_train, num_left_out = len(labels_N), sum(gather(train.num_left_out))
    num_classes = common_classes(labels_N, test.labels)
    usable = [k for k in ks if k <= num_train]
    if not any(k <= HEADLINE for k in usable):
        raise EvaluationError(
            f"kNN with k in {tuple(ks)} needs at least {min(ks)} training images and a k up to {HEADLINE}; "
            f"there are {num_train}"
        )
    results = []
    for pooling, train_ND in train.pooled.items():
        predicted = classify(
            train_ND.to(device),
            train.labels.to(device),
            test.pooled[pooling].to(device),
            num_classes=num_classes,
            ks=usable,
            temperature=temperature,
            gather=gather,
        )
        results.append(
            KnnResult(
                model=train.model,
                pooling=pooling,
                accuracy=_accuracies(predicted, test.labels.to(device)),
                num_train=num_train,
                num_test=len(test),
                num_classes=num_classes,
                num_left_out=num_left_out + test.num_left_out,
                temperature=temperature,
                train=train.facts,
                test=test.facts,
            )
        )
    return results


def classify(
    train_ND: Tensor,
    labels_N: Tensor,
    test_MD: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    chunk: int = CHUNK,
    gather: Gather = alone,
) -> dict[int, Tensor]:
    """The class (M,) that each test image's k neighbours vote for, by k; of equal votes the lower class.

    Similarities are computed in the dtype of the features, votes in float64; ``chunk`` changes memory alone.
    The N training features are this process's part; no k may exceed the number of all. Collective.
    """
    bank_ND = F.normalize(train_ND, dim=1)
    predicted: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part_MD in test_MD.split(chunk):
        similarity_MN = F.normalize(part_MD, dim=1) @ bank_ND.T
        similarity_MK, class_MK = _nearest(similarity_MN, labels_N, max(ks), gather)
        vote_MK = (similarity_MK.double() / temperature).exp()
        for k in ks:
            votes_MC = vote_MK.new_zeros(len(part_MD), num_classes)
            votes_MC.scatter_add_(1, class_MK[:, :k], vote_MK[:, :k])
            predicted[k].append(votes_MC.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predicted.items()}


def _nearest(similarity_MN: Tensor, labels_N: Tensor, count: int, gather: Gather) -> tuple[Tensor, Tensor]:
    """Similarities and labels (M, ``count``) of the nearest training images of all processes, nearest
    first."""
    similarity_MK, place_MK = similarity_MN.topk(min(count, len(labels_N)), dim=1)
    parts = gather((similarity_MK.cpu(), labels_N[place_MK].cpu()))
    if len(parts) == 1:
        return similarity_MK, labels_N[place_MK]
    similarities, classes = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    similarity_MK, place_MK = similarities.to(similarity_MN.device).topk(count, dim=1)
    return similarity_MK, classes.to(similarity_MN.device).gather(1, place_MK)


def _accuracies(predicted: Mapping[int, Tensor], labels_M: Tensor) -> dict[int, float]:
    return {k: float((classes_M == labels_M).double().mean()) for k, classes_M in predicted.items()}
