"""Which layers of two networks say the same about images? Linear CKA between all pairs of layers.

An image is described by the mean of a layer's patch tokens. The estimate is the unbiased one (Song et al.
2012, as in Nguyen et al., arXiv 2010.15327): the plain one nears 1 for unrelated features as soon as there
are more channels than images. It may fall below 0 by chance.

Shape letters: n images, D and E channels, L and M layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MIN_IMAGES = 4
"""Fewer leave nothing to estimate."""
FLAT = 1e-20
"""Variance, relative to the squared length, below which features are one and the same."""


def cka(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """CKA of each layer of one network with each of the other, float64 (L, M); NaN for a layer that does not
    vary.

    ``first`` and ``second`` hold features (n, D) of the same images by layer. Raises ``ValueError`` for fewer
    than 4 images and for features of different numbers of images.
    """
    counts = {len(features) for features in (*first, *second)}
    if len(counts) != 1 or min(counts) < MIN_IMAGES:
        raise ValueError(f"CKA needs the same images, {MIN_IMAGES} or more, on both sides, not {counts}")
    grams = [_gram(features_nD) for features_nD in first]
    others = grams if first is second else [_gram(features_nE) for features_nE in second]
    cross_LM = torch.stack([torch.stack([_hsic(gram, other) for other in others]) for gram in grams])
    own_L = torch.stack([_hsic(gram, gram) for gram in grams])
    own_M = torch.stack([_hsic(other, other) for other in others])
    return cross_LM / (own_L[:, None] * own_M).sqrt()


def _gram(features_nD: Tensor) -> Tensor:
    """(n, n), of features without their mean, which the estimate does not see but rounding does."""
    features_nD = features_nD.double()
    centred_nD = features_nD - features_nD.mean(dim=0)
    if centred_nD.square().sum() <= FLAT * features_nD.square().sum():
        return features_nD.new_zeros(len(features_nD), len(features_nD))
    return (centred_nD @ centred_nD.T).fill_diagonal_(0)


def _hsic(gram_nn: Tensor, other_nn: Tensor) -> Tensor:
    """The unbiased estimate of HSIC from two Gram matrices with empty diagonals, but for a factor."""
    n = len(gram_nn)
    rows_n, other_rows_n = gram_nn.sum(dim=1), other_nn.sum(dim=1)
    together = (gram_nn * other_nn).sum()
    apart = rows_n.sum() * other_rows_n.sum() / ((n - 1) * (n - 2))
    return together + apart - 2 / (n - 2) * rows_n @ other_rows_n
