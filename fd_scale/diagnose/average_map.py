"""What do the attention maps of a layer have in common over images and heads?

The mean map, patches only (FD paper, ICCV 2023, section 4.1), and how much of its variance two simple
patterns explain: the ``diagonal`` one, where attention depends on the offset from query to key alone, and
the ``column`` one, where it depends on the key alone, whatever the query. The papers find columns in a
teacher's deep layers and diagonals after distillation, by eye; the two scores are ours.

Shape letters: B images times windows, H heads, N tokens, P patches, Q queries, K keys (both patches).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import AttentionLayer, patches

FLAT = 1e-12
"""Variance, relative to the squared mean, below which a map has no pattern to explain."""


@dataclass(frozen=True, eq=False)
class AverageMap:
    """Of one layer."""

    map_QK: Tensor
    """float64 (P, P): mean attention from patch to patch, not weighed anew, so that rows sum to 1 less the
    share of the prefix tokens."""
    diagonality: float
    """In [0, 1]; NaN for a flat map."""
    column_dominance: float
    """In [0, 1]; NaN for a flat map."""
    prefix_share: float
    """Of a patch's attention, what goes to class token and registers."""


def sums(attention_BHNN: Tensor, layer: AttentionLayer) -> dict[str, Tensor]:
    """The sum of the maps, float64 (P, P), and their number."""
    attention_BHPP = patches(attention_BHNN, layer)
    count = attention_BHPP.shape[0] * attention_BHPP.shape[1]
    total_PP = attention_BHPP.sum(dim=(0, 1), dtype=torch.float64)
    return {"map": total_PP, "count": torch.tensor(float(count), dtype=torch.float64, device=total_PP.device)}


def conclude(sums: dict[str, Tensor], layer: AttentionLayer) -> AverageMap:
    """The mean map and its scores."""
    map_QK = sums["map"] / sums["count"]
    return AverageMap(
        map_QK=map_QK,
        diagonality=diagonality(map_QK, layer.grid),
        column_dominance=column_dominance(map_QK),
        prefix_share=1 - float(map_QK.sum(dim=1).mean()) if layer.num_prefix_tokens else 0.0,
    )


def diagonality(map_QK: Tensor, grid: tuple[int, int]) -> float:
    """The share of a map's variance that is explained by the offset (vertical, horizontal) from query to
    key."""
    height, width = grid
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    offset_QK = (y[:, None] - y + height - 1) * (2 * width - 1) + (x[:, None] - x + width - 1)
    return _explained(map_QK, offset_QK)


def column_dominance(map_QK: Tensor) -> float:
    """The share of a map's variance that is explained by the key."""
    return _explained(map_QK, torch.arange(map_QK.shape[1]).expand_as(map_QK))


def _explained(map_QK: Tensor, group_QK: Tensor) -> float:
    """The variance between groups over the variance of all entries."""
    values, groups = map_QK.double().flatten(), group_QK.to(map_QK.device).flatten()
    deviations = values - values.mean()
    total = deviations.square().sum()
    if total <= FLAT * values.square().sum():
        return math.nan
    size = torch.bincount(groups)
    of_group = torch.zeros(len(size), dtype=torch.float64, device=values.device)
    of_group.index_add_(0, groups, deviations)
    return float((of_group.square() / size.clamp_min(1)).sum() / total)
