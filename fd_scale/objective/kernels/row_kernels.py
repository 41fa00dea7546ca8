# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (a Triton kernel takes pointers and numbers of the device, which Python's types do not describe)
"""How does the GPU compute the loss? Three Triton kernels and how each is launched.

``row_kernel``     one program per token: reads a prediction and a teacher row once, keeps both in registers,
                   computes the target, the token's loss and the gradient, and writes the gradient.
``total_kernel``   one program: sums the tokens' losses in a fixed order and divides by the normaliser.
``scale_kernel``   multiplies a stored gradient by a number on the device; returns at once when that is 1.

What the numbers mean and which arguments are allowed is settled in ``whitened_smooth_l1``. No atomics,
so results are bitwise repeatable on any number of multiprocessors. Arithmetic is float32. Statistics take
two passes over registers (mean, then centred squares), because raw features have means far above their
deviations. Every masked load names ``other`` and rows are masked again after centring: what lies past the
end of a row is undefined on a GPU. Row indices are widened before they meet a stride: 3e6 rows of 1024
channels overflow 32 bits. This file needs triton; for its interpreter, ``TRITON_INTERPRET=1`` must be set
before triton is imported.

Shape letters: B images, N tokens, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOTAL_BLOCK, TOTAL_WARPS = 16384, 32
"""Rows that ``total_kernel`` adds per step: four steps for 256 images of 197 tokens."""

SCALE_BLOCK, SCALE_WARPS = 4096, 8

SMALLEST_BETA = torch.finfo(torch.float32).tiny
"""Below it 1 / beta leaves float32, and the loss differs from plain L1 by less than 1e-38."""


@triton.jit
def _normalised(row, inside, eps, C: tl.constexpr):
    """LayerNorm without affine of one row: biased variance; zero outside the row."""
    centred = tl.where(inside, row - tl.sum(row, axis=0) / C, 0.0)
    variance = tl.sum(centred * centred, axis=0) / C
    return centred * tl.rsqrt(variance + eps)


# Numbers that change from launch to launch: one compiled variant serves every batch size and layout.
_RUNTIME = [
    "num_tokens",
    "prediction_stride_b",
    "prediction_stride_n",
    "teacher_stride_b",
    "teacher_stride_n",
    "weight_stride_b",
    "weight_stride_n",
    "mask_stride_b",
    "mask_stride_n",
]


@triton.jit(do_not_specialize=_RUNTIME)
def row_kernel(
    prediction,
    teacher,
    gradient,
    per_token,
    weighted,
    weight,
    mask,
    denominator,
    loss_scale,
    channel_mean,
    channel_inv_std,
    norm_weight,
    norm_bias,
    num_tokens,
    prediction_stride_b,
    prediction_stride_n,
    teacher_stride_b,
    teacher_stride_n,
    weight_stride_b,
    weight_stride_n,
    mask_stride_b,
    mask_stride_n,
    inverse_count,
    beta,
    inverse_beta,
    eps,
    norm_eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    TARGET: tl.constexpr,
    IS_L1: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One token. The outputs ``gradient`` (B, N, C), ``per_token`` and ``weighted`` (B, N) are
    contiguous; None stands for what is not asked for."""
    row = tl.program_id(0)
    b = (row // num_tokens).to(tl.int64)
    n = (row % num_tokens).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    prediction_at = b * prediction_stride_b + n * prediction_stride_n
    teacher_at = b * teacher_stride_b + n * teacher_stride_n
    gradient_at = row.to(tl.int64) * C
    if ALIGNED:  # a stride of 1000 is no multiple of 16 elements, yet its rows start on 16 bytes: say so
        prediction_at = tl.multiple_of(prediction_at, 8)
        teacher_at = tl.multiple_of(teacher_at, 8)
        gradient_at = tl.multiple_of(gradient_at, 8)
    gradient_row = gradient + gradient_at + columns

    token_weight = 1.0
    kept = True
    if weight is not None:
        token_weight = tl.load(weight + b * weight_stride_b + n * weight_stride_n).to(tl.float32)
        kept = token_weight != 0.0  # a NaN weight keeps its token, and shows in the result
    if mask is not None:
        kept = (tl.load(mask + b * mask_stride_b + n * mask_stride_n) != 0) & kept
    if (weight is not None) or (mask is not None):  # noqa: SIM102 - the compiler settles this test
        if not kept:  # reads no feature, so that nothing in it can leak
            tl.store(gradient_row, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=inside)
            tl.store(per_token + row, 0.0)
            if weighted is not None:
                tl.store(weighted + row, 0.0)
            return

    target = tl.load(teacher + teacher_at + columns, mask=inside, other=0.0).to(tl.float32)
    if norm_weight is not None:  # the teacher's own final LayerNorm, before the prediction takes registers
        scale = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
        target = _normalised(target, inside, norm_eps, C) * scale + shift
    predicted = tl.load(prediction + prediction_at + columns, mask=inside, other=0.0).to(tl.float32)
    if TARGET == "whiten":
        target = _normalised(target, inside, eps, C)
    elif TARGET == "l2":
        target = target / tl.maximum(tl.sqrt(tl.sum(target * target, axis=0)), eps, tl.PropagateNan.ALL)
    elif TARGET == "channel":
        mean = tl.load(channel_mean + columns, mask=inside, other=0.0).to(tl.float32)
        inv_std = tl.load(channel_inv_std + columns, mask=inside, other=0.0).to(tl.float32)
        target = (target - mean) * inv_std

    difference = tl.where(inside, predicted - target, 0.0)
    if IS_L1:
        at_rest = tl.where(difference < 0, -1.0, difference)  # 0 and NaN stay what they are
        slope = tl.where(difference > 0, 1.0, at_rest)
        loss = tl.abs(difference)
    else:  # no branch at the knee, and NaN passes the clamp
        slope = tl.clamp(difference * inverse_beta, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        loss = slope * (difference - 0.5 * beta * slope)

    token_loss = tl.sum(loss, axis=0) / C
    tl.store(per_token + row, token_loss)
    if weighted is not None:
        tl.store(weighted + row, token_loss * token_weight)
    factor = token_weight * inverse_count
    if denominator is not None:
        factor = token_weight / tl.load(denominator)
    if loss_scale is not None:
        factor = factor * tl.load(loss_scale)
    tl.store(gradient_row, (slope * factor).to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def total_kernel(rows, denominator, loss, num_rows, channels, inverse_count, BLOCK: tl.constexpr):
    """``loss`` = channels * sum of ``rows`` / denominator, in an order that depends on ``num_rows`` alone."""
    lanes = tl.arange(0, BLOCK)
    partial = tl.zeros([BLOCK], tl.float32)
    start = 0
    while start < num_rows:
        partial += tl.load(rows + start + lanes, mask=start + lanes < num_rows, other=0.0)
        start += BLOCK
    total = tl.sum(partial, axis=0) * channels
    if denominator is not None:
        tl.store(loss, total / tl.load(denominator))
    else:
        tl.store(loss, total * inverse_count)


@triton.jit
def scale_kernel(values, numerator, denominator, numel, BLOCK: tl.constexpr):
    """``values`` *= numerator / denominator, in place; touches nothing when that is exactly 1."""
    factor = tl.load(numerator).to(tl.float32)
    if denominator is not None:
        factor = factor / tl.load(denominator)
    if factor != 1.0:  # true for NaN
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < numel
        scaled = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(values + at, scaled.to(values.dtype.element_ty), mask=inside)


def launch_rows(
    prediction_BNC: Tensor,
    teacher_BNC: Tensor,
    weight_BN: Tensor | None,
    mask_BN: Tensor | None,
    denominator: Tensor | None,
    loss_scale: Tensor | None,
    channel_mean_C: Tensor | None,
    channel_inv_std_C: Tensor | None,
    norm_weight_C: Tensor | None,
    norm_bias_C: Tensor | None,
    target: str,
    beta: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (scalar), loss per token (B, N) and gradient (B, N, C), as ``plain.loss_and_gradient`` defines
    them.

    Token strides are free; a channel stride other than 1 costs a copy. Nothing here waits for the device.
    """
    prediction_BNC, teacher_BNC = _readable(prediction_BNC), _readable(teacher_BNC)
    batch, num_tokens, channels = prediction_BNC.shape
    num_rows = batch * num_tokens
    inverse_count = 1.0 / (num_rows * channels)
    gradient_BNC = prediction_BNC.new_empty(prediction_BNC.shape)
    loss = prediction_BNC.new_empty((), dtype=torch.float32)
    per_token_BN = loss.new_empty((batch, num_tokens))
    weighted_BN = None if weight_BN is None and mask_BN is None else torch.empty_like(per_token_BN)
    with torch.cuda.device_of(prediction_BNC):  # Triton launches on the current device
        row_kernel[(num_rows,)](
            prediction_BNC,
            teacher_BNC,
            gradient_BNC,
            per_token_BN,
            weighted_BN,
            weight_BN,
            None if mask_BN is None else mask_BN.view(torch.uint8),
            denominator,
            loss_scale,
            channel_mean_C,
            channel_inv_std_C,
            norm_weight_C,
            norm_bias_C,
            num_tokens,
            *prediction_BNC.stride()[:2],
            *teacher_BNC.stride()[:2],
            *((0, 0) if weight_BN is None else weight_BN.stride()),
            *((0, 0) if mask_BN is None else mask_BN.stride()),
            inverse_count,
            beta,
            1.0 / beta if beta >= SMALLEST_BETA else 0.0,
            eps,
            norm_eps,
            **row_constants(channels, target, beta, aligned=_aligned(prediction_BNC, teacher_BNC)),
            **row_options(channels),
        )
        total_kernel[(1,)](
            per_token_BN if weighted_BN is None else weighted_BN,
            denominator,
            loss,
            num_rows,
            channels,
            inverse_count,
            BLOCK=TOTAL_BLOCK,
            num_warps=TOTAL_WARPS,
            enable_fp_fusion=True,
        )
    return loss, per_token_BN, gradient_BNC


def launch_scale(values: Tensor, numerator: Tensor, denominator: Tensor | None) -> None:
    """Contiguous ``values`` *= numerator / denominator (scalar tensors); no traffic when that is 1."""
    with torch.cuda.device_of(values):
        scale_kernel[(triton.cdiv(values.numel(), SCALE_BLOCK),)](
            values,
            numerator,
            denominator,
            values.numel(),
            BLOCK=SCALE_BLOCK,
            num_warps=SCALE_WARPS,
            enable_fp_fusion=True,
        )


def row_constants(channels: int, target: str, beta: float, *, aligned: bool) -> dict[str, int | str | bool]:
    """What the row kernel is compiled for; the width too, so that the compiler sees that 8 divides it."""
    return {
        "C": channels,
        "BLOCK": triton.next_power_of_2(channels),
        "TARGET": target,
        "IS_L1": beta < SMALLEST_BETA,
        "ALIGNED": aligned,
    }


def row_options(channels: int) -> dict[str, int | bool]:
    """Launch options for rows of this width: 8 channels per thread, 16 bytes of bfloat16 (16 above 8192).

    Contraction to fused multiply-add is asked for by name, as its default differs between versions of Triton.
    """
    warps = min(max(triton.next_power_of_2(channels) // 256, 1), 32)
    return {"num_warps": warps, "enable_fp_fusion": True}


def _readable(tokens_BNC: Tensor) -> Tensor:
    """The tokens with neighbouring channels side by side; any token strides do."""
    return tokens_BNC if tokens_BNC.stride(2) == 1 else tokens_BNC.contiguous()


def _aligned(*tokens: Tensor) -> bool:
    """Whether every row starts a multiple of 8 elements after the first."""
    return all(stride % 8 == 0 for t in tokens for stride in (*t.stride()[:2], t.shape[2]))
