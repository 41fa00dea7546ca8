"""The norm of a gradient against float64, and the clip against PyTorch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fd_scale.engine.norm import clip_by_norm, global_norm, is_finite


def some_gradients(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(dtype) * 3 for n in (1, 5, 1000, 65_537)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_float64(dtype: torch.dtype) -> None:
    given = some_gradients(dtype)
    expected = math.sqrt(sum(float(g.double().square().sum()) for g in given))
    found = global_norm(given)
    assert found.dtype == torch.float32
    # The norm of each is rounded to float32 where PyTorch has no other: 1e-8 seen.
    assert float(found) == pytest.approx(expected, rel=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_finite_in_the_norm(bad: float) -> None:
    given = some_gradients(torch.float32)
    given[2][17] = bad
    assert not torch.isfinite(global_norm(given))


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_a_clip_is_that_of_pytorch(limit: float) -> None:
    given, parameters = some_gradients(torch.float32), []
    for gradient in given:
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        parameters.append(parameter)
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    clip_by_norm(given, limit, norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, given, strict=True))


def test_which_norms_may_be_stepped_on() -> None:
    norms = torch.tensor([0.0, 1e-30, 3e38, math.inf, -1.0, math.nan])
    assert is_finite(norms).tolist() == [True, True, True, False, False, False]
