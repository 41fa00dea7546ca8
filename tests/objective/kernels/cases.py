"""Features, options and their float64 answers, for every way of running the fused loss.

The answer is the closed form of ``tests/reference/objective.py``. What that form does not know (a mask,
statistics per channel, the teacher's own norm, a given denominator) is reduced to it in float64 first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd_scale.objective.kernels import ChannelStatistics, Loss, TeacherNorm, whitened_smooth_l1
from tests.reference import objective as reference


def features(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Prediction and teacher tokens of this dtype: the teacher has mean 5 and a few heavy channels, as
    ViTs have."""
    generator = torch.Generator().manual_seed(seed)
    prediction = 1.5 * torch.randn(shape, generator=generator)
    teacher = torch.randn(shape, generator=generator) + 5
    teacher[..., ::50] *= 8
    return prediction.to(device, dtype), teacher.to(device, dtype)


def answer(prediction: Tensor, teacher: Tensor, **options: Any) -> reference.Answer:
    """Loss and gradient in float64 of the values that the tensors hold; gradient without ``loss_scale``."""
    options = {name: value for name, value in options.items() if value is not None and name != "loss_scale"}
    prediction_BNC, teacher_BNC = numbers(prediction), numbers(teacher)
    batch, num_tokens, width = prediction_BNC.shape
    norm, channel = options.pop("teacher_norm", None), options.pop("channel", None)
    if norm is not None:
        teacher_BNC = _normalised(teacher_BNC, norm.eps) * numbers(norm.weight) + numbers(norm.bias)
    if channel is not None:
        teacher_BNC = (teacher_BNC - numbers(channel.mean)) * numbers(channel.inv_std)
        options["target"] = "none"
    mask, weight = options.pop("token_mask", None), options.pop("token_weight", None)
    mask_BN = np.broadcast_to(1.0 if mask is None else numbers(mask), (batch, num_tokens))
    weight_BN = mask_BN if weight is None else np.where(mask_BN == 1, numbers(weight), 0.0)
    normaliser = options.pop("normaliser", "mean")
    result = reference.loss_and_gradient(prediction_BNC, teacher_BNC, token_weight=weight_BN, **options)
    if isinstance(normaliser, Tensor):
        divisor = float(normaliser)
    else:
        divisor = width * float((mask_BN if normaliser == "mean" else weight_BN).sum() or 1.0)
    factor = batch * num_tokens * width / divisor
    return reference.Answer(result.loss * factor, result.prediction * factor)


def fused(prediction: Tensor, teacher: Tensor, upstream: float = 1.0, **options: Any) -> tuple[Loss, Tensor]:
    """What the fused loss gives, and the gradient of ``upstream`` times its value."""
    prediction = prediction.detach().requires_grad_()
    loss = whitened_smooth_l1(prediction, teacher, **options)
    (loss.value * upstream).backward()
    assert prediction.grad is not None
    return Loss(loss.value.detach(), loss.per_token), prediction.grad


def relative(got: Tensor, expected: np.ndarray | float) -> float:
    """L2 error in units of the expected norm; NaN where something is not finite."""
    expected = np.asarray(expected, np.float64)
    return float(np.linalg.norm(numbers(got) - expected) / max(np.linalg.norm(expected), 1e-300))


def rounding(exact: np.ndarray, dtype: torch.dtype) -> float:
    """The error of nothing but rounding this exact gradient to the dtype."""
    return relative(torch.from_numpy(exact).to(dtype), exact)


def numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def norm_of(width: int, device: str = "cpu") -> TeacherNorm:
    """A LayerNorm whose weights and biases differ from channel to channel."""
    generator = torch.Generator().manual_seed(1)
    weight = 1 + 0.3 * torch.randn(width, generator=generator)
    return TeacherNorm(weight.to(device), torch.randn(width, generator=generator).to(device), eps=1e-6)


def statistics_of(teacher: Tensor) -> ChannelStatistics:
    flat = teacher.float().flatten(0, 1)
    return ChannelStatistics(flat.mean(0), 1 / (flat.var(0, correction=0) + 1e-5).sqrt())


def _normalised(teacher_BNC: np.ndarray, eps: float) -> np.ndarray:
    centred = teacher_BNC - teacher_BNC.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
