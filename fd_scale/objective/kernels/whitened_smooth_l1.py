"""How is the whitened smooth-L1 loss computed in one pass over the features? Entry point and operator.

Eager PyTorch moves 54 bytes per bfloat16 element for this loss, forward and backward; one pass that
writes the gradient while it holds the row moves 6. The gradient of a scalar is known up to the number
that arrives in backward, so the forward writes it and the backward multiplies it, in place and on the
device: nothing moves when that number is the one that ``loss_scale`` announced (1 unless given).

The operator ``fd_scale::whitened_smooth_l1`` has a fake kernel and autograd, so that ``torch.compile``
keeps it whole. It runs ``row_kernels`` where ``choice.choose`` says so and ``plain`` elsewhere. Nothing
in it waits for the device, and a CUDA graph can capture it.

Shape letters: B images, N tokens, C channels.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fd_scale.objective.kernels import plain
from fd_scale.objective.kernels.choice import DTYPES, TARGETS, choose, device_obstacle

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
NORMALISERS = ("mean", "weighted_mean")

L2_EPS = 1e-12
"""Shortest teacher token that ``l2`` scales to unit length."""

LOSS_SCALE, NUM_ARGUMENTS = 5, 14
"""Place of the loss scale among the operator's arguments, and how many there are."""


class Loss(NamedTuple):
    """The loss, and where it comes from."""

    value: Tensor
    """Scalar; float32, float64 when an input is. Its gradient reaches the prediction alone."""
    per_token: Tensor
    """(B, N): mean over channels of each token's smooth L1, not weighted, 0 where left out. No gradient."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Fixed statistics of the teacher, (C,) each, for ``target="channel"``: (teacher - mean) * inv_std."""

    mean: Tensor
    inv_std: Tensor


@dataclass(frozen=True)
class TeacherNorm:
    """The teacher's own final LayerNorm, (C,) each, applied in registers before the target is made."""

    weight: Tensor
    bias: Tensor
    eps: float


def whitened_smooth_l1(
    prediction_BNC: Tensor,
    teacher_BNC: Tensor,
    *,
    beta: float = 2.0,
    target: Literal["whiten", "l2", "channel", "none"] = "whiten",
    token_weight: Tensor | None = None,
    token_mask: Tensor | None = None,
    normaliser: Literal["mean", "weighted_mean"] | Tensor = "mean",
    eps: float = 1e-5,
    channel: ChannelStatistics | None = None,
    teacher_norm: TeacherNorm | None = None,
    loss_scale: Tensor | None = None,
) -> Loss:
    """Smooth L1 between a prediction and normalised teacher tokens (FD paper, section 3), and its map.

    ``beta`` is the knee, 0 for plain L1. ``target`` of a teacher token: ``whiten`` (LayerNorm without
    affine, ``eps`` in its square root), ``l2`` (unit length), ``channel`` (the statistics in ``channel``) or
    ``none``. A token of ``token_weight`` 0, or False in the bool ``token_mask``, is left out: its features
    are not read, and a NaN in them reaches nothing; a NaN in any other token reaches loss and gradient.
    Weight and mask have shape (N,) or (B, N).

    The weighted sum over elements is divided by the number of elements that the mask keeps (``mean``), by C
    times the sum of the kept weights (``weighted_mean``), or by a scalar tensor. The loss is 0 where nothing
    is kept.

    Inputs are bfloat16, float16, float32 or float64, (B, N, C), of equal shape with any strides (a channel
    stride other than 1 costs a copy). ``loss_scale`` is a scalar tensor: what the loss will be multiplied
    with before ``backward``, such as a GradScaler's scale. It changes no result but the rounding of the
    stored gradient, and float16 predictions must have it: at 256 images every element of a mean's gradient is
    below float16.

    Raises ``ValueError`` for shapes, dtypes, devices or settings that do not fit.
    """
    _check_features(prediction_BNC, teacher_BNC)
    _check_settings(beta, target, normaliser, eps)
    weight_BN = _per_token("token_weight", token_weight, prediction_BNC)
    mask_BN = _per_token("token_mask", token_mask, prediction_BNC)
    if mask_BN is not None and mask_BN.dtype != torch.bool:
        raise ValueError(f"token_mask is {mask_BN.dtype}; it must be bool, True where a token is kept")
    dtype = plain.working_dtype(prediction_BNC, teacher_BNC)
    if weight_BN is not None:
        weight_BN = weight_BN.to(dtype)
    arguments = (
        prediction_BNC,
        teacher_BNC.detach(),
        weight_BN,
        mask_BN,
        _denominator(normaliser, weight_BN, mask_BN, prediction_BNC, dtype),
        _scaling(loss_scale, prediction_BNC),
        *_vectors(prediction_BNC, target, channel, teacher_norm),
        target,
        float(beta),
        L2_EPS if target == "l2" else float(eps),
        0.0 if teacher_norm is None else float(teacher_norm.eps),
    )
    if torch.compiler.is_compiling():  # in-place work is copied under a compiler, a product is fused
        return Loss(*_operator(*arguments)[:2])
    return Loss(*_InPlace.apply(*arguments))


def loss_and_gradient(
    prediction_BNC: Tensor,
    teacher_BNC: Tensor,
    weight_BN: Tensor,
    denominator: Tensor,
    *,
    target: Literal["whiten", "l2", "none"],
    beta: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the prediction at once, outside of autograd: for a part of a map, whose
    ``denominator`` (a scalar tensor) is that of the whole. ``weight_BN``: a token of weight 0 is left out."""
    scale_and_vectors = (None,) * 5
    settings = (target, float(beta), L2_EPS if target == "l2" else float(eps), 0.0)
    value, _, gradient_BNC = _operator(
        prediction_BNC, teacher_BNC, weight_BN, None, denominator, *scale_and_vectors, *settings
    )
    return value, gradient_BNC


def scaled(values: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """Contiguous ``values`` times a scalar tensor; in place, nothing moves where that is 1 on a GPU."""
    if not in_place:
        return (values * factor).to(values.dtype)
    _scale_in_place(values, factor, None)
    return values


class _InPlace(torch.autograd.Function):
    """The operator in eager code, where nothing else sees the gradient: backward scales it where it lies."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        value, per_token_BN, gradient_BNC = _operator(*arguments)
        ctx.mark_non_differentiable(per_token_BN)
        ctx.save_for_backward(gradient_BNC, arguments[LOSS_SCALE])
        return value, per_token_BN

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        gradient_BNC, loss_scale = ctx.saved_tensors
        asked_again = torch._C._autograd._get_current_graph_task_keep_graph()  # backward(retain_graph=True)
        if asked_again:
            gradient_BNC = gradient_BNC * _factor(d_outputs[0], loss_scale)
        else:
            _scale_in_place(gradient_BNC, d_outputs[0], loss_scale)
        return gradient_BNC, *(None,) * (NUM_ARGUMENTS - 1)


@torch.library.custom_op("fd_scale::whitened_smooth_l1", mutates_args=())
def _operator(
    prediction: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    denominator: Tensor | None,
    loss_scale: Tensor | None,
    channel_mean: Tensor | None,
    channel_inv_std: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    target: str,
    beta: float,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, loss per token, gradient times ``loss_scale``; the arguments of ``plain.loss_and_gradient``."""
    chosen = choose(prediction, teacher, target, loss_scaled=loss_scale is not None)
    if chosen.name == "triton":
        from fd_scale.objective.kernels.row_kernels import launch_rows as compute
    else:
        compute = plain.loss_and_gradient
    return compute(
        prediction,
        teacher,
        weight,
        mask,
        denominator,
        loss_scale,
        channel_mean,
        channel_inv_std,
        norm_weight,
        norm_bias,
        target,
        beta,
        eps,
        norm_eps,
    )


@_operator.register_fake
def _(prediction: Tensor, teacher: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = plain.working_dtype(prediction, teacher)
    per_token = prediction.new_empty(prediction.shape[:2], dtype=dtype)
    return per_token.new_empty(()), per_token, prediction.new_empty(prediction.shape)


@torch.library.custom_op("fd_scale::scale_in_place", mutates_args={"values"})
def _scale_in_place(values: Tensor, numerator: Tensor, denominator: Tensor | None) -> None:
    """Contiguous ``values`` *= numerator / denominator (scalar tensors); no traffic when that is 1."""
    if values.dtype in DTYPES and not device_obstacle(values.device):
        from fd_scale.objective.kernels.row_kernels import launch_scale

        launch_scale(values, numerator, denominator)
    else:
        values.mul_(_factor(numerator, denominator))


@_scale_in_place.register_fake
def _(values: Tensor, numerator: Tensor, denominator: Tensor | None) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, per_token, gradient = output
    ctx.mark_non_differentiable(per_token, gradient)
    ctx.save_for_backward(gradient, inputs[LOSS_SCALE])


def _backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_second_derivative()
    gradient, loss_scale = ctx.saved_tensors
    return gradient * _factor(d_outputs[0], loss_scale), *(None,) * (NUM_ARGUMENTS - 1)


_operator.register_autograd(_backward, setup_context=_save)


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss has no second derivative: drop create_graph=True, or use the plain reference, "
            "fd_scale.objective.losses"
        )


def _factor(numerator: Tensor, denominator: Tensor | None) -> Tensor:
    return numerator if denominator is None else numerator / denominator


def _check_features(prediction_BNC: Tensor, teacher_BNC: Tensor) -> None:
    if prediction_BNC.ndim != 3 or prediction_BNC.shape != teacher_BNC.shape:
        raise ValueError(
            f"prediction {tuple(prediction_BNC.shape)} and teacher {tuple(teacher_BNC.shape)} must be two "
            "(B, N, C) of equal shape: project and resample the student's tokens first"
        )
    if prediction_BNC.numel() == 0:
        raise ValueError(
            f"prediction and teacher of shape {tuple(prediction_BNC.shape)} hold nothing to compare"
        )
    for name, features in (("prediction", prediction_BNC), ("teacher", teacher_BNC)):
        if features.dtype not in FLOATS:
            raise ValueError(
                f"{name} is {features.dtype}; it must be one of {', '.join(str(d) for d in FLOATS)}"
            )
    _check_device("teacher", teacher_BNC, prediction_BNC)


def _check_settings(beta: float, target: str, normaliser: str | Tensor, eps: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta={beta} must be a finite number, 0 (plain L1) or above")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps={eps} must be a finite number, 0 or above")
    if target not in TARGETS:
        raise ValueError(f"target={target!r} must be one of {', '.join(TARGETS)}")
    if not isinstance(normaliser, Tensor) and normaliser not in NORMALISERS:
        raise ValueError(
            f"normaliser={normaliser!r} must be one of {', '.join(NORMALISERS)}, or a scalar tensor"
        )


def _check_device(name: str, tensor: Tensor, prediction_BNC: Tensor) -> None:
    if tensor.device != prediction_BNC.device:
        raise ValueError(f"{name} is on {tensor.device}, the prediction on {prediction_BNC.device}: move one")


def _per_token(name: str, values: Tensor | None, prediction_BNC: Tensor) -> Tensor | None:
    """(N,) or (B, N) values as (B, N), without gradient and without a copy."""
    if values is None:
        return None
    batch, num_tokens = prediction_BNC.shape[:2]
    if values.shape not in ((num_tokens,), (batch, num_tokens)):
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} is neither ({num_tokens},) nor ({batch}, {num_tokens}), "
            f"the tokens of prediction {tuple(prediction_BNC.shape)}"
        )
    if values.is_complex():
        raise ValueError(f"{name} is {values.dtype}; it must be real")
    _check_device(name, values, prediction_BNC)
    return values.detach().expand(batch, num_tokens)


def _denominator(
    normaliser: str | Tensor,
    weight_BN: Tensor | None,
    mask_BN: Tensor | None,
    prediction_BNC: Tensor,
    dtype: torch.dtype,
) -> Tensor | None:
    """What divides the sum over elements, as a scalar on the device; None for B N C."""
    if isinstance(normaliser, Tensor):
        return _scalar("normaliser", normaliser, prediction_BNC).to(dtype)
    total_BN = weight_BN if normaliser == "weighted_mean" else None
    if mask_BN is not None:
        total_BN = mask_BN.to(dtype) if total_BN is None else total_BN.where(mask_BN, 0)
    if total_BN is None:
        return None
    total = total_BN.sum()
    return torch.where(total == 0, 1, total) * prediction_BNC.shape[-1]


def _scaling(loss_scale: Tensor | None, prediction_BNC: Tensor) -> Tensor | None:
    if loss_scale is not None:
        return _scalar("loss_scale", loss_scale, prediction_BNC).float()
    if prediction_BNC.dtype == torch.float16:
        raise ValueError(
            "the prediction is torch.float16 and loss_scale is not given: its gradient would round to zero. "
            "Pass the scalar tensor that the loss is multiplied with before backward, or predict in bfloat16"
        )
    return None


def _scalar(name: str, value: Tensor, prediction_BNC: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 0 or value.is_complex():
        raise ValueError(f"{name}={value!r} must be a real scalar tensor, torch.tensor(x, device=...)")
    _check_device(name, value, prediction_BNC)
    return value.detach()


def _vectors(
    prediction_BNC: Tensor, target: str, channel: ChannelStatistics | None, teacher_norm: TeacherNorm | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Mean and inverse deviation of the target's channels, weight and bias of the teacher's norm, (C,)
    each."""
    if (target == "channel") != (channel is not None):
        raise ValueError(
            f"target={target!r} with channel={channel!r}: 'channel' needs its statistics, others take none"
        )
    if teacher_norm is not None and not (math.isfinite(teacher_norm.eps) and teacher_norm.eps >= 0):
        raise ValueError(f"teacher_norm.eps={teacher_norm.eps} must be a finite number, 0 or above")
    mean, inv_std = (None, None) if channel is None else (channel.mean, channel.inv_std)
    weight, bias = (None, None) if teacher_norm is None else (teacher_norm.weight, teacher_norm.bias)
    return (
        _vector("channel.mean", mean, prediction_BNC),
        _vector("channel.inv_std", inv_std, prediction_BNC),
        _vector("teacher_norm.weight", weight, prediction_BNC),
        _vector("teacher_norm.bias", bias, prediction_BNC),
    )


def _vector(name: str, values: Tensor | None, prediction_BNC: Tensor) -> Tensor | None:
    if values is None:
        return None
    if values.shape != prediction_BNC.shape[-1:] or values.dtype not in FLOATS:
        raise ValueError(
            f"{name} of shape {tuple(values.shape)} and dtype {values.dtype} must hold one number per "
            f"channel of prediction {tuple(prediction_BNC.shape)}, in floating point"
        )
    _check_device(name, values, prediction_BNC)
    return values.detach().contiguous()
