"""How does the host stay ahead of the device through DeepSpeed's optimizer step?

DeepSpeed reads numbers in every step: whether the gradient is finite, up to four times, and whether it is to
be clipped; on the way it sends constants to the device, and that waits as well. Here all of it stays on the
device. The norm is computed there, with one reduction for all groups; the optimizer leaves out the step of a
gradient that is not finite (``adamw.GuardedAdamW``); and DeepSpeed is told, for the length of its step, that
every norm is good, so that it goes through the step in any case. What the step came to is read when somebody
wants to know (``meter.py``).

This was read in the versions of ``READ_IN``. With another one DeepSpeed's own step stays, which decides the
same on the host, and the engine says so. It stays, too, where the optimizer is kept in the host's memory:
gradients have to arrive there anyway.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fd_scale.engine.adamw import GuardedAdamW
from fd_scale.engine.norm import clip_by_norm, global_norm

READ_IN = ("0.19.8",)
"""Versions of DeepSpeed whose steps were read."""


def keep_ahead(deepspeed: Any) -> str | None:
    """Let steps of a DeepSpeed engine wait for nothing.

    None where they do not, or must; else why they go on to wait, for a person to read.
    """
    optimizer, inner = deepspeed.optimizer, deepspeed.basic_optimizer
    if optimizer is inner or _on_the_host(optimizer):
        return None
    if version("deepspeed") not in READ_IN:
        return (
            f"DeepSpeed {version('deepspeed')} decides on the host whether a gradient is finite, and every "
            f"step waits for that; with {' or '.join(READ_IN)} none does"
        )
    prepare = _PREPARE.get(type(optimizer).__name__)
    if prepare is None or not isinstance(inner, GuardedAdamW):
        return f"every step of {type(inner).__name__} in {type(optimizer).__name__} waits for the device"
    prepare(optimizer, inner)
    return None


# ------------------------------------------------------------------------- one of DeepSpeed's optimizers each


def _stages_1_and_2(optimizer: Any, inner: GuardedAdamW) -> None:
    """Each rank holds its partition's gradients, a list for each group."""

    def norm() -> Tensor:
        return global_norm(_flat(optimizer.averaged_gradients), optimizer.dp_process_group)

    optimizer.check_grad_overflow = False
    optimizer.scaled_global_norm = norm
    _lead(optimizer, inner, is_invalid_grad_norm=_never)


def _stage_3(optimizer: Any, inner: GuardedAdamW) -> None:
    """Each rank holds its share of every gradient, a list for each sub-group."""

    def norms() -> list[Tensor]:
        return [global_norm(_flat(optimizer.averaged_gradients), optimizer.dp_process_group)]

    optimizer._get_norm_groups = norms
    _lead(optimizer, inner, is_invalid_grad_norm=_never)


def _stage_1_wide(optimizer: Any, inner: GuardedAdamW) -> None:
    """bf16 with float32 sums: every rank holds all gradients, already averaged."""

    def norm(input_tensors: Iterable[Tensor], **_: Any) -> Tensor:
        return global_norm(input_tensors)

    def clip(input_tensors: Iterable[Tensor], max_norm: float, global_norm: Tensor, **_: Any) -> None:
        clip_by_norm(input_tensors, max_norm, global_norm)

    _lead(
        optimizer,
        inner,
        is_invalid_grad_norm=_never,
        get_global_norm_of_tensors=norm,
        clip_tensors_by_global_norm=clip,
    )


def _replicated(optimizer: Any, inner: Any) -> None:
    """Stage 0 in bf16: whole float32 copies, which the inner optimizer clips and guards by itself."""

    @torch.no_grad()
    def step(closure: None = None) -> None:
        pairs = [
            (wide, narrow)
            for group in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
            for wide, narrow in zip(*group, strict=True)
        ]
        for wide, narrow in pairs:
            wide.grad = torch.zeros_like(wide) if narrow.grad is None else narrow.grad.to(wide.dtype)
        inner.step()
        optimizer._global_grad_norm = inner._global_grad_norm
        for wide, narrow in pairs:
            wide.grad = None
            narrow.copy_(wide)

    optimizer.step = step


_PREPARE: dict[str, Callable[[Any, Any], None]] = {
    "DeepSpeedZeroOptimizer": _stages_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
    "BF16_Optimizer": _stage_1_wide,
    "FP16_UnfusedOptimizer": _replicated,
}


def _lead(optimizer: Any, inner: GuardedAdamW, **answers: Callable[..., Any]) -> None:
    """Let ``inner`` decide by the norm that DeepSpeed keeps, and DeepSpeed's step hear these answers."""
    inner.norm = lambda: optimizer._global_grad_norm
    original = optimizer.step

    def step(closure: None = None) -> None:
        with _answering(sys.modules[type(optimizer).__module__], answers):
            original()

    optimizer.step = step


@contextmanager
def _answering(module: Any, answers: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """With other functions under these names of a module, for no longer than a step."""
    own = {name: getattr(module, name) for name in answers}
    vars(module).update(answers)
    try:
        yield
    finally:
        vars(module).update(own)


def _never(norm: Tensor) -> bool:
    """Whether a norm is invalid, to DeepSpeed."""
    return False


def _flat(groups: dict[int, list[Tensor]]) -> Iterator[Tensor]:
    return (gradient for gradients in groups.values() for gradient in gradients)


def _on_the_host(optimizer: Any) -> bool:
    return getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
