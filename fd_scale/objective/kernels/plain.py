"""What does the fused kernel compute? The same values in plain PyTorch, gradient written out, step by step.

This is the kernel's oracle, and what its operator runs where no kernel can. The plain loss that autograd
differentiates is ``fd_scale.objective.losses``.

Shape letters: B images, N tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when a tensor is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def loss_and_gradient(
    prediction_BNC: Tensor,
    teacher_BNC: Tensor,
    weight_BN: Tensor | None,
    mask_BN: Tensor | None,
    denominator: Tensor | None,
    loss_scale: Tensor | None,
    channel_mean_C: Tensor | None,
    channel_inv_std_C: Tensor | None,
    norm_weight_C: Tensor | None,
    norm_bias_C: Tensor | None,
    target: str,
    beta: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), mean loss of each token (B, N), and gradient (B, N, C) in the prediction's dtype.

    A token is left out where ``mask_BN`` is False or ``weight_BN`` is 0: its loss and gradient are 0
    whatever it holds. ``denominator`` (scalar) divides the sum over elements; it is B N C when None. The
    gradient alone is multiplied by ``loss_scale`` (scalar). Computed in float32, float64 when an input is.
    """
    dtype = working_dtype(prediction_BNC, teacher_BNC)
    kept_BN = torch.ones(prediction_BNC.shape[:2], dtype=torch.bool, device=prediction_BNC.device)
    if weight_BN is not None:
        kept_BN &= weight_BN != 0
    if mask_BN is not None:
        kept_BN &= mask_BN
    predicted_BNC = torch.where(kept_BN.unsqueeze(-1), prediction_BNC.to(dtype), 0)
    taught_BNC = torch.where(kept_BN.unsqueeze(-1), teacher_BNC.to(dtype), 0)
    if norm_weight_C is not None and norm_bias_C is not None:
        normalised_BNC = F.layer_norm(taught_BNC, taught_BNC.shape[-1:], eps=norm_eps)
        taught_BNC = normalised_BNC * norm_weight_C.to(dtype) + norm_bias_C.to(dtype)
    if target == "whiten":
        taught_BNC = F.layer_norm(taught_BNC, taught_BNC.shape[-1:], eps=eps)
    elif target == "l2":
        taught_BNC = F.normalize(taught_BNC, dim=-1, eps=eps)
    elif channel_mean_C is not None and channel_inv_std_C is not None:
        taught_BNC = (taught_BNC - channel_mean_C.to(dtype)) * channel_inv_std_C.to(dtype)

    difference_BNC = predicted_BNC - taught_BNC
    slope_BNC = difference_BNC.sign() if beta == 0 else (difference_BNC / beta).clamp(-1, 1)
    slope_BNC = slope_BNC.where(~difference_BNC.isnan(), difference_BNC)  # sign() of NaN is 0
    weight_BN = kept_BN.to(dtype) if weight_BN is None else weight_BN.to(dtype).where(kept_BN, 0)
    per_token_BN = (slope_BNC * (difference_BNC - beta / 2 * slope_BNC)).mean(dim=-1).where(kept_BN, 0)
    divisor = prediction_BNC.numel() if denominator is None else denominator.to(dtype)
    loss = (per_token_BN * weight_BN).sum() * prediction_BNC.shape[-1] / divisor
    factor_BN = weight_BN / divisor if loss_scale is None else weight_BN / divisor * loss_scale.to(dtype)
    gradient_BNC = (slope_BNC * factor_BN.unsqueeze(-1)).where(kept_BN.unsqueeze(-1), 0)
    return loss, per_token_BN, gradient_BNC.to(prediction_BNC.dtype).contiguous()
