"""Which AdamW runs is said, not left to PyTorch."""

from __future__ import annotations

import pytest
import torch

from fd_scale.engine.adamw import ClippingAdamW, adamw
from fd_scale.run.recipe import Optim


@pytest.mark.parametrize("clip_here", [False, True])
@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", False)])
def test_the_implementation_of_a_device(device: str, fused: bool, clip_here: bool) -> None:
    groups = [{"params": [torch.ones(3, requires_grad=True)], "weight_decay": 0.5}]
    optimizer = adamw(groups, Optim(), torch.device(device), clip_here=clip_here)
    assert isinstance(optimizer, ClippingAdamW) == clip_here
    (group,) = optimizer.param_groups
    assert (group["fused"], group["foreach"]) == (fused, False)
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.5)


def test_the_fused_one_computes_the_same() -> None:
    results = []
    for device in ("cpu", "cuda"):  # the fused kernel, where tensors of a CPU take it, too
        parameter = torch.linspace(-1, 1, 9, requires_grad=True)
        groups = [{"params": [parameter], "weight_decay": 0.5}]
        optimizer = adamw(groups, Optim(), torch.device(device), clip_here=False)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = 0.1
            parameter.grad = torch.sin(parameter.detach() * 3 + step)
            optimizer.step()
        results.append(parameter.detach())
    # Three steps of float32 in another order of operations: 8e-9 seen.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-7)
