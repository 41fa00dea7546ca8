"""LARS against steps worked by hand, and against timm's where timm's has the trust ratio."""

import pytest
import torch
from timm.optim import Lars as TimmLars
from torch import nn

from fd_scale.engine.lars import Lars, lars
from fd_scale.run.recipe import Optim


def problem() -> tuple[nn.Parameter, nn.Parameter]:
    weight = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return weight, bias


def set_gradients(weight: nn.Parameter, bias: nn.Parameter) -> None:
    weight.grad = torch.tensor([[0.0, 6.0], [8.0, 0.0]], dtype=torch.float64)
    bias.grad = torch.tensor([0.5, -1.0], dtype=torch.float64)


def test_two_steps_by_hand_without_decay():
    """Norm of the weights 5, of the gradient 10: the ratio is 0.001 x 5 / 10 = 0.0005."""
    weight, bias = problem()
    optimizer = Lars([{"params": [weight, bias], "weight_decay": 0.0, "lr": 2.0}])
    set_gradients(weight, bias)
    optimizer.step()
    first = 0.0005 * torch.tensor([[0.0, 6.0], [8.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(weight.data, start - 2 * first, rtol=0, atol=1e-15)
    assert bias.tolist() == [0.0, 4.0]  # plain: 1 - 2 x 0.5, 2 + 2 x 1
    set_gradients(weight, bias)
    ratio = 0.001 * float(weight.detach().norm()) / 10
    optimizer.step()
    second = 0.9 * first + ratio * torch.tensor([[0.0, 6.0], [8.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(weight.data, start - 2 * first - 2 * second, rtol=0, atol=1e-15)
    assert bias.tolist() == [0.0 - 2 * (0.9 * 0.5 + 0.5), 4.0 + 2 * (0.9 + 1)]


@pytest.mark.parametrize("always", [True, False])
def test_timm_drops_the_ratio_where_nothing_is_decayed(always: bool):
    """Why this optimizer is our own: with its default, timm's matrix moves by the whole gradient."""
    ours, theirs = problem()[0], problem()[0]
    for parameter in (ours, theirs):
        parameter.grad = torch.tensor([[0.0, 6.0], [8.0, 0.0]], dtype=torch.float64)
    Lars([{"params": [ours], "weight_decay": 0.0, "lr": 0.1}]).step()
    TimmLars([theirs], lr=0.1, momentum=0.9, weight_decay=0.0, trust_coeff=0.001, always_adapt=always).step()
    # timm adds 1e-8 to the norm of the gradient.
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-11) is always


def test_nothing_to_compare_gives_a_ratio_of_one():
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.ones(2, 2)
    Lars([{"params": [parameter], "weight_decay": 0.0, "lr": 0.5}]).step()
    assert parameter.tolist() == [[-0.5, -0.5], [-0.5, -0.5]]


@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(first: bool):
    weight, bias = problem()
    optimizer = Lars([{"params": [weight, bias], "weight_decay": 0.0, "lr": 1.0}], clip_norm=1.0)
    if not first:
        set_gradients(weight, bias)
        optimizer.step()
    before = [p.detach().clone() for p in (weight, bias)]
    momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    set_gradients(weight, bias)
    weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.isnan(optimizer._global_grad_norm)
    for index, parameter in enumerate((weight, bias)):
        assert torch.equal(parameter.data, before[index])
        state = optimizer.state[parameter]
        assert float(state["step"]) == (0 if first else 1)
        kept = torch.zeros_like(parameter) if first else momentum[index]
        assert torch.equal(state["momentum_buffer"], kept)


def test_sharded_parameters_are_refused():
    with pytest.raises(ValueError, match="whole parameters: ZeRO stage 0"):
        lars([], Optim(), clip_here=False)
