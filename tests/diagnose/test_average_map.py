"""The mean map and its two scores, on maps whose pattern is known."""

from __future__ import annotations

import math

import pytest
import torch

from fd_scale.diagnose.anatomy import AttentionLayer
from fd_scale.diagnose.average_map import column_dominance, conclude, diagonality, sums
from tests.diagnose.tiny import attention


def toeplitz(height: int, width: int) -> torch.Tensor:
    """A map that depends on the offset alone."""
    table = torch.rand(2 * height - 1, 2 * width - 1, generator=torch.Generator().manual_seed(1)).double()
    places = [(y, x) for y in range(height) for x in range(width)]
    return torch.stack([torch.stack([table[q[0] - k[0], q[1] - k[1]] for k in places]) for q in places])


@pytest.mark.parametrize("grid", [(1, 3), (3, 3), (2, 5)])
def test_a_toeplitz_map_is_all_diagonal(grid: tuple[int, int]) -> None:
    found = toeplitz(*grid)
    assert diagonality(found, grid) == pytest.approx(1, abs=1e-12)
    assert column_dominance(found) < 0.9


def test_a_map_of_equal_rows_is_all_columns() -> None:
    row = torch.tensor([0.5, 0.1, 0.1, 0.3]).double()
    assert column_dominance(row.expand(4, 4)) == pytest.approx(1, abs=1e-12)
    assert diagonality(row.expand(4, 4), (2, 2)) < 0.9


def test_an_even_map_has_no_pattern() -> None:
    even = torch.full((9, 9), 1 / 9)
    assert math.isnan(diagonality(even, (3, 3)))
    assert math.isnan(column_dominance(even))


def test_scores_are_shares_of_variance() -> None:
    found = attention(1, 1, 6)[0, 0].double()
    columns = found.mean(dim=0).expand(6, 6)
    assert column_dominance(found) == pytest.approx(
        float(columns.var(correction=0) / found.var(correction=0)), rel=1e-9
    )
    by_offset: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for query in range(6):
        for key in range(6):
            offset = (query // 3 - key // 3, query % 3 - key % 3)
            by_offset.setdefault(offset, []).append((query, key))
    explained = found.clone()
    for places in by_offset.values():
        mean = sum(found[place] for place in places) / len(places)
        for place in places:
            explained[place] = mean
    assert diagonality(found, (2, 3)) == pytest.approx(
        float(explained.var(correction=0) / found.var(correction=0)), rel=1e-9
    )


def test_the_mean_is_over_images_and_heads_without_prefix_tokens() -> None:
    layer = AttentionLayer("attn", 3, (2, 2), 2, 8.0, is_windowed=False)
    maps = attention(5, 3, 6)
    found = conclude(sums(maps, layer), layer)
    torch.testing.assert_close(found.map_QK, maps.double().mean(dim=(0, 1))[2:, 2:], rtol=1e-12, atol=0)
    # What patches give to the two prefix tokens; rows of float32 sum to 1 within 1e-7.
    assert found.prefix_share == pytest.approx(float(maps.double()[:, :, 2:, :2].sum(-1).mean()), abs=1e-6)
