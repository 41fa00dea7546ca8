"""How much can a linear classifier read from frozen features? The fast mode, on features computed once.

Multinomial logistic regression by L-BFGS to its optimum, on standardised features; the strength of its L2
penalty is chosen on a part of the training set. There is no augmentation, so these numbers are not those of
the papers' probe (LARS, 90 epochs of augmented images), and the two must not share a table.

Shape letters: N images, D channels, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.data import philox
from fd_scale.evaluate.features import EvaluationError, LabelledFeatures, common_classes, standard_error

L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the penalty to choose from, strongest first."""
VALIDATION_SHARE = 0.2
"""Of the training set, to choose by."""
MIN_SPREAD = 1e-6
"""Standard deviation below which a channel counts as constant and is not scaled up."""
CURVATURE = 0.25
"""Largest second derivative of the logistic loss of two classes."""
PROTOCOL = "fast: L-BFGS on cached features without augmentation; not comparable with the LARS probe"


@dataclass(frozen=True)
class LinearResult:
    """Accuracy of one kind of feature, and the protocol that it was measured by."""

    model: str
    pooling: str
    accuracy: float
    """In [0, 1], on the test set."""
    l2: float
    """The strength that was chosen."""
    l2_at_edge: bool
    """Whether it is the first or last of the grid, so that a better one may lie outside."""
    validation: dict[float, float]
    """Accuracy on the held-out part of the training set, by strength."""
    num_train: int
    num_test: int
    num_classes: int
    num_left_out: int
    """Samples of both sets that could not be read."""
    seed: int
    train: dict[str, Any]
    """What decided the training features (``LabelledFeatures.facts``)."""
    test: dict[str, Any]
    protocol: str = PROTOCOL
    task: str = "linear_fast"

    @property
    def headline(self) -> float:
        """The accuracy."""
        return self.accuracy

    @property
    def standard_error(self) -> float:
        """Binomial standard error: of the choice of test images, not of training."""
        return standard_error(self.accuracy, self.num_test)

    def to_json(self) -> str:
        """The record form, indented, one trailing newline."""
        return json.dumps(asdict(self) | {"standard_error": self.standard_error}, indent=2) + "\n"


@dataclass(frozen=True, eq=False)
class Classifier:
    """A linear classifier of standardised features."""

    mean: Tensor
    """(D,), subtracted."""
    scale: Tensor
    """(D,), multiplied by after that."""
    weight: Tensor
    """(C, D)."""
    bias: Tensor
    """(C,)."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """(N, C), in float64."""
        return F.linear((features_ND.double() - self.mean) * self.scale, self.weight, self.bias)

    def accuracy(self, features_ND: Tensor, labels_N: Tensor) -> float:
        """Share of images, in [0, 1], whose largest logit is that of their label."""
        return float((self.logits(features_ND).argmax(dim=1) == labels_N).double().mean())


def evaluate(
    train: LabelledFeatures,
    test: LabelledFeatures,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[LinearResult]:
    """One result per kind of pooling that the network has.

    For each strength a classifier is fitted on 80 % of ``train``; the best of them on the other 20 % (of
    equals the stronger) is fitted again on all of ``train``, and that one meets ``test``, once. ``seed``
    decides the split. Works in float64 on the whole set at once: 8 N D bytes.
    Raises ``EvaluationError`` for labels that cannot be used and for too few images to split.
    """
    num_classes = common_classes(train.labels, test.labels)
    fitting, validating = _split(train.labels, seed)
    labels_N = train.labels.to(device)
    results = []
    for pooling, features in train.pooled.items():
        features_ND = features.to(device)
        validation = {}
        for l2 in l2_grid:
            classifier = fit(features_ND[fitting], labels_N[fitting], num_classes=num_classes, l2=l2)
            validation[l2] = classifier.accuracy(features_ND[validating], labels_N[validating])
        best = max(sorted(l2_grid, reverse=True), key=validation.__getitem__)
        classifier = fit(features_ND, labels_N, num_classes=num_classes, l2=best)
        results.append(
            LinearResult(
                model=train.model,
                pooling=pooling,
                accuracy=classifier.accuracy(test.pooled[pooling].to(device), test.labels.to(device)),
                l2=best,
                l2_at_edge=best in (max(l2_grid), min(l2_grid)),
                validation=validation,
                num_train=len(train),
                num_test=len(test),
                num_classes=num_classes,
                num_left_out=train.num_left_out + test.num_left_out,
                seed=seed,
                train=train.facts,
                test=test.facts,
            )
        )
    return results


def fit(features_ND: Tensor, labels_N: Tensor, *, num_classes: int, l2: float) -> Classifier:
    """The minimum of mean cross entropy + ``l2`` / 2 x squared norm of the weights, the bias left out.

    Features are standardised by their own mean and standard deviation. In scikit-learn's terms, C is
    1 / (N ``l2``).
    """
    features_ND = features_ND.double()
    spread_D, mean_D = torch.std_mean(features_ND, dim=0, correction=0)
    scale_D = 1 / torch.where(spread_D > MIN_SPREAD, spread_D, 1.0)
    inputs_ND = (features_ND - mean_D) * scale_D
    basis_DD = _basis(inputs_ND, l2)
    inputs_ND = inputs_ND @ basis_DD
    weight_CD = inputs_ND.new_zeros(num_classes, inputs_ND.shape[1], requires_grad=True)
    bias_C = inputs_ND.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_CD, bias_C],
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        cost = F.cross_entropy(F.linear(inputs_ND, weight_CD, bias_C), labels_N)
        cost = cost + l2 / 2 * (weight_CD @ basis_DD).square().sum()
        cost.backward()
        return cost

    optimizer.step(closure)
    return Classifier(mean_D, scale_D, (weight_CD @ basis_DD).detach(), bias_C.detach())


def _basis(inputs_ND: Tensor, l2: float) -> Tensor:
    """Coordinates (D, D) in which the cost is about equally curved in all directions.

    Channels of a network are strongly correlated: without this, weak penalties take twenty times as many
    evaluations. The optimum is the same in any coordinates.
    """
    variance_D, direction_DD = torch.linalg.eigh(inputs_ND.T @ inputs_ND / len(inputs_ND))
    curvature_D = CURVATURE * variance_D.clamp_min(0) + l2
    return (direction_DD * curvature_D.rsqrt()) @ direction_DD.T


def _split(labels_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to fit on and indices to choose by; every class has some of the former."""
    order = torch.from_numpy(philox.permutation(philox.key("fd.linear", seed), len(labels_N)))
    num_validating = round(VALIDATION_SHARE * len(labels_N))
    validating, fitting = order[:num_validating], order[num_validating:]
    left = set(labels_N.unique().tolist()) - set(labels_N[fitting].unique().tolist())
    if num_validating == 0 or left:
        raise EvaluationError(
            f"{len(labels_N)} training images are too few to choose the penalty on a fifth of them"
            + (f": class {min(left)} has no other example" if left else "")
        )
    return fitting, validating
