"""AdamW as the engine wants it: fused on a GPU, and able to clip and to skip where DeepSpeed does neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fd_scale.run.recipe import Optim


class MakeOptimizer(Protocol):
    """Builds an optimizer over parameter groups, which begins at learning rate 0."""

    def __call__(
        self, groups: list[dict[str, Any]], spec: Optim, device: torch.device, *, clip_here: bool
    ) -> torch.optim.Optimizer:
        """``clip_here``: the parameters are whole and float32, and DeepSpeed leaves clipping to it."""


def adamw(
    groups: list[dict[str, Any]], spec: Optim, device: torch.device, *, clip_here: bool
) -> torch.optim.AdamW:
    """AdamW over parameter groups that carry their own ``weight_decay``.

    The learning rate starts at 0, since DeepSpeed's replicated bf16 optimizer takes one step on zero
    gradients while it is being built, which would decay the weights; the engine sets it for every step.
    ``clip_here`` is for ZeRO stage 0 in float32, which is plain PyTorch to DeepSpeed.

    Which of PyTorch's implementations runs is said here and not left to it: the fused kernel on a GPU, which
    reads no number of the device, and one tensor after the other elsewhere. Others (foreach, and the
    FusedAdam of DeepSpeed and of apex) are timed by ``benchmarks/step.py --parts``.
    """
    options: dict[str, Any] = {
        "lr": 0.0,
        "betas": spec.betas,
        "eps": spec.eps,
        "fused": device.type == "cuda",
        "foreach": False,
    }
    if clip_here:
        return ClippingAdamW(groups, clip_norm=spec.clip_norm, **options)
    return torch.optim.AdamW(groups, **options)


def reset_steps(optimizer: torch.optim.Optimizer) -> None:
    """Forget steps taken while the engine was being built (see ``adamw``)."""
    for state in optimizer.state.values():
        state["step"].zero_()


class ClippingAdamW(torch.optim.AdamW):
    """AdamW that clips by global norm and leaves everything untouched when the norm is not finite.

    It speaks the two words that DeepSpeed reads off an optimizer: ``overflow`` (the step was skipped) and
    ``_global_grad_norm`` (before clipping).
    """

    def __init__(self, groups: list[dict[str, Any]], *, clip_norm: float | None, **options: Any) -> None:
        super().__init__(groups, **options)
        self.clip_norm = clip_norm
        self.overflow = False
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on gradients that are already averaged over ranks; ``closure`` is not used."""
        if clipped_or_skipped(self):
            super().step()


def clipped_or_skipped(optimizer: Any) -> bool:
    """Clip an optimizer's gradients by their global norm to its ``clip_norm``, or find the norm not finite.

    Sets the two words that DeepSpeed reads off an optimizer. False where the step is to be skipped.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    optimizer._global_grad_norm = norm
    optimizer.overflow = not bool(torch.isfinite(norm))
    if not optimizer.overflow and optimizer.clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, optimizer.clip_norm, norm)
    return not optimizer.overflow
