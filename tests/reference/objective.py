"""The objective of feature distillation once more: float64, closed form, one token after the other, no
autograd."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Answer:
    """The loss and its gradients; those of the projector where there is one."""

    loss: float
    prediction: Array
    weight: Array | None = None
    bias: Array | None = None
    student: Array | None = None


def target_token(token_D: Array, target: str, eps: float = 1e-5) -> Array:
    """One teacher token as it is regressed."""
    token_D = np.asarray(token_D, np.float64)
    if target == "whiten":
        mean = math.fsum(token_D) / len(token_D)
        variance = math.fsum((x - mean) ** 2 for x in token_D) / len(token_D)
        return (token_D - mean) / math.sqrt(variance + eps)
    if target in ("l2", "l2_scaled"):
        size = math.sqrt(len(token_D)) if target == "l2_scaled" else 1.0
        return size * token_D / max(math.sqrt(math.fsum(x * x for x in token_D)), 1e-12)
    return token_D


def element(difference: float, beta: float) -> tuple[float, float]:
    """Smooth L1 of one difference, and its derivative."""
    size = abs(difference)
    sign = float(np.sign(difference))
    if beta > 0 and size < beta:
        return difference * difference / (2 * beta), difference / beta
    return size - beta / 2, sign


def loss_and_gradient(
    prediction_BND: Array,
    teacher_BND: Array,
    *,
    beta: float = 2.0,
    target: str = "whiten",
    token_weight: Array | None = None,
    normaliser: str = "mean",
    eps: float = 1e-5,
) -> Answer:
    """``sum(w l(prediction - target)) / Z``; a token of weight 0 is not looked at."""
    batch, num_tokens, width = prediction_BND.shape
    weight_BN = np.ones((batch, num_tokens))
    if token_weight is not None:
        weight_BN = np.broadcast_to(np.asarray(token_weight, np.float64), (batch, num_tokens))
    divisor = width * (weight_BN.sum() if normaliser == "weighted_mean" else batch * num_tokens)
    terms, gradient_BND = [], np.zeros((batch, num_tokens, width))
    for b in range(batch):
        for n in range(num_tokens):
            if weight_BN[b, n] == 0:
                continue
            wanted_D = target_token(teacher_BND[b, n], target, eps)
            for d in range(width):
                value, slope = element(float(prediction_BND[b, n, d]) - wanted_D[d], beta)
                terms.append(weight_BN[b, n] * value)
                gradient_BND[b, n, d] = weight_BN[b, n] * slope / divisor
    return Answer(math.fsum(terms) / divisor if terms else 0.0, gradient_BND)


def projected(
    student_BND: Array, weight: Array, bias: Array, teacher_BND: Array, **settings: object
) -> Answer:
    """The same behind a 1x1 projector of weight (out, in) and bias (out,), with the gradients of both and
    of the student's tokens."""
    prediction_BND = np.einsum("bni,oi->bno", student_BND, weight) + bias
    answer = loss_and_gradient(prediction_BND, teacher_BND, **settings)  # type: ignore[arg-type]
    return Answer(
        answer.loss,
        answer.prediction,
        weight=np.einsum("bno,bni->oi", answer.prediction, student_BND),
        bias=answer.prediction.sum((0, 1)),
        student=np.einsum("bno,oi->bni", answer.prediction, weight),
    )
