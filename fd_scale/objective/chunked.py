"""The loss of projected tokens, where no projected map is ever whole in memory.

A projected map, and its gradient, are as large as the teacher's map, and every head has its own. Here a few
thousand tokens at a time are projected and compared, and become gradients at once: of the projector, added up
in float32, and of the student's tokens, in one buffer for all heads of a grid. Backward only multiplies by
the factor that arrives. Values and gradients are those of ``Objective`` behind ``models.projector``; what is
kept for backward is one gradient of the student's tokens and one of each projector.

Whether that pays is the scale's to say (``fd_scale.loss_chunk_tokens``); the loss of a piece is the kernel's.

Shape letters: B images, M selected tokens, D student channels, C teacher channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.objective import kernels
from fd_scale.objective.losses import Objective
from fd_scale.objective.targets import WHITEN_EPS, for_kernels, working_dtype
from models.projector import Projector

NUM_INPUTS = 6


@dataclass(frozen=True)
class ChunkedLoss:
    """The loss of one batch, which a student is handed and computes in the place of its maps.

    ``taught`` and ``valid_B`` are what ``Objective`` takes: (B, M, C) per teacher, an embedding (B, 1, E)
    last where the recipe has one, and bool.
    ``chunk_tokens``: tokens that are projected at a time, 1 or more.
    """

    objective: Objective
    taught: Sequence[Tensor]
    valid_B: Tensor
    chunk_tokens: int

    @property
    def maps(self) -> Sequence[Tensor]:
        """What is taught but the embedding, which comes last where the recipe has one."""
        return self.taught[:-1] if self.objective.spec.embedding_weight > 0 else self.taught

    def __call__(
        self, tokens_BMD: Tensor, projectors: Sequence[Projector], embedding_B1E: Tensor | None = None
    ) -> Tensor:
        """The mean over teachers, plus the embedding's distance where there is one: a scalar, float32 or
        float64; differentiable once.

        Raises ``ValueError`` for maps that do not fit each other, and for float16, whose gradients would
        round to zero.
        """
        embeds = len(self.maps) < len(self.taught)
        if len(projectors) != len(self.maps) or not self.maps or embeds != (embedding_B1E is not None):
            given, wanted = ("an" if there else "no" for there in (embedding_B1E is not None, embeds))
            raise ValueError(
                f"{len(projectors)} projectors and {given} embedding do not pair with {len(self.maps)} "
                f"teacher maps and {wanted} embedding"
            )
        if tokens_BMD.dtype == torch.float16:
            raise ValueError(
                "the student's tokens are torch.float16, in which gradients of a mean over a batch are zero: "
                "train in bfloat16 or float32"
            )
        by_grid: dict[tuple[int, ...], _Shared] = {}
        losses = []
        for projector, taught_BMC in zip(projectors, self.maps, strict=True):
            # The first head of a grid alone is tied to the student's tokens: it passes on what all heads of
            # that grid add up.
            first = projector.to_grid not in by_grid
            shared = by_grid.setdefault(projector.to_grid, _Shared())
            piecewise = _Piecewise(self, taught_BMC, shared)
            losses.append(projector(tokens_BMD if first else tokens_BMD.detach(), consume=piecewise))
        loss = torch.stack(losses).sum()
        if embedding_B1E is None:
            return loss
        return loss + self.objective.embedding_loss(embedding_B1E, self.taught[-1], self.valid_B)


@dataclass
class _Shared:
    """What the heads of one batch have in common whose teachers have one grid."""

    gradient_BMD: Tensor | None = None
    """Of the student's tokens on that grid: the sum over the heads so far."""


@dataclass(frozen=True)
class _Piecewise:
    """What one head makes of its factors; a projector calls it in the place of its product."""

    batch: ChunkedLoss
    taught_BMC: Tensor
    shared: _Shared

    def __call__(self, tokens_BMD: Tensor, weight_CD: Tensor, bias_C: Tensor) -> Tensor:
        weight_BM = self.batch.objective.weights(tokens_BMD, self.batch.valid_B)
        if self.taught_BMC.shape != (*tokens_BMD.shape[:2], len(weight_CD)):
            raise ValueError(
                f"a projector of {tuple(weight_CD.shape)} makes of student tokens {tuple(tokens_BMD.shape)} "
                f"nothing that compares with teacher tokens {tuple(self.taught_BMC.shape)}"
            )
        return _Head.apply(tokens_BMD, weight_CD, bias_C, self.taught_BMC.detach(), weight_BM, self)


@dataclass
class _Gradients:
    """Of one head, for a loss of 1. Held outside of autograd, which would watch over the shared buffer."""

    weight_CD: Tensor | None
    bias_C: Tensor | None
    tokens_BMD: Tensor | None = field(default=None)


class _Head(torch.autograd.Function):
    """One head: the loss and all gradients on the way forward, a factor on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens_BMD: Tensor,
        weight_CD: Tensor,
        bias_C: Tensor,
        taught_BMC: Tensor,
        weight_BM: Tensor,
        how: _Piecewise,
    ) -> Tensor:
        dtype = working_dtype(tokens_BMD, taught_BMC)
        trains = any(ctx.needs_input_grad)
        d_weight_CD = torch.zeros_like(weight_CD, dtype=dtype) if ctx.needs_input_grad[1] else None
        d_bias_C = torch.zeros_like(bias_C, dtype=dtype) if ctx.needs_input_grad[2] else None
        first = how.shared.gradient_BMD is None
        if first and ctx.needs_input_grad[0]:
            how.shared.gradient_BMD = torch.empty_like(tokens_BMD, memory_format=torch.contiguous_format)
        buffer_BMD = how.shared.gradient_BMD
        spec = how.batch.objective.spec
        denominator = torch.full(
            (), taught_BMC.numel() * len(how.batch.maps), dtype=dtype, device=tokens_BMD.device
        )
        loss = torch.zeros((), dtype=dtype, device=tokens_BMD.device)
        with torch.autocast(tokens_BMD.device.type, enabled=False):
            for piece in pieces(len(tokens_BMD), tokens_BMD.shape[1], how.batch.chunk_tokens):
                student_RD = tokens_BMD[piece].flatten(0, 1)
                predicted = F.linear(tokens_BMD[piece], weight_CD, bias_C)
                taught, target = for_kernels(taught_BMC[piece], spec.target)
                value, gradient = kernels.loss_and_gradient(
                    predicted,
                    taught,
                    weight_BM[piece].to(dtype),
                    denominator,
                    target=target,
                    beta=spec.beta,
                    eps=WHITEN_EPS,
                )
                loss += value
                if not trains:
                    continue
                gradient_RC = gradient.flatten(0, 1)
                if d_weight_CD is not None:
                    d_weight_CD += gradient_RC.t() @ student_RD
                if d_bias_C is not None:
                    d_bias_C += gradient_RC.sum(0, dtype=dtype)
                if buffer_BMD is not None:
                    product = (gradient_RC @ weight_CD).view_as(tokens_BMD[piece])
                    buffer_BMD[piece] = product if first else buffer_BMD[piece] + product
        ctx.held = _Gradients(d_weight_CD, d_bias_C, buffer_BMD if ctx.needs_input_grad[0] else None)
        ctx.dtypes = weight_CD.dtype, bias_C.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked loss has no second derivative: drop create_graph=True, or remove "
                "fd_scale.loss_chunk_tokens from the scale file"
            )
        held: _Gradients | None = ctx.held
        if held is None:
            raise RuntimeError(
                "the chunked loss was asked for its gradients a second time, after they were let go: pass "
                "retain_graph=True to the first backward"
            )
        again = torch._C._autograd._get_current_graph_task_keep_graph()  # backward(retain_graph=True)
        weight_dtype, bias_dtype = ctx.dtypes
        d_weight_CD = None if held.weight_CD is None else (held.weight_CD * factor).to(weight_dtype)
        d_bias_C = None if held.bias_C is None else (held.bias_C * factor).to(bias_dtype)
        d_tokens_BMD = held.tokens_BMD
        if d_tokens_BMD is not None:
            d_tokens_BMD = kernels.scaled(d_tokens_BMD, factor, in_place=not again)
        if not again:
            ctx.held = None  # the loss may outlive the step
        return d_tokens_BMD, d_weight_CD, d_bias_C, *(None,) * (NUM_INPUTS - 3)


def pieces(batch: int, num_tokens: int, chunk_tokens: int) -> Iterator[tuple[slice, slice]]:
    """(images, tokens) of up to ``chunk_tokens`` tokens each: whole images, or parts of one."""
    images, tokens = max(chunk_tokens // num_tokens, 1), min(chunk_tokens, num_tokens)
    for b in range(0, batch, images):
        for n in range(0, num_tokens, tokens):
            yield slice(b, b + images), slice(n, n + tokens)
