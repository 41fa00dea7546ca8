"""CKA against its definition as a mean over distinct images, written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fd_scale.diagnose.similarity import cka


def features(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 3


def hsic(one: Tensor, other: Tensor) -> float:
    """The U-statistic of Song et al.: means over 2, 3 and 4 distinct images."""
    first, second = (x.double() @ x.double().T for x in (one, other))
    count = range(len(one))
    pairs = [first[i, j] * second[i, j] for i, j in itertools.permutations(count, 2)]
    triples = [first[i, j] * second[i, k] for i, j, k in itertools.permutations(count, 3)]
    fours = [first[i, j] * second[k, m] for i, j, k, m in itertools.permutations(count, 4)]
    return float(sum(pairs) / len(pairs) - 2 * sum(triples) / len(triples) + sum(fours) / len(fours))


@pytest.mark.parametrize("count", [4, 7])
def test_all_pairs_of_layers_as_defined(count: int) -> None:
    first = [features(count, 3, 0), features(count, 5, 1)]
    second = [features(count, 4, 2), first[0] * 2, first[1] + 0.5 * features(count, 5, 3)]
    expected = [[hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5 for b in second] for a in first]
    # Sums of cubes of numbers near 10; worst error seen 4e-12.
    torch.testing.assert_close(
        cka(first, second), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_rotation_scale_and_shift_change_nothing() -> None:
    given = features(20, 6, 0).double()
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(5)).double())
    assert float(cka([given], [3 * given @ rotation - 100])) == pytest.approx(1, abs=1e-9)


def test_unrelated_features_are_near_0_though_channels_outnumber_images() -> None:
    found = [float(cka([features(30, 300, seed)], [features(30, 300, seed + 100)])) for seed in range(5)]
    # The plain estimate is above 0.9 here.
    assert sum(found) / 5 == pytest.approx(0, abs=0.05)


def test_features_that_do_not_vary_have_no_similarity() -> None:
    found = cka([torch.full((9, 3), 0.7), features(9, 3, 0)], [features(9, 3, 0)])
    assert found[0].isnan().all()
    assert float(found[1]) == pytest.approx(1)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (5, 6)])
def test_too_few_or_unequal_images_are_refused(first: int, second: int) -> None:
    with pytest.raises(ValueError, match="4 or more, on both sides"):
        cka([features(first, 2, 0)], [features(second, 2, 1)])
