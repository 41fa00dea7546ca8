"""Do a few patches carry outsized tokens? The distribution of token lengths, layer by layer.

Large ViTs turn patches without content into registers: tokens several times as long as the others, which
spoil dense maps ("Vision Transformers Need Registers", arXiv 2309.16588). The paper's cut-off is one
network's absolute length; here a patch is an outlier above 3 times the median of its layer.

Quantiles are read from a histogram with bins of 0.56 %, so that they add up over batches and processes.

Shape letters: B images, N tokens, P patches, D channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import TokenLayer

OUTLIER = 3.0
"""Times the median."""
LOWEST, HIGHEST, NUM_BINS = 1e-4, 1e6, 4096


@dataclass(frozen=True, eq=False)
class Norms:
    """Of one layer: L2 norms of patch tokens, within the width of a bin."""

    median: float
    p99: float
    """99 % of the patches are shorter."""
    outlier_share: float
    """Of patches, longer than ``OUTLIER`` times the median."""


def sums(tokens_BND: Tensor, layer: TokenLayer) -> dict[str, Tensor]:
    """The histogram of norms, int64 (``NUM_BINS``,); what lies outside is counted in the outermost bins."""
    norm_BP = torch.linalg.vector_norm(tokens_BND[:, layer.num_prefix_tokens :].double(), dim=-1)
    place_BP = (norm_BP.clamp(LOWEST, HIGHEST) / LOWEST).log() * (NUM_BINS / math.log(HIGHEST / LOWEST))
    return {
        "histogram": torch.bincount(place_BP.long().clamp(max=NUM_BINS - 1).flatten(), minlength=NUM_BINS)
    }


def conclude(sums: dict[str, Tensor], layer: TokenLayer) -> Norms:
    """Quantiles and outliers."""
    histogram = sums["histogram"].double().cpu()
    reached = histogram.cumsum(0) / histogram.sum()
    median = _quantile(reached, 0.5)
    longer = _middles() > OUTLIER * median
    return Norms(median, _quantile(reached, 0.99), float(histogram[longer].sum() / histogram.sum()))


def _quantile(reached: Tensor, share: float) -> float:
    return float(_middles()[int(torch.searchsorted(reached, share))])


def _middles() -> Tensor:
    """Geometric middles of the bins."""
    exponent = (torch.arange(NUM_BINS, dtype=torch.float64) + 0.5) / NUM_BINS
    return LOWEST * (HIGHEST / LOWEST) ** exponent
