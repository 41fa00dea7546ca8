"""Which AdamW runs is said, not left to PyTorch; what it computes, clips, and leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fd_scale.engine.adamw import ClippingAdamW, GuardedAdamW, adamw
from fd_scale.run.recipe import Optim

SPEC = Optim(clip_norm=0.5)
RATE, DECAY = 0.1, 0.5


def problem(clip_here: bool) -> tuple[list[nn.Parameter], GuardedAdamW]:
    """A matrix, a vector of an odd length and a number."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((5, 7), (33,), (1,))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = adamw([{"params": parameters, "weight_decay": DECAY}], SPEC, clip_here=clip_here)
    optimizer.param_groups[0]["lr"] = RATE
    return parameters, optimizer


def gradients(parameters: list[nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


def give(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value.clone()


@pytest.mark.parametrize("clip_here", [False, True])
def test_the_implementation_is_said(clip_here: bool) -> None:
    groups = [{"params": [torch.ones(3, requires_grad=True)], "weight_decay": 0.5}]
    optimizer = adamw(groups, Optim(), clip_here=clip_here)
    assert isinstance(optimizer, ClippingAdamW) == clip_here
    (group,) = optimizer.param_groups
    assert (group["fused"], group["foreach"]) == (True, False)
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.5)


@pytest.mark.parametrize("clip_here", [False, True])
def test_five_steps_against_the_formula_in_float64(clip_here: bool) -> None:
    parameters, optimizer = problem(clip_here)
    values = [p.detach().double() for p in parameters]
    first = [torch.zeros_like(v) for v in values]
    second = [torch.zeros_like(v) for v in values]
    low, high = SPEC.betas
    for step in range(1, 6):
        given = gradients(parameters, step)
        give(parameters, given)
        optimizer.step()
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in given))
        factor = min(1.0, SPEC.clip_norm / (norm + 1e-6)) if clip_here else 1.0
        for v, m, s, g in zip(values, first, second, given, strict=True):
            g = g.double() * factor
            m.mul_(low).add_(g, alpha=1 - low)
            s.mul_(high).add_(g * g, alpha=1 - high)
            v.mul_(1 - RATE * DECAY)
            v.sub_(RATE * (m / (1 - low**step)) / ((s / (1 - high**step)).sqrt() + SPEC.eps))
        if clip_here:
            # A float32 sum of squares: 1e-7 seen.
            assert float(optimizer._global_grad_norm) == pytest.approx(norm, rel=1e-6)
    for parameter, value in zip(parameters, values, strict=True):
        # Five steps in float32 on values up to 3: 4e-7 seen.
        torch.testing.assert_close(parameter.detach().double(), value, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip_here", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_a_gradient_that_is_not_finite_changes_nothing(before: int, clip_here: bool, bad: float) -> None:
    parameters, optimizer = problem(clip_here)
    if not clip_here:  # the norm of a whole of which these are a part
        optimizer.norm = lambda: torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    for step in range(before):
        give(parameters, gradients(parameters, step))
        optimizer.step()
    kept = [p.detach().clone() for p in parameters]
    states = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]
    given = gradients(parameters, before)
    given[1][4] = bad
    give(parameters, given)
    optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
    for index, parameter in enumerate(parameters):
        state = optimizer.state[parameter]
        assert float(state["step"]) == before
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], states[index][key] if before else torch.zeros_like(parameter))
    give(parameters, gradients(parameters, before))
    optimizer.step()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, k) for p, k in zip(parameters, kept, strict=True)
    )


@pytest.mark.parametrize("invalid", [-1.0, math.inf, math.nan])
def test_words_of_deepspeed_for_a_norm_that_is_none(invalid: float) -> None:
    parameters, optimizer = problem(clip_here=False)
    optimizer.norm = lambda: torch.tensor(invalid)
    kept = [p.detach().clone() for p in parameters]
    give(parameters, gradients(parameters, 0))
    optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(parameters, kept, strict=True))
