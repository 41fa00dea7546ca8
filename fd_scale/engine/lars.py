"""LARS, as the linear probe of MAE and FD wants it: with a trust ratio although nothing is decayed.

timm's LARS leaves the ratio out when the weight decay is 0, which is the probe's protocol, and is then plain
momentum. Here it depends on the shape alone: matrices have it, biases have not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fd_scale.engine.adamw import clip
from fd_scale.engine.norm import is_finite
from fd_scale.run.recipe import Optim

MOMENTUM = 0.9
TRUST = 0.001
"""Trust coefficient (MAE's and FD's protocol)."""


def lars(groups: list[dict[str, Any]], spec: Optim, *, clip_here: bool) -> Lars:
    """LARS over parameter groups, for whole parameters (ZeRO stage 0); clips only where asked.

    Raises ``ValueError`` where the engine shards: the ratio is of a whole matrix.
    """
    if not clip_here:
        raise ValueError("LARS needs whole parameters: ZeRO stage 0")
    return Lars(groups, clip_norm=spec.clip_norm)


class Lars(torch.optim.Optimizer):
    """Momentum on gradients that a trust ratio has scaled, ``TRUST`` x norm of the weights / norm of the
    update; 1 where either norm is 0 and for vectors.

    A gradient that is not finite changes nothing, as in ``adamw``, and no number is read to learn it.
    """

    moments = ("momentum_buffer",)
    """State per element, for checkpoints."""

    def __init__(
        self, groups: list[dict[str, Any]], *, momentum: float = MOMENTUM, clip_norm: float | None = None
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})
        self.clip_norm = clip_norm
        self._global_grad_norm: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on gradients that are already averaged over ranks; ``closure`` is not used."""
        applied = is_finite(clip(self))
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group, applied)

    def _update(self, parameter: Tensor, update: Tensor, group: dict[str, Any], applied: Tensor) -> None:
        if parameter.ndim > 1:
            update = update.add(parameter, alpha=group["weight_decay"])
            weight, change = parameter.norm(), update.norm()
            ratio = torch.where((weight > 0) & (change > 0), TRUST * weight / change, 1.0)
            update = update * ratio
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += applied
        momentum = state["momentum_buffer"] * group["momentum"] + update
        state["momentum_buffer"].copy_(torch.where(applied, momentum, state["momentum_buffer"]))
        parameter.copy_(torch.where(applied, parameter - group["lr"] * momentum, parameter))
