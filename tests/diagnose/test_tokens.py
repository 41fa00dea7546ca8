"""Questions about tokens: similarity, norms and spectrum against direct computation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fd_scale.diagnose import norms, spectrum, token_similarity
from fd_scale.diagnose.anatomy import TokenLayer

LAYER = TokenLayer("block", (3, 2), 1)


def tokens(batch: int = 4, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, 7, width, generator=torch.Generator().manual_seed(seed)) + 0.5


def test_token_similarity_is_the_mean_over_pairs() -> None:
    given = tokens()
    pairs = [
        torch.cosine_similarity(image[one], image[other], dim=0)
        for image in given.double()
        for one, other in itertools.permutations(range(1, 7), 2)
    ]
    found = token_similarity.conclude(token_similarity.sums(given, LAYER), LAYER)
    assert found.cosine == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-9)


def test_equal_tokens_are_alike_and_a_single_one_has_no_pair() -> None:
    same = torch.ones(2, 7, 3)
    assert token_similarity.conclude(token_similarity.sums(same, LAYER), LAYER).cosine == pytest.approx(1)
    one = TokenLayer("block", (1, 1), 0)
    found = token_similarity.conclude(token_similarity.sums(torch.ones(2, 1, 3), one), one)
    assert math.isnan(found.cosine)


def test_norms_and_outliers() -> None:
    given = torch.zeros(50, 7, 3)
    given[:, 1:, 0] = torch.linspace(1, 2, 300).view(50, 6)
    given[:3, 1, 0] = 40.0
    given[:, 0, 0] = 1000.0  # the class token has no say
    found = norms.conclude(norms.sums(given, LAYER), LAYER)
    lengths = given[:, 1:, 0].flatten()
    # Within one bin of 0.56 %, and half a step of the sorted values.
    assert found.median == pytest.approx(float(lengths.median()), rel=0.006)
    assert found.p99 == pytest.approx(float(lengths.sort().values[296]), rel=0.006)
    assert found.outlier_share == pytest.approx(3 / 300)


@pytest.mark.parametrize("length", [0.0, 1e-9, 1e9])
def test_norms_beyond_the_histogram_are_in_its_outermost_bins(length: float) -> None:
    found = norms.conclude(norms.sums(torch.full((2, 7, 1), length), LAYER), LAYER)
    assert found.outlier_share == 0
    assert norms.LOWEST < found.median < norms.HIGHEST


def test_spectrum_is_that_of_the_covariance() -> None:
    given = tokens(width=4)
    flat = given[:, 1:].flatten(0, 1).double()
    expected = torch.linalg.eigvalsh(torch.cov(flat.T, correction=0)).flip(0)
    shares = expected / expected.sum()
    found = spectrum.conclude(spectrum.sums(given, LAYER), LAYER)
    torch.testing.assert_close(found.variance_shares, shares, rtol=1e-9, atol=1e-12)
    assert found.effective_rank == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-9)
    assert found.directions_for(0.5) == int((shares.cumsum(0) < 0.5).sum()) + 1


def test_effective_rank_of_a_line_and_of_a_ball() -> None:
    direction = torch.tensor([1.0, -2.0, 3.0])
    line = torch.randn(2, 7, 1, generator=torch.Generator().manual_seed(0)) * direction + 5
    assert spectrum.conclude(spectrum.sums(line, LAYER), LAYER).effective_rank == pytest.approx(1, abs=1e-6)
    cross = torch.cat((torch.eye(3), -torch.eye(3))).expand(2, 6, 3)
    ball = spectrum.conclude(spectrum.sums(cross, TokenLayer("block", (3, 2), 0)), LAYER)
    assert ball.effective_rank == pytest.approx(3)


def test_tokens_that_do_not_vary_have_no_rank() -> None:
    found = spectrum.conclude(spectrum.sums(torch.full((3, 7, 4), 7.7), LAYER), LAYER)
    assert math.isnan(found.effective_rank)
    assert found.variance_shares.tolist() == [0] * 4
