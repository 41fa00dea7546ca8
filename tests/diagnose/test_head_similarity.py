"""Similarity of heads: 0 and 1 where they must be, and a loop over pairs in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fd_scale.diagnose.anatomy import AttentionLayer
from fd_scale.diagnose.head_similarity import HeadSimilarity, conclude, sums
from tests.diagnose.tiny import attention


def similarity(maps: Tensor, grid: tuple[int, int], prefix: int = 0) -> HeadSimilarity:
    layer = AttentionLayer("attn", maps.shape[1], grid, prefix, 8.0, is_windowed=False)
    return conclude(sums(maps, layer), layer)


def one_hot(targets: list[int]) -> Tensor:
    """Each query looks at one key."""
    return torch.nn.functional.one_hot(torch.tensor(targets), len(targets)).float()


def test_identical_heads_are_1() -> None:
    maps = one_hot([2, 0, 0, 3]).expand(3, 4, 4, 4)
    # Within the rounding of a float32 square root.
    assert values(similarity(maps, (2, 2))) == pytest.approx([1, 1, 1], abs=1e-6)


def test_disjoint_heads_are_0() -> None:
    maps = torch.stack((one_hot([0, 0, 1, 1]), one_hot([2, 2, 3, 3])))[None]
    assert values(similarity(maps, (2, 2))) == [0, 0, 0]


def test_columns_and_rows_tell_different_things() -> None:
    # Both heads share the key 0, but no query looks there in both: rows are disjoint, columns partly alike.
    maps = torch.stack((one_hot([0, 0, 1]), one_hot([2, 0, 0])))[None]
    found = similarity(maps, (1, 3))
    assert found.rows == pytest.approx(1 / 3)
    assert found.columns == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert found.maps == pytest.approx(1 / 3)


def test_one_head_has_no_pair() -> None:
    found = similarity(attention(2, 1, 4), (2, 2))
    assert all(math.isnan(value) for value in values(found))


@pytest.mark.parametrize(("heads", "grid", "prefix"), [(2, (1, 1), 1), (3, (3, 2), 1), (5, (2, 2), 4)])
def test_random_maps_as_a_loop_has_them(heads: int, grid: tuple[int, int], prefix: int) -> None:
    maps = attention(3, heads, prefix + grid[0] * grid[1])
    patches = maps.double()[:, :, prefix:, prefix:]
    cosines: dict[str, list[float]] = {"columns": [], "rows": [], "maps": []}
    for image in patches:
        for one, other in itertools.combinations(image, 2):
            cosines["maps"].append(cosine(one.flatten(), other.flatten()))
            for token in range(grid[0] * grid[1]):
                cosines["columns"].append(cosine(one[:, token], other[:, token]))
                cosines["rows"].append(cosine(one[token], other[token]))
    found = similarity(maps, grid, prefix)
    for kind, each in cosines.items():
        # float32 vectors; worst error seen 1e-7.
        assert getattr(found, kind) == pytest.approx(sum(each) / len(each), rel=1e-6)


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


def values(found: HeadSimilarity) -> list[float]:
    return [found.columns, found.rows, found.maps]
