"""How far a student's tokens are from a teacher's: smooth L1 on normalised targets.

``whitened_smooth_l1`` is the one public loss, whatever computes it: the fused kernel where ``kernels.choose``
says so, else the plain form that stands here, which is also the kernel's oracle. ``Objective`` is a recipe's
choice of it over a batch.

Shape letters: B images, N tokens, M selected tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.objective import kernels
from fd_scale.objective.targets import (
    WHITEN_EPS,
    for_kernels,
    has_class_token,
    l2_normalise,
    whiten,
    working_dtype,
)
from fd_scale.run import recipe as recipes

Target = Literal["whiten", "l2", "l2_scaled", "none"]
Normaliser = Literal["mean", "weighted_mean"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TARGETS: tuple[Target, ...] = ("whiten", "l2", "l2_scaled", "none")
NORMALISERS: tuple[Normaliser, ...] = ("mean", "weighted_mean")


def whitened_smooth_l1(
    prediction_BND: Tensor,
    teacher_BND: Tensor,
    *,
    beta: float = 2.0,
    target: Target = "whiten",
    token_weight: Tensor | None = None,
    normaliser: Normaliser = "mean",
    eps: float = WHITEN_EPS,
) -> Tensor:
    """Smooth L1 between predicted tokens and normalised teacher tokens (FD paper, section 3), as a scalar.

    ``sum(w * l(prediction - target)) / Z``, where ``l(d)`` is ``d^2 / (2 beta)`` below ``beta`` and
    ``|d| - beta / 2`` above (beta 0 is plain L1). The target of a teacher token is ``whiten`` (LayerNorm
    without affine, ``eps`` in its square root), ``l2`` (unit length), ``l2_scaled`` (length sqrt(D)) or
    ``none``. ``token_weight`` w is (N,) or (B, N), 1 when not given. Z is B N D for ``mean``, and D times the
    sum of the weights for ``weighted_mean``; where that sum is 0, so is the loss.

    Inputs are bfloat16, float16, float32 or float64 of equal shape; inside and in the result it is float32,
    or float64 when an input is. The gradient reaches the prediction alone, in its dtype. A token of weight
    0 has no part in loss and gradient, even where it is NaN; a NaN in any other token reaches both. Raises
    ``ValueError`` for shapes, dtypes, devices or settings that do not fit.
    """
    _check_tokens(prediction_BND, teacher_BND)
    _check_settings(beta=beta, target=target, normaliser=normaliser, eps=eps)
    teacher_BND, made = for_kernels(teacher_BND.detach(), target)
    if kernels.choose(prediction_BND, teacher_BND, made).name == "triton":
        return kernels.whitened_smooth_l1(
            prediction_BND,
            teacher_BND,
            beta=beta,
            target=made,
            token_weight=token_weight,
            normaliser=normaliser,
            eps=eps,
        ).value
    dtype = working_dtype(prediction_BND, teacher_BND)
    teacher_BND = teacher_BND.to(dtype)
    predicted_BND = prediction_BND.to(dtype)
    weight_BN = None
    if token_weight is not None:
        weight_BN = _expanded(token_weight, prediction_BND).to(dtype)
        kept_BN1 = (weight_BN != 0).unsqueeze(-1)
        predicted_BND = torch.where(kept_BN1, predicted_BND, 0)
        teacher_BND = torch.where(kept_BN1, teacher_BND, 0)
    with torch.autocast(prediction_BND.device.type, enabled=False):
        taught_BND = _targets(eps)[made](teacher_BND)
        loss_BN = _smooth_l1(predicted_BND - taught_BND, beta).mean(dim=-1)
        if weight_BN is None:
            return loss_BN.mean()
        total = (weight_BN * loss_BN).sum()
        if normaliser == "mean":
            return total / loss_BN.numel()
        weight = weight_BN.sum()
        return total / torch.where(weight == 0, 1, weight)


class Objective:
    """A recipe's loss between projected student tokens and selected teacher tokens, one pair of maps per
    teacher."""

    def __init__(self, spec: recipes.Objective) -> None:
        self.spec = spec

    def __call__(self, predicted: Sequence[Tensor], taught: Sequence[Tensor], valid_B: Tensor) -> Tensor:
        """The mean over teachers, as a scalar (float32; float64 for float64 tokens), plus the weighted
        distance of the embedding, where the recipe has one.

        ``predicted`` and ``taught`` hold (B, M, D) per teacher, as ``targets.select`` lays them out, and the
        embedding (B, 1, E) last;
        ``valid_B`` is False for images that stand in for unreadable ones. The sum is divided by the whole
        batch, so that an invalid image adds nothing and the gradients of all others stay what they are, on
        any number of processes.
        """
        if len(predicted) != len(taught) or not predicted:
            raise ValueError(f"{len(predicted)} predicted maps do not pair with {len(taught)} teacher maps")
        pairs = list(zip(predicted, taught, strict=True))
        embeds = self.spec.embedding_weight > 0
        maps = pairs[:-1] if embeds else pairs
        loss = torch.stack([self._one(p_BMD, t_BMD, valid_B) for p_BMD, t_BMD in maps]).mean()
        return loss + self.embedding_loss(*pairs[-1], valid_B) if embeds else loss

    def embedding_loss(self, predicted_B1E: Tensor, taught_B1E: Tensor, valid_B: Tensor) -> Tensor:
        """The embedding's weighted part of the loss, a scalar."""
        return self.spec.embedding_weight * cosine_distance(predicted_B1E, taught_B1E, valid_B)

    def _one(self, predicted_BMD: Tensor, taught_BMD: Tensor, valid_B: Tensor) -> Tensor:
        return whitened_smooth_l1(
            predicted_BMD,
            taught_BMD,
            beta=self.spec.beta,
            target=self.spec.target,
            token_weight=self.weights(predicted_BMD, valid_B),
        )

    def weights(self, tokens_BMD: Tensor, valid_B: Tensor) -> Tensor:
        """(B, M) weights of these tokens, 0 where an image is not valid, in the dtype of the loss.

        The normaliser is folded in: it must not depend on how many images are valid. Raises ``ValueError``
        for a ``valid_B`` that is not bool, one per image.
        """
        if valid_B.dtype != torch.bool or valid_B.shape != tokens_BMD.shape[:1]:
            raise ValueError(
                f"valid of shape {tuple(valid_B.shape)} and dtype {valid_B.dtype} must be bool, "
                f"one per image of {tuple(tokens_BMD.shape)}"
            )
        valid_B = valid_B.to(tokens_BMD.device, non_blocking=True)
        return valid_B[:, None] * self._token_weight(tokens_BMD)

    def _token_weight(self, tokens_BMD: Tensor) -> Tensor:
        """(M,) weights, made by fills on the device alone: no number is sent there while a step is on."""
        num_tokens = tokens_BMD.shape[1]
        weight_M = tokens_BMD.new_ones(num_tokens, dtype=working_dtype(tokens_BMD))
        total = float(num_tokens)
        if self.spec.granularity == "full" and has_class_token(granularity="full", cls=self.spec.cls):
            weight_M[:1].fill_(self.spec.cls_weight)
            total += self.spec.cls_weight - 1
        return weight_M * (num_tokens / total) if self.spec.normaliser == "weighted_mean" else weight_M


def cosine_distance(prediction_BND: Tensor, teacher_BND: Tensor, valid_B: Tensor) -> Tensor:
    """The mean over the whole batch of 1 - cosine, as a scalar; an invalid image adds nothing.

    Computed in float32 at least. The gradient reaches the prediction alone. Zero-shot logits are cosines, so
    that what a length could say is not asked for.
    """
    dtype = working_dtype(prediction_BND, teacher_BND)
    valid_B11 = valid_B.to(prediction_BND.device, non_blocking=True)[:, None, None]
    with torch.autocast(prediction_BND.device.type, enabled=False):
        # Chosen before, not after, so that a NaN of an invalid image has no gradient either.
        predicted = torch.where(valid_B11, prediction_BND.to(dtype), 1)
        taught = torch.where(valid_B11, teacher_BND.detach().to(dtype), 1)
        distance_BN = 1 - F.cosine_similarity(predicted, taught, dim=-1)
        return torch.where(valid_B11[..., 0], distance_BN, 0).mean()


def _smooth_l1(difference: Tensor, beta: float) -> Tensor:
    """Elementwise, without a branch at the knee; its derivative is ``slope``, also by autograd.

    PyTorch's own has the gradient 0 at a NaN when ``beta`` is 0, which would hide it.
    """
    constant = difference.detach()
    if beta > 0:
        slope = (constant / beta).clamp(-1, 1)
    else:
        slope = torch.where(constant.isnan(), constant, constant.sign())
    return slope * (difference - slope * (beta / 2))


def _targets(eps: float) -> Mapping[str, Callable[[Tensor], Tensor]]:
    return {"whiten": lambda t: whiten(t, eps), "l2": l2_normalise, "none": lambda t: t}


def _expanded(token_weight: Tensor, prediction_BND: Tensor) -> Tensor:
    """The weights as (B, N), without gradient."""
    batch, tokens = prediction_BND.shape[:2]
    if token_weight.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"token_weight of shape {tuple(token_weight.shape)} is neither ({tokens},) nor "
            f"({batch}, {tokens}), the tokens of prediction {tuple(prediction_BND.shape)}"
        )
    if token_weight.is_complex() or token_weight.device != prediction_BND.device:
        raise ValueError(
            f"token_weight is {token_weight.dtype} on {token_weight.device}; it must be real and on the "
            f"device of the prediction, {prediction_BND.device}"
        )
    return token_weight.detach().expand(batch, tokens)


def _check_tokens(prediction_BND: Tensor, teacher_BND: Tensor) -> None:
    if prediction_BND.ndim != 3 or prediction_BND.shape != teacher_BND.shape:
        raise ValueError(
            f"prediction {tuple(prediction_BND.shape)} and teacher {tuple(teacher_BND.shape)} must be two "
            "(B, N, D) of equal shape: project and resample the student's tokens first"
        )
    if prediction_BND.numel() == 0:
        raise ValueError(
            f"prediction and teacher of shape {tuple(prediction_BND.shape)} hold nothing to compare"
        )
    for name, tokens in (("prediction", prediction_BND), ("teacher", teacher_BND)):
        if tokens.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {tokens.dtype}; it must be one of {', '.join(str(d) for d in FLOATS)}"
            )
    if prediction_BND.device != teacher_BND.device:
        raise ValueError(
            f"prediction is on {prediction_BND.device}, teacher on {teacher_BND.device}: move one"
        )


def _check_settings(*, beta: float, target: str, normaliser: str, eps: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta={beta} must be a finite number, 0 (plain L1) or above")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps} must be a finite number, 0 or above")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    if normaliser not in NORMALISERS:
        raise ValueError(f"normaliser={normaliser!r} must be one of {', '.join(NORMALISERS)}")
