"""What did the network look at, in this image? Attention rollout from all layers.

Attention of heads is averaged, mixed with the identity for the residual path, and multiplied through the
layers (Abnar and Zuidema, arXiv 2005.00928). Where all attention is between the same tokens only; inside
windows of changing maps there is no such product.

Shape letters: B images, H heads, N tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import Anatomy
from fd_scale.diagnose.capture import attention_maps
from fd_scale.diagnose.subjects import Subject


def has_rollout(anatomy: Anatomy) -> bool:
    """Whether every layer attends between the same tokens."""
    sizes = {(layer.grid, layer.num_prefix_tokens) for layer in anatomy.attention}
    return len(sizes) == 1 and not anatomy.is_windowed and not anatomy.left_out


def rollout(subject: Subject, anatomy: Anatomy, pixels: Tensor) -> Tensor:
    """Where the class token looked, or the mean patch where there is none: float32 (B, height, width).

    ``pixels`` are uint8 (B, 3, S, S). Shares of each image's total, so that maps sum to 1. Raises
    ``ValueError`` for a network without rollout.
    """
    if not has_rollout(anatomy):
        raise ValueError(f"{subject.name} attends between changing tokens, so there is no rollout")
    layers = {layer.name: layer for layer in anatomy.attention}
    rolled_BNN: list[Tensor] = []

    def take(name: str, attention_BHNN: Tensor) -> None:
        if name in layers:
            step_BNN = rollout_step(attention_BHNN)
            rolled_BNN[:] = [step_BNN @ rolled_BNN[0] if rolled_BNN else step_BNN]

    with attention_maps(subject.network, take):
        subject.backbone.tokens(pixels)
    layer = anatomy.attention[0]
    first = layer.num_prefix_tokens
    rows = rolled_BNN[0][:, :1] if first else rolled_BNN[0]
    looked_BP = rows[:, :, first:].mean(dim=1)
    return (looked_BP / looked_BP.sum(dim=1, keepdim=True)).unflatten(1, layer.grid).cpu()


def rollout_step(attention_BHNN: Tensor) -> Tensor:
    """The mixing of one layer, float32 (B, N, N): heads' mean and identity, half each."""
    mean_BNN = attention_BHNN.float().mean(dim=1)
    identity_NN = torch.eye(mean_BNN.shape[-1], device=mean_BNN.device)
    mixed_BNN = (mean_BNN + identity_NN) / 2
    return mixed_BNN / mixed_BNN.sum(dim=-1, keepdim=True)
