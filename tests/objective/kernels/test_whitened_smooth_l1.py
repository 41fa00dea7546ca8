"""The entry point and its operator on the CPU: values, autograd, compilation, and everything that does
not fit.

What the Triton kernels give for the same arguments is in ``on_device``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fd_scale.objective import losses
from fd_scale.objective.kernels import ChannelStatistics, TeacherNorm, whitened_smooth_l1
from tests.objective.kernels.cases import (
    answer,
    features,
    fused,
    norm_of,
    numbers,
    relative,
    rounding,
    statistics_of,
)

operator = importlib.import_module("fd_scale.objective.kernels.whitened_smooth_l1")

# Worst L2 errors seen, relative to the exact norm: 2e-16 and 1.9e-7. Half precision adds its rounding.
ARITHMETIC = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7}


@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
@pytest.mark.parametrize(
    "variant",
    ["plain", "l2", "channel", "none", "L1", "norm", "weights", "mask", "both", "given denominator"],
)
def test_plain_path_against_float64(variant: str, dtype: torch.dtype) -> None:
    prediction, teacher = features((2, 7, 33), dtype)
    weight = torch.linspace(0, 3, 7)
    mask = torch.arange(14).reshape(2, 7) % 3 != 1
    options: dict[str, Any] = {
        "plain": {},
        "l2": {"target": "l2"},
        "channel": {"target": "channel", "channel": statistics_of(teacher)},
        "none": {"target": "none"},
        "L1": {"beta": 0.0},
        "norm": {"teacher_norm": norm_of(33)},
        "weights": {"token_weight": weight},
        "mask": {"token_mask": mask},
        "both": {"token_weight": weight, "token_mask": mask, "normaliser": "weighted_mean"},
        "given denominator": {"normaliser": torch.tensor(11.0)},
    }[variant]
    scale = 512.0 if dtype == torch.float16 else 1.0
    loss_scale = torch.tensor(scale) if dtype == torch.float16 else None
    expected = answer(prediction, teacher, **options)
    loss, gradient = fused(prediction, teacher, scale, **options, loss_scale=loss_scale)
    exact = expected.prediction * scale
    assert loss.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype
    assert relative(loss.value, expected.loss) < ARITHMETIC[dtype]
    extra = 0.0 if dtype == torch.float64 else 1.01 * rounding(exact, dtype)
    assert relative(gradient, exact) < ARITHMETIC[dtype] + extra


@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["whiten", "l2", "none"])
def test_it_is_the_public_loss(target: Any, weighted: bool, normaliser: Any) -> None:
    prediction, teacher = features((2, 5, 33), torch.float32)
    options: dict[str, Any] = {"target": target, "normaliser": normaliser, "beta": 0.5}
    if weighted:
        options["token_weight"] = torch.tensor([10.0, 1, 0, 2, 0.5])
    leaf = prediction.clone().requires_grad_()
    expected = losses.whitened_smooth_l1(leaf, teacher, **options)
    expected.backward()
    assert leaf.grad is not None
    loss, gradient = fused(prediction, teacher, **options)
    assert relative(loss.value, numbers(expected)) < ARITHMETIC[torch.float32]
    assert relative(gradient, numbers(leaf.grad)) < ARITHMETIC[torch.float32]


def test_gradient_by_finite_differences() -> None:
    prediction, teacher = features((2, 3, 5), torch.float64)
    weight = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    for target in ("whiten", "l2", "none"):
        torch.autograd.gradcheck(
            lambda p, target=target: whitened_smooth_l1(p, teacher, token_weight=weight, target=target).value,
            prediction.requires_grad_(),
        )


def test_nan_is_kept_or_left_out_as_a_whole() -> None:
    prediction, teacher = features((1, 3, 8), torch.float32)
    clean, clean_gradient = fused(prediction, teacher, token_mask=torch.tensor([True, False, True]))
    prediction[0, 1, 2] = teacher[0, 1, 3] = math.nan
    loss, gradient = fused(prediction, teacher, token_mask=torch.tensor([True, False, True]))
    assert torch.equal(loss.value, clean.value)
    assert torch.equal(gradient, clean_gradient)
    for beta in (0.0, 2.0):
        loss, gradient = fused(prediction, teacher, beta=beta)
        assert loss.value.isnan()
        assert gradient.isnan().any(-1).tolist() == [[False, True, False]]


def test_backward_may_be_asked_again_and_with_other_factors() -> None:
    prediction, teacher = features((2, 3, 8), torch.float32)
    prediction.requires_grad_()
    loss = whitened_smooth_l1(prediction, teacher).value
    (once,) = torch.autograd.grad(loss, prediction, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, prediction, retain_graph=True)
    (zero,) = torch.autograd.grad(0 * loss, prediction, retain_graph=True)
    (again,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(once, again)
    assert relative(tripled, 3 * numbers(once)) < 1e-7
    assert not zero.any()


def test_a_second_consumer_of_the_prediction_gets_its_own_gradient() -> None:
    prediction, teacher = features((2, 3, 8), torch.float32)
    _, gradient = fused(prediction, teacher)
    leaf = prediction.clone().requires_grad_()
    shared = leaf * 1
    (whitened_smooth_l1(shared, teacher).value + shared.square().sum()).backward()
    assert leaf.grad is not None
    assert relative(leaf.grad, numbers(gradient) + 2 * numbers(prediction)) < 1e-7


def test_only_the_prediction_gets_a_gradient_and_none_is_computed_without_one() -> None:
    prediction, teacher = features((2, 3, 8), torch.float32)
    teacher.requires_grad_()
    loss = whitened_smooth_l1(prediction, teacher)
    assert not loss.value.requires_grad
    assert not loss.per_token.requires_grad
    whitened_smooth_l1(prediction.requires_grad_(), teacher).value.backward()
    assert teacher.grad is None


def test_second_derivatives_are_refused() -> None:
    prediction, teacher = features((1, 2, 8), torch.float32)
    loss = whitened_smooth_l1(prediction.requires_grad_(), teacher).value
    with pytest.raises(RuntimeError, match="no second derivative: drop create_graph=True"):
        torch.autograd.grad(loss, prediction, create_graph=True)


def test_autocast_changes_nothing() -> None:
    prediction, teacher = features((2, 3, 8), torch.float32)
    expected, expected_gradient = fused(prediction, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradient = fused(prediction, teacher)
    assert torch.equal(loss.value, expected.value)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators_keep_the_rules_of_operators(dtype: torch.dtype) -> None:
    prediction, teacher = features((2, 3, 8), dtype)
    weight, one = torch.rand(2, 3), torch.tensor(2.0)
    rest = (None, None, None, None, "whiten", 2.0, 1e-5, 0.0)
    torch.library.opcheck(
        operator._operator, (prediction.requires_grad_(), teacher, weight, weight > 0.5, one, one, *rest)
    )
    torch.library.opcheck(operator._operator, (prediction, teacher, None, None, None, None, *rest))
    torch.library.opcheck(operator._scale_in_place, (teacher.clone(), one, None))
    torch.library.opcheck(operator._scale_in_place, (teacher.clone(), one, 2 * one))


def test_it_compiles_whole_with_every_option() -> None:
    prediction, teacher = features((2, 3, 8), torch.bfloat16)
    weight, mask, scale = torch.rand(3), torch.tensor([True, False, True]), torch.tensor(3.0)
    norm, channel = norm_of(8), statistics_of(teacher)

    def step(p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        loss = whitened_smooth_l1(
            2 * p,
            t,
            target="channel",
            token_weight=weight,
            token_mask=mask,
            normaliser="weighted_mean",
            channel=channel,
            teacher_norm=norm,
            loss_scale=scale,
        )
        return 3 * loss.value, loss.per_token

    prediction.requires_grad_()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (expected, expected_map), (got, got_map) = step(prediction, teacher), compiled(prediction, teacher)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(got_map, expected_map, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(value, prediction)[0] for value in (expected, got)]
    assert torch.equal(*gradients)


TOKENS = torch.zeros(2, 3, 8)
FITTING = TeacherNorm(torch.ones(8), torch.zeros(8), 1e-6)
STATISTICS = ChannelStatistics(torch.zeros(8), torch.ones(8))
WRONG: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS[:, :2]),
        r"\(2, 3, 8\) and teacher \(2, 2, 8\) must be two \(B, N, C\)",
    ),
    (lambda: whitened_smooth_l1(TOKENS[0], TOKENS[0]), r"must be two \(B, N, C\) of equal shape"),
    (lambda: whitened_smooth_l1(TOKENS[:0], TOKENS[:0]), r"of shape \(0, 3, 8\) hold nothing to compare"),
    (lambda: whitened_smooth_l1(TOKENS[..., :0], TOKENS[..., :0]), "hold nothing to compare"),
    (
        lambda: whitened_smooth_l1(TOKENS.int(), TOKENS),
        "prediction is torch.int32; it must be one of torch.bfloat16",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS.to("meta")),
        "teacher is on meta, the prediction on cpu: move one",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, beta=-1.0),
        r"beta=-1.0 must be a finite number, 0 \(plain L1\) or above",
    ),
    (lambda: whitened_smooth_l1(TOKENS, TOKENS, beta=math.nan), "beta=nan must be a finite number"),
    (lambda: whitened_smooth_l1(TOKENS, TOKENS, eps=math.inf), "eps=inf must be a finite number"),
    (lambda: whitened_smooth_l1(TOKENS, TOKENS, target="pca"), "target='pca' must be one of whiten, l2"),  # type: ignore[arg-type]
    (lambda: whitened_smooth_l1(TOKENS, TOKENS, normaliser="sum"), "normaliser='sum' must be one of mean"),  # type: ignore[arg-type]
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, normaliser=torch.ones(1)),
        r"normaliser=tensor\(\[1.\]\) must be a real scalar",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, token_weight=torch.ones(4)),
        r"token_weight of shape \(4,\) is neither \(3,\) nor \(2, 3\)",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, token_weight=torch.ones(3, dtype=torch.complex64)),
        "it must be real",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, token_weight=torch.ones(3, device="meta")),
        "token_weight is on meta",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, token_mask=torch.ones(3)),
        "token_mask is torch.float32; it must be bool",
    ),
    (lambda: whitened_smooth_l1(TOKENS, TOKENS, target="channel"), "'channel' needs its statistics"),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, channel=STATISTICS),
        "'channel' needs its statistics, others take none",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS[..., :4], TOKENS[..., :4], teacher_norm=FITTING),
        r"teacher_norm.weight of shape \(8,\) and dtype torch.float32 must hold one number per channel",
    ),
    (
        lambda: whitened_smooth_l1(
            TOKENS, TOKENS, teacher_norm=TeacherNorm(torch.ones(8), torch.ones(8), -1.0)
        ),
        "teacher_norm.eps=-1.0 must be a finite number",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS.half(), TOKENS),
        "the prediction is torch.float16 and loss_scale is not given",
    ),
    (
        lambda: whitened_smooth_l1(TOKENS, TOKENS, loss_scale=2.0),
        "loss_scale=2.0 must be a real scalar tensor",
    ),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_more_channels_than_the_kernel_holds_are_computed_plainly() -> None:
    prediction, teacher = features((1, 2, 16385), torch.float32)
    expected = answer(prediction, teacher)
    loss, gradient = fused(prediction, teacher)
    assert relative(loss.value, expected.loss) < ARITHMETIC[torch.float32]
    assert relative(gradient, expected.prediction) < ARITHMETIC[torch.float32]
