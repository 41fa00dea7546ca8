"""How far do the heads of a layer look? The mean distance between a patch and what it attends to, in pixels.

Definition: FD paper (ICCV 2023, section 4.1), after ViT (arXiv 2010.11929). The paper leaves out the class
token and the patch itself. Without weighing the rest anew, leaving out the patch itself would change
nothing, since its distance is 0; so here a query's attention to the other patches is made to sum to 1. The
number without that, as in ViT, is given too (``raw``): there, attention to the class token counts as none.

Shape letters: B images times windows, H heads, N tokens, P patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import AttentionLayer, patches


@dataclass(frozen=True, eq=False)
class Distance:
    """Of one layer, all in pixels of the input image; NaN for a head that attends to nothing but itself."""

    per_head_px: Tensor
    """float64 (H,): class token and self left out, the rest weighed anew."""
    raw_px: Tensor
    """float64 (H,): class token left out, nothing weighed anew."""
    mean_px: float
    """Of ``per_head_px``."""
    spread_px: float
    """Standard deviation of ``per_head_px`` over the heads: the papers read diversity from it."""


def sums(attention_BHNN: Tensor, layer: AttentionLayer) -> dict[str, Tensor]:
    """Sums of distances and numbers of queries by head, float64 (H,), from maps whose rows sum to 1."""
    attention_BHPP = patches(attention_BHNN, layer)
    distance_PP = patch_distances(layer.grid, layer.patch_px).to(attention_BHPP)
    weighted_BHP = (attention_BHPP * distance_PP).sum(dim=-1)
    # Not as the whole row less the diagonal: of a head that looks at itself, rounding would be left.
    others_BHP = (attention_BHPP * (distance_PP > 0)).sum(dim=-1)
    looks_away_BHP = others_BHP > 0
    renormalised_BHP = torch.where(looks_away_BHP, weighted_BHP / others_BHP, 0)
    return {
        "renormalised": renormalised_BHP.sum(dim=(0, 2), dtype=torch.float64),
        "looks_away": looks_away_BHP.sum(dim=(0, 2), dtype=torch.float64),
        "raw": weighted_BHP.sum(dim=(0, 2), dtype=torch.float64),
        "queries": torch.full_like(weighted_BHP[0, :, 0], weighted_BHP[:, 0].numel(), dtype=torch.float64),
    }


def conclude(sums: dict[str, Tensor], layer: AttentionLayer) -> Distance:
    """The means, and the spread of heads."""
    per_head_px = sums["renormalised"] / sums["looks_away"]
    known = per_head_px[per_head_px.isfinite()]
    return Distance(
        per_head_px=per_head_px,
        raw_px=sums["raw"] / sums["queries"],
        mean_px=float(known.mean()) if len(known) else math.nan,
        spread_px=float(known.std(correction=0)) if len(known) else math.nan,
    )


def uniform_distance(grid: tuple[int, int], patch_px: float) -> float:
    """The distance, pixels, of a head that attends to all other patches alike."""
    distance_PP = patch_distances(grid, patch_px)
    return float(distance_PP.sum()) / max(int(distance_PP.count_nonzero()), 1)


@lru_cache(maxsize=64)
def patch_distances(grid: tuple[int, int], patch_px: float) -> Tensor:
    """Euclidean distances between the centres of a grid's patches, float64 (P, P), row by row."""
    height, width = grid
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    offset_PP2 = torch.stack((y[:, None] - y, x[:, None] - x), dim=-1).double()
    return patch_px * torch.linalg.vector_norm(offset_PP2, dim=-1)
