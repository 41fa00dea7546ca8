"""How large is a gradient, may it be stepped on, and clipped to how much? Answered on its device, unread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def global_norm(gradients: Iterable[Tensor], group: Any = None) -> Tensor:
    """L2 norm of gradients as one float32 scalar on their device, summed over the processes of ``group``.

    Squares are summed in float64, as PyTorch's sums in float32 are off by 7e-5 at 65,537 elements on a CPU.
    Not finite where a gradient is not, or where the norm is beyond float32.
    """
    norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float64)
    total = torch.stack(norms).square().sum()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total.sqrt().float()


def is_finite(norm: Tensor) -> Tensor:
    """Whether a gradient of this norm may be stepped on, bool. DeepSpeed says inf or -1 where it may not."""
    return torch.isfinite(norm) & (norm >= 0)


def clip_by_norm(gradients: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients of this norm down to ``max_norm`` in place, as ``clip_grad_norm_`` of PyTorch does."""
    torch._foreach_mul_(list(gradients), (max_norm / (norm + 1e-6)).clamp(max=1.0))
