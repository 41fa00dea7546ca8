"""What do the hot operations of an architecture compute?

Each operation is here in its plain form: a few lines of PyTorch, exact in float64, the reference of every
faster form. Architectures take an ``Ops`` in their constructor and call nothing else in their hot paths, so a
faster kernel is handed in by whoever builds the network, and nothing is patched. Which kernel suits which
device beyond the default below is the caller's knowledge.

Shapes: B batch, H heads, N query tokens, M key tokens, D width of a head, R rows of a position table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


class Attention(Protocol):
    """Softmax attention with an optional additive bias: ``softmax(scale * q k^T + bias) v``."""

    def __call__(
        self, query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
    ) -> Tensor:
        """(B, H, N, D) in the query's dtype. ``bias`` broadcasts to (B, H, N, M), in any floating dtype; it
        may need a gradient. ``scale`` multiplies the logits before the bias is added."""


def explicit_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention`` written out. The bias and the softmax are in float32 for half-precision inputs, else in
    the input's own dtype."""
    logits_BHNM = (query_BHND * scale) @ key_BHMD.transpose(-2, -1)
    logits_BHNM = logits_BHNM.to(torch.promote_types(logits_BHNM.dtype, torch.float32))
    if bias is not None:
        logits_BHNM = logits_BHNM + bias
    return logits_BHNM.softmax(dim=-1).to(value_BHMD.dtype) @ value_BHMD


def fused_attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention`` by PyTorch's scaled dot product, with the bias cast to the query's dtype."""
    if bias is None:
        return F.scaled_dot_product_attention(query_BHND, key_BHMD, value_BHMD, scale=scale)
    # Left to itself PyTorch may take cuDNN, which misreads a bias of another dtype, gives the bias no
    # gradient, and has returned NaN for some token counts. The memory-efficient kernel has none of these
    # faults; "math" serves float64.
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(
            query_BHND, key_BHMD, value_BHMD, attn_mask=bias.to(query_BHND.dtype), scale=scale
        )


def attention(
    query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """``Attention``, the default: written out on the CPU, where PyTorch's fused form is slower with a
    bias and no faster without; fused elsewhere."""
    form = explicit_attention if query_BHND.device.type == "cpu" else fused_attention
    return form(query_BHND, key_BHMD, value_BHMD, bias, scale=scale)


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
