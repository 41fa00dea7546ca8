"""What do the hot operations of an architecture compute?

Each operation is here in its plain form: a few lines of PyTorch, exact in float64, the reference of every
faster form. Architectures take an ``Ops`` in their constructor and call nothing else in their hot paths, so a
faster kernel is handed in by whoever builds the network, and nothing is patched. The forms of attention, and
the choice between them, are in ``attention.py``.

Shapes: H heads, N query tokens, M key tokens, R rows of a position table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention, attention


@dataclass(frozen=True)
class Ops:
    """The hot operations that an architecture calls."""

    attention: Attention = attention


DEFAULT_OPS = Ops()


def relative_position_rows(grid: tuple[int, int]) -> int:
    """Rows of a position table for ``grid`` = (height, width) and a class token: (2h - 1)(2w - 1) + 3."""
    height, width = grid
    return (2 * height - 1) * (2 * width - 1) + 3


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Which row of the position table serves which pair of tokens: int64 (N, N), query row and key column.

    ``grid`` is (height, width) in patches; N = 1 + height * width, the class token first, patches row by row.
    A pair of patches at the offset (dy, dx) = query - key has row ``(dy + h - 1) (2w - 1) + (dx + w - 1)``.
    The last three rows are class -> patch, patch -> class, class -> class (query -> key), as in BEiT.
    """
    height, width = grid
    y, x = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index_NN = torch.empty(1 + height * width, 1 + height * width, dtype=torch.long)
    index_NN[1:, 1:] = (dy + height - 1) * (2 * width - 1) + (dx + width - 1)
    rows = relative_position_rows(grid)
    index_NN[0, 1:], index_NN[1:, 0], index_NN[0, 0] = rows - 3, rows - 2, rows - 1
    return index_NN


def gather_bias(table_RH: Tensor, index_NM: Tensor) -> Tensor:
    """The bias of every head and pair of tokens, contiguous (1, H, N, M), from a table (R, H)."""
    rows_by_head = table_RH[index_NM.flatten()].view(*index_NM.shape, -1)
    return rows_by_head.permute(2, 0, 1).contiguous().unsqueeze(0)
