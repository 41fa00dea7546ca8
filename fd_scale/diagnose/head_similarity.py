"""Do the heads of a layer do the same? The mean cosine between the attention of pairs of heads.

FD's first version (arXiv 2205.14141, section 4.1) compares heads token by token, as DeepViT does
(arXiv 2103.11886), where the vector of a token is its column: how much each query attends to it
(``columns``, the default). The text also allows the row of a query (``rows``) and the whole map
(``maps``); all are measured. Class token and registers are left out.

Shape letters: B images times windows, H heads, N tokens, P patches, T vectors of a head, D their length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import AttentionLayer, patches


@dataclass(frozen=True, eq=False)
class HeadSimilarity:
    """Of one layer: mean cosines in [0, 1]; NaN for a layer of one head."""

    columns: float
    rows: float
    maps: float


def sums(attention_BHNN: Tensor, layer: AttentionLayer) -> dict[str, Tensor]:
    """For each kind of vector the sum of cosines over pairs of heads and their number, float64 (2,)."""
    attention_BHPP = patches(attention_BHNN, layer)
    return {
        "columns": _pairs(attention_BHPP.permute(0, 3, 1, 2)),
        "rows": _pairs(attention_BHPP.transpose(1, 2)),
        "maps": _pairs(attention_BHPP.flatten(2)[:, None]),
    }


def conclude(sums: dict[str, Tensor], layer: AttentionLayer) -> HeadSimilarity:
    """The mean cosines."""
    means = {kind: float(total / count) if count else math.nan for kind, (total, count) in sums.items()}
    return HeadSimilarity(**means)


def _pairs(vectors_BTHD: Tensor) -> Tensor:
    """Where neither head has anything (a token that nobody attends to), there is no angle and no pair; where
    one has, the cosine is 0."""
    norm_BTH = torch.linalg.vector_norm(vectors_BTHD, dim=-1)
    exists_BTH = norm_BTH > 0
    unit_BTHD = vectors_BTHD / torch.where(exists_BTH, norm_BTH, 1).unsqueeze(-1)
    cosine_BTHH = unit_BTHD @ unit_BTHD.transpose(-2, -1)
    either_BTHH = exists_BTH.unsqueeze(-1) | exists_BTH.unsqueeze(-2)
    heads = torch.arange(norm_BTH.shape[-1], device=norm_BTH.device)
    pair_HH = heads[:, None] < heads
    # In float64 from here: sums over many images must not depend on how they came.
    total = (cosine_BTHH.sum(dim=(0, 1), dtype=torch.float64) * pair_HH).sum()
    return torch.stack((total, (either_BTHH & pair_HH).sum().double()))
