"""Indices and biases of relative positions against loops."""

from __future__ import annotations

import pytest
import torch

from models.ops import gather_bias, relative_position_index, relative_position_rows

GRIDS = [(1, 1), (1, 4), (3, 2), (5, 7), (14, 14)]


@pytest.mark.parametrize("grid", GRIDS)
def test_index_is_the_offset_of_query_from_key(grid):
    height, width = grid
    index = relative_position_index(grid)
    rows = (2 * height - 1) * (2 * width - 1) + 3
    assert relative_position_rows(grid) == rows
    assert index.dtype == torch.long
    assert index.shape == (1 + height * width, 1 + height * width)
    for query in range(1 + height * width):
        for key in range(1 + height * width):
            if query == 0 and key == 0:
                expected = rows - 1
            elif query == 0:
                expected = rows - 3
            elif key == 0:
                expected = rows - 2
            else:
                dy = (query - 1) // width - (key - 1) // width
                dx = (query - 1) % width - (key - 1) % width
                expected = (dy + height - 1) * (2 * width - 1) + (dx + width - 1)
            assert index[query, key] == expected


@pytest.mark.parametrize(("grid", "rows"), [((14, 14), 732), ((16, 16), 964)])
def test_tables_have_the_published_number_of_rows(grid, rows):
    assert relative_position_rows(grid) == rows
    # One patch has one class -> patch pair, so every row serves some pair in any grid.
    assert relative_position_index(grid).unique().tolist() == list(range(rows))


def test_bias_is_the_table_row_of_each_pair_and_its_gradient_the_sum_over_pairs():
    index = relative_position_index((2, 3))
    table = torch.randn(relative_position_rows((2, 3)), 3, dtype=torch.float64, requires_grad=True)
    bias = gather_bias(table, index)
    assert bias.shape == (1, 3, 7, 7)
    assert bias.is_contiguous()
    weight = torch.randn_like(bias)
    (bias * weight).sum().backward()
    expected = torch.zeros_like(table)
    for head in range(3):
        for query in range(7):
            for key in range(7):
                assert bias[0, head, query, key] == table[index[query, key], head]
                expected[index[query, key], head] += weight[0, head, query, key]
    # Sums of at most 12 float64 terms of size 1, in another order: 12 roundings of 2e-16. Seen: 0.
    torch.testing.assert_close(table.grad, expected, rtol=0, atol=1e-14)
