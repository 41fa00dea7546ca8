"""Are the tokens of an image still different from each other? The mean cosine between its patches.

Deep layers of some teachers make all tokens alike, which leaves little for dense tasks. Tokens are compared
as they are, without taking off their mean; class token and registers are left out.

Shape letters: B images, N tokens, P patches, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.diagnose.anatomy import TokenLayer


@dataclass(frozen=True, eq=False)
class TokenSimilarity:
    """Of one layer."""

    cosine: float
    """In [-1, 1]: the mean over images and pairs of patches; NaN for a grid of one patch."""


def sums(tokens_BND: Tensor, layer: TokenLayer) -> dict[str, Tensor]:
    """The sum over images of each one's mean cosine, and the number of images, float64."""
    unit_BPD = F.normalize(tokens_BND[:, layer.num_prefix_tokens :].double(), dim=-1)
    num_patches = unit_BPD.shape[1]
    # The square of the summed unit vectors is the sum of all cosines, of a patch with itself too.
    cosines_B = unit_BPD.sum(dim=1).square().sum(dim=-1) - num_patches
    count = torch.tensor(float(len(tokens_BND)), dtype=torch.float64, device=tokens_BND.device)
    return {"cosine": cosines_B.sum() / max(num_patches * (num_patches - 1), 1), "images": count}


def conclude(sums: dict[str, Tensor], layer: TokenLayer) -> TokenSimilarity:
    """The mean."""
    alone = layer.grid == (1, 1)
    return TokenSimilarity(cosine=math.nan if alone else float(sums["cosine"] / sums["images"]))
