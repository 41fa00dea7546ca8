"""AdamW as the engine wants it: it clips where DeepSpeed does not, and a step that is to change nothing is
decided on the device, so that the host need not wait to learn it.

The decision is a tensor that PyTorch's fused AdamW reads where it computes: parameters, moments and step
counts stay as they are, bit for bit. Who says what the norm is, where the parameters are sharded, is
``ahead.py``'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fd_scale.engine.norm import clip_by_norm, global_norm, is_finite
from fd_scale.run.recipe import Optim


class MakeOptimizer(Protocol):
    """Builds an optimizer over parameter groups, which begins at learning rate 0."""

    def __call__(
        self, groups: list[dict[str, Any]], spec: Optim, *, clip_here: bool
    ) -> torch.optim.Optimizer:
        """``clip_here``: it steps on whole float32 parameters, and DeepSpeed leaves clipping to it."""


def adamw(groups: list[dict[str, Any]], spec: Optim, *, clip_here: bool) -> GuardedAdamW:
    """AdamW over parameter groups that carry their own ``weight_decay``.

    The learning rate starts at 0, since DeepSpeed's replicated bf16 optimizer takes one step on zero
    gradients while it is being built, which would decay the weights; the engine sets it for every step.
    ``clip_here`` is for ZeRO stage 0, where DeepSpeed would clip after it has read the norm, or not at all.

    Which of PyTorch's implementations runs is said here and not left to it: the fused one, on a GPU and on a
    CPU. It alone can leave a step out without a number being read, neither of the gradient nor of its step
    count. Others (foreach, and the FusedAdam of DeepSpeed and of apex) are timed by ``benchmarks/step.py
    --parts``.
    """
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": spec.betas,
        "eps": spec.eps,
        "fused": True,
        "foreach": False,
    }
    return (
        ClippingAdamW(groups, clip_norm=spec.clip_norm, **options)
        if clip_here
        else GuardedAdamW(groups, **options)
    )


def reset_steps(optimizer: torch.optim.Optimizer) -> None:
    """Forget steps taken while the engine was being built (see ``adamw``)."""
    for state in optimizer.state.values():
        state["step"].zero_()


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that changes nothing where the norm of the whole gradient is not finite.

    ``norm`` is asked for it in every step; without one every step counts.
    """

    norm: Callable[[], Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on gradients that are already averaged over ranks; ``closure`` is not used."""
        if self.norm is not None:
            # What the fused step asks for, 1 or 0, where gradients are scaled against underflow.
            self.found_inf = (~is_finite(self.norm())).float()
        super().step()


class ClippingAdamW(GuardedAdamW):
    """The same for whole parameters, which clips by their gradients' global norm.

    That norm, before clipping, is ``_global_grad_norm``, the name under which DeepSpeed looks for it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip_norm = clip_norm
        self._global_grad_norm: Tensor | None = None
        self.norm = lambda: clip(self)


def clip(optimizer: Any) -> Tensor:
    """Clip an optimizer's gradients by their global norm to its ``clip_norm``, if it has one; the norm before
    that, kept where DeepSpeed looks for it."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = global_norm(gradients)
    if optimizer.clip_norm is not None:
        clip_by_norm(gradients, optimizer.clip_norm, norm)
    optimizer._global_grad_norm = norm
    return norm
