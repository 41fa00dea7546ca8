"""Compiled blocks: the same losses and gradients, from code that blocks of one shape share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from fd_scale.compiled import compile_blocks
from fd_scale.errors import RecipeError
from tests.test_distill import alone, data, losses, start, teacher, words  # noqa: F401


def pixels(side: int) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_compiled_blocks_change_nothing_but_rounding() -> None:
    torch.manual_seed(0)
    network = models.create("vit_micro_patch8", input_size=32, depth=3, embed_dim=32, num_heads=2)
    table = network.rel_pos_bias.relative_position_bias_table
    nn.init.normal_(table)
    results = []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(network) == 3
        tokens = network(pixels(32))
        tokens.square().mean().backward()
        results.append((tokens.detach(), {n: p.grad.clone() for n, p in network.named_parameters()}))
        network.zero_grad()
    (tokens, gradients), (again, gradients_again) = results
    # Sums in another order, in float32: 7e-7 seen.
    torch.testing.assert_close(again, tokens, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert network.state_dict().keys() == gradients.keys()


def test_a_network_without_blocks() -> None:
    with pytest.raises(RecipeError, match=r"Linear has no list of blocks to compile \(blocks, resblocks\)"):
        compile_blocks(nn.Linear(1, 1))


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run_and_says_what_compiling_took(
    alone: Callable[..., tuple[int, str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    found = []
    for compiled in (False, True):
        scale = tmp_path / f"{compiled}.json"
        own = {"compile": compiled}
        scale.write_text(json.dumps({"train_micro_batch_size_per_gpu": 16, "fd_scale": own}))
        images: dict[str, Any] = {"schedule.images": 48, "schedule.warmup_images": 0}
        status, output = alone(tmp_path / str(compiled), scale=scale, **images)
        assert status == 0, output
        said = re.findall(r"compiled within the first step, of (\d+) s", output)
        assert len(said) == compiled
        found.append(losses(tmp_path / str(compiled)))
    plain, compiled_losses = found
    assert plain.keys() == compiled_losses.keys() == {1, 2, 3}
    for step, figures in plain.items():
        # Sums in another order, in float32; AdamW's first steps carry it on.
        assert compiled_losses[step] == pytest.approx(figures, rel=1e-4)
