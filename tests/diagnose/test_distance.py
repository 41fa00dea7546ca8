"""Attention distance against what is known by hand, and against a loop over all pairs."""

from __future__ import annotations

import math

import pytest
import torch

from fd_scale.diagnose.anatomy import AttentionLayer
from fd_scale.diagnose.distance import conclude, patch_distances, sums, uniform_distance
from tests.diagnose.tiny import attention


def layer(grid: tuple[int, int], prefix: int = 0, heads: int = 1, patch_px: float = 8.0) -> AttentionLayer:
    return AttentionLayer("attn", heads, grid, prefix, patch_px, is_windowed=False)


def by_loops(maps: torch.Tensor, where: AttentionLayer) -> tuple[list[float], list[float]]:
    """Both distances per head, pair by pair in float64."""
    batch, heads, _, _ = maps.shape
    height, width = where.grid
    first = where.num_prefix_tokens
    new, raw = [], []
    for head in range(heads):
        renormalised, plain, queries = 0.0, 0.0, 0
        for image in range(batch):
            for query in range(height * width):
                total = away = 0.0
                for key in range(height * width):
                    share = float(maps[image, head, first + query, first + key])
                    step = math.hypot(query // width - key // width, query % width - key % width)
                    total += share * step * where.patch_px
                    away += share if key != query else 0.0
                renormalised, plain, queries = renormalised + total / away, plain + total, queries + 1
        new.append(renormalised / queries)
        raw.append(plain / queries)
    return new, raw


@pytest.mark.parametrize(("grid", "prefix"), [((1, 2), 0), ((3, 3), 1), ((2, 5), 5), ((4, 3), 0)])
def test_random_maps_as_a_loop_has_them(grid: tuple[int, int], prefix: int) -> None:
    where = layer(grid, prefix, heads=3)
    maps = attention(2, 3, prefix + grid[0] * grid[1])
    found = conclude(sums(maps, where), where)
    new, raw = by_loops(maps.double(), where)
    # float32 rows, float64 sums; worst error seen 9e-8 relative.
    torch.testing.assert_close(found.per_head_px, torch.tensor(new, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.raw_px, torch.tensor(raw, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found.spread_px == pytest.approx(torch.tensor(new).double().std(correction=0).item(), rel=1e-5)


def test_even_attention_has_the_analytic_distance() -> None:
    where = layer((12, 12), prefix=1)
    even = torch.full((1, 1, 145, 145), 1 / 145)
    found = conclude(sums(even, where), where)
    assert found.mean_px == pytest.approx(uniform_distance((12, 12), 8.0), rel=1e-6)
    # Summed by hand over the offsets of a 12 x 12 grid: 8 sqrt(dy^2 + dx^2), (12 - |dy|)(12 - |dx|) pairs.
    by_offset = sum(
        (12 - abs(dy)) * (12 - abs(dx)) * 8 * math.hypot(dy, dx)
        for dy in range(-11, 12)
        for dx in range(-11, 12)
    )
    assert found.mean_px == pytest.approx(by_offset / (144 * 143), rel=1e-6)


def test_a_head_that_looks_one_patch_to_the_right() -> None:
    where = layer((1, 4), heads=2)
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0] = torch.eye(4).roll(1, dims=1)  # the last one looks at the first, three patches away
    maps[0, 1] = 0.75 * torch.eye(4) + 0.25 * torch.eye(4).flip(1)
    found = conclude(sums(maps, where), where)
    assert found.per_head_px.tolist() == pytest.approx([8 * 6 / 4, 8 * (3 + 1) / 2])
    # Without weighing anew, three quarters of the second head's attention count as distance 0.
    assert found.raw_px.tolist() == pytest.approx([12, 4])


def test_the_class_token_is_left_out_and_the_rest_weighed_anew() -> None:
    where = layer((1, 2), prefix=1)
    row = torch.tensor([0.9, 0.0, 0.1])
    maps = torch.stack((row, row, torch.tensor([0.9, 0.1, 0.0])))[None, None]
    found = conclude(sums(maps, where), where)
    assert found.mean_px == pytest.approx(8)
    assert float(found.raw_px) == pytest.approx(0.8)


def test_a_head_that_sees_itself_alone_has_no_distance() -> None:
    where = layer((2, 2), heads=2)
    maps = torch.stack((torch.eye(4), torch.full((4, 4), 0.25)))[None]
    found = conclude(sums(maps, where), where)
    assert math.isnan(float(found.per_head_px[0]))
    assert found.mean_px == pytest.approx(uniform_distance((2, 2), 8.0))
    assert float(found.raw_px[0]) == 0


def test_half_precision_maps_are_summed_in_float() -> None:
    where = layer((7, 7), heads=2)
    maps = attention(4, 2, 49)
    exact, rounded = (conclude(sums(m, where), where).per_head_px for m in (maps, maps.bfloat16()))
    # bfloat16 keeps 8 bits; weighing anew takes off the common part of the error. Worst seen 3e-5.
    torch.testing.assert_close(rounded, exact, rtol=5e-4, atol=0)


def test_distances_of_a_grid() -> None:
    found = patch_distances((2, 3), 4.0)
    assert found[0].tolist() == pytest.approx([0, 4, 8, 4, 4 * math.sqrt(2), 4 * math.sqrt(5)])
