"""How many directions does a layer use? The spectrum of the covariance of its patch tokens.

Effective rank is the exponential of the entropy of the shares of variance (Roy and Vetterli, 2007): 1 when
all tokens lie on a line, the number of channels when all directions are used alike.

Shape letters: B images, N tokens, D channels, M patches of all images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import TokenLayer


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of one layer."""

    variance_shares: Tensor
    """float64 (D,): of the total variance, falling; all 0 where tokens do not vary."""
    effective_rank: float
    """In [1, D]; NaN where tokens do not vary."""

    @property
    def explained(self) -> Tensor:
        """float64 (D,): the share of variance that the first 1, 2, ... directions hold."""
        return self.variance_shares.cumsum(0)

    def directions_for(self, share: float) -> int:
        """How many directions hold this share of the variance."""
        return min(int(torch.searchsorted(self.explained, share)) + 1, len(self.variance_shares))


def sums(tokens_BND: Tensor, layer: TokenLayer) -> dict[str, Tensor]:
    """Number, sum (D,) and outer products (D, D) of patch tokens, float64."""
    tokens_MD = tokens_BND[:, layer.num_prefix_tokens :].double().flatten(0, 1)
    count = torch.tensor(float(len(tokens_MD)), dtype=torch.float64, device=tokens_MD.device)
    return {"count": count, "sum": tokens_MD.sum(dim=0), "outer": tokens_MD.T @ tokens_MD}


def conclude(sums: dict[str, Tensor], layer: TokenLayer) -> Spectrum:
    """The eigenvalues as shares of their sum."""
    mean_D = sums["sum"] / sums["count"]
    covariance_DD = sums["outer"] / sums["count"] - torch.outer(mean_D, mean_D)
    variance_D = torch.linalg.eigvalsh(covariance_DD).flip(0).clamp_min(0).cpu()
    total = variance_D.sum()
    # Of tokens that do not vary, the difference of two equal squares leaves rounding.
    if total <= 1e-12 * float(sums["outer"].diagonal().sum() / sums["count"]):
        return Spectrum(torch.zeros_like(variance_D), math.nan)
    shares_D = variance_D / total
    return Spectrum(shares_D, float(torch.special.entr(shares_D).sum().exp()))
