"""What a student is asked to reproduce: which tokens of a map, and how each teacher token is normalised.

Selection is the same for teacher and student, so that the two lists of tokens meet one to one. The distance
between them is the business of ``losses.py``.

Shape letters: B images, N tokens, M selected tokens, D channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.objective.features import Features

Granularity = Literal["full", "cls", "gap"]
Cls = Literal["match", "drop", "mean"]

WHITEN_EPS = 1e-5
"""Epsilon of the released code's whitening, a LayerNorm without affine."""

L2_EPS = 1e-12
"""Shortest token that ``l2_normalise`` scales to unit length."""


def whiten(tokens_BND: Tensor, eps: float = WHITEN_EPS) -> Tensor:
    """Each token to mean 0 and variance 1 over its channels (FD paper, section 3.1): a LayerNorm without
    affine.

    The variance is the biased one (1 / D). Computed and returned in float32 at least, float64 for float64.
    """
    tokens_BND = tokens_BND.to(working_dtype(tokens_BND))
    with torch.autocast(tokens_BND.device.type, enabled=False):
        return F.layer_norm(tokens_BND, tokens_BND.shape[-1:], eps=eps)


def l2_normalise(tokens_BND: Tensor, eps: float = L2_EPS) -> Tensor:
    """Each token to unit length (the paper's ablation), those shorter than ``eps`` divided by ``eps``.

    Computed and returned in float32 at least, float64 for float64.
    """
    return F.normalize(tokens_BND.to(working_dtype(tokens_BND)), dim=-1, eps=eps)


def l2_scaled(tokens_BND: Tensor, eps: float = L2_EPS) -> Tensor:
    """``l2_normalise`` times sqrt(D): each token to a root mean square of 1 over its channels.

    The direction of ``l2_normalise`` at the size of ``whiten``, so that the two differ in the mean alone.
    """
    return l2_normalise(tokens_BND, eps) * tokens_BND.shape[-1] ** 0.5


def for_kernels(
    tokens_BND: Tensor, target: Literal["whiten", "l2", "l2_scaled", "none"]
) -> tuple[Tensor, Literal["whiten", "l2", "none"]]:
    """Teacher tokens and target as the kernels take them: they have no form of ``l2_scaled``, which is made
    here, in float32."""
    return (l2_scaled(tokens_BND), "none") if target == "l2_scaled" else (tokens_BND, target)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """What targets and losses are computed in: float64 when a tensor is float64, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def has_class_token(*, granularity: Granularity, cls: Cls) -> bool:
    """Whether the first of the selected tokens is a class token."""
    return granularity == "cls" or (granularity == "full" and cls != "drop")


def select(features: Features, *, granularity: Granularity, cls: Cls) -> Tensor:
    """The tokens that are regressed, (B, M, D): the class token (unless dropped) and then the patches for
    ``full``, the class token for ``cls``, the mean patch for ``gap``.

    Registers and distillation tokens are left out always. ``cls="mean"`` keeps the class token like
    ``match``: it is the student that puts its mean patch there (``mean_as_class``). Raises ``ValueError``
    when a class token is asked of a map without one.
    """
    if granularity == "gap":
        return features.patches_BND.mean(dim=1, keepdim=True)
    if not has_class_token(granularity=granularity, cls=cls):
        return features.patches_BND
    if features.num_prefix_tokens == 0:
        raise ValueError(
            f"granularity={granularity!r} with cls={cls!r} regresses a class token, but this map has none"
        )
    if granularity == "cls":
        return features.tokens_BND[:, :1]
    if features.num_prefix_tokens == 1:
        return features.tokens_BND
    return torch.cat((features.tokens_BND[:, :1], features.patches_BND), dim=1)


def mean_as_class(features: Features) -> Features:
    """The same map with its mean patch in the place of the class token and of every other prefix token."""
    patches_BND = features.patches_BND
    tokens_BND = torch.cat((patches_BND.mean(dim=1, keepdim=True), patches_BND), dim=1)
    return Features(tokens_BND, features.grid, num_prefix_tokens=1)
