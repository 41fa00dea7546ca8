"""Position tables for another input size: relative ones by splines, absolute ones bicubically.

A relative table is stretched as in BEiT's and FD's code: its entries are placed at offsets that grow in
geometric progression up to the new grid's largest offset, so that near offsets keep their values and far ones
are stretched; a cubic spline through them is read at the new offsets. FD's code does so by a function that
SciPy has removed. At equal size it is the identity.

Shape letters: R rows of a table, H heads, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline
from scipy.optimize import brentq
from timm.layers import resample_abs_pos_embed
from torch import Tensor

Grid = tuple[int, int]
"""(height, width) in patches."""

NUM_CLS_ROWS = 3
"""Rows after the offsets: class token to patch, patch to class token, class token to itself."""
TABLE = "relative_position_bias_table"
ABSOLUTE = "pos_embed"


def resized(state: Mapping[str, Tensor], from_grid: Grid, to_grid: Grid) -> dict[str, Tensor]:
    """A state dict with every position table of ``from_grid`` fitted to ``to_grid``; the rest as it is, such
    as tables of windows."""
    fitted = dict(state)
    if from_grid == to_grid:
        return fitted
    for name, value in state.items():
        if name.endswith(TABLE) and len(value) == _num_rows(from_grid):
            fitted[name] = resize_relative(value, from_grid, to_grid)
        elif name.rpartition(".")[2] == ABSOLUTE:
            fitted[name] = resize_absolute(value, from_grid, to_grid)
    return fitted


def resize_relative(table_RH: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """A table ((2h-1)(2w-1) + 3, H) for another grid, in its dtype; the class token's rows are kept."""
    rows, columns = (2 * side - 1 for side in from_grid)
    if len(table_RH) != _num_rows(from_grid):
        raise ValueError(
            f"a relative position table of {len(table_RH)} rows is not one of a {from_grid[0]}x"
            f"{from_grid[1]} grid with a class token, which has {_num_rows(from_grid)}"
        )
    places = [_offsets(before, after) for before, after in zip(from_grid, to_grid, strict=True)]
    wanted = [np.arange(1 - side, side, dtype=np.float64) for side in to_grid]
    values = table_RH[:-NUM_CLS_ROWS].detach().cpu().double().view(rows, columns, -1).numpy()
    order = [min(3, len(place) - 1) for place in places]
    heads = [_spline(places, values[..., head], order, wanted) for head in range(values.shape[2])]
    stretched = torch.from_numpy(np.stack(heads, axis=-1)).flatten(0, 1)
    return torch.cat((stretched.to(table_RH), table_RH[-NUM_CLS_ROWS:]))


def resize_absolute(table_1ND: Tensor, from_grid: Grid, to_grid: Grid) -> Tensor:
    """Absolute positions (1, prefix + h w, D) for another grid, bicubic; those of prefix tokens are kept."""
    prefix = table_1ND.shape[1] - from_grid[0] * from_grid[1]
    if prefix < 0:
        raise ValueError(
            f"{table_1ND.shape[1]} absolute positions are not those of a {from_grid[0]}x{from_grid[1]} grid"
        )
    if from_grid == to_grid:
        return table_1ND
    return resample_abs_pos_embed(
        table_1ND, new_size=list(to_grid), old_size=list(from_grid), num_prefix_tokens=prefix
    )


def _num_rows(grid: Grid) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + NUM_CLS_ROWS


def _offsets(before: int, after: int) -> np.ndarray:
    """Where the offsets 1 - ``before`` to ``before`` - 1 lie on the new grid: 0, 1, 1 + q, 1 + q + q^2 ...
    to both sides, up to ``after`` - 1. A grid of two has one offset to each side, which is put there."""
    if before <= 2:
        return np.arange(1.0 - before, before) * (after - 1)
    steps, reach = np.arange(before - 1), after - 1

    def surplus(ratio: float) -> float:
        return float((ratio**steps).sum()) - reach

    if surplus(0.0) >= 0:
        raise ValueError(f"a grid of {after} is too small for positions of a grid of {before}")
    ratio = brentq(surplus, 0.0, float(max(2, reach)), xtol=1e-15)
    if before == after:
        ratio = 1.0
    side = np.cumsum(ratio**steps)
    return np.concatenate((-side[::-1], [0.0], side))


def _spline(
    places: list[np.ndarray], values: np.ndarray, order: list[int], wanted: list[np.ndarray]
) -> np.ndarray:
    if min(order) == 0:
        raise ValueError("a grid of 1 has no offsets to stretch")
    return RectBivariateSpline(*places, values, kx=order[0], ky=order[1], s=0)(*wanted)
