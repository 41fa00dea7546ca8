"""Whitening, its alternatives and the choice of tokens, against numbers worked out by hand or by the
reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fd_scale.objective.features import Features
from fd_scale.objective.targets import l2_normalise, l2_scaled, mean_as_class, select, whiten
from tests.reference import objective as reference


def random_tokens(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 5


@pytest.mark.parametrize(
    ("function", "name"), [(whiten, "whiten"), (l2_normalise, "l2"), (l2_scaled, "l2_scaled")]
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 7), (1, 5, 384)])
def test_each_token_against_the_reference(function: Any, name: str, shape: tuple[int, ...]) -> None:
    tokens_BND = random_tokens(0, *shape)
    got = function(tokens_BND)
    for b in range(shape[0]):
        for n in range(shape[1]):
            expected = reference.target_token(tokens_BND[b, n].numpy(), name)
            # Rounding of float64 sums over 384 channels: 2e-15 seen.
            assert np.allclose(got[b, n].numpy(), expected, rtol=1e-12, atol=1e-12)


def test_whiten_by_hand() -> None:
    # mean 2, biased variance 2 / 3
    got = whiten(torch.tensor([[[1.0, 2.0, 3.0]]]), eps=0.0)
    assert torch.allclose(got, torch.tensor([[[-(1.5**0.5), 0.0, 1.5**0.5]]]), rtol=0, atol=1e-6)


def test_l2_of_zero_is_zero() -> None:
    assert not l2_normalise(torch.zeros(1, 1, 4)).any()


@pytest.mark.parametrize("function", [whiten, l2_normalise, l2_scaled])
def test_half_precision_goes_to_float32_even_under_autocast(function: Any) -> None:
    tokens_BND = random_tokens(1, 2, 3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(tokens_BND)
    assert got.dtype == torch.float32
    # float32 against float64 on the same rounded values: 3.4e-7 seen on values up to 3.
    assert torch.allclose(got.double(), function(tokens_BND.double()), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 65), st.floats(0.5, 1e3), st.floats(-1e3, 1e3))
def test_whitening_undoes_scale_and_shift_of_a_token(width: int, scale: float, shift: float) -> None:
    token = random_tokens(width, 1, 1, width)
    # eps is not scaled with the token, which moves values by eps / (2 variance): 2e-5 seen, 1e-3 possible
    # for the narrowest tokens.
    assert torch.allclose(whiten(token * scale + shift), whiten(token), rtol=2e-3, atol=2e-3)


def numbered(num_prefix_tokens: int, grid: tuple[int, int] = (2, 3)) -> Features:
    """A map whose token n holds the number n in each of two channels, the second negated."""
    count = num_prefix_tokens + grid[0] * grid[1]
    numbers = torch.arange(float(count))
    return Features(torch.stack((numbers, -numbers), dim=-1)[None], grid, num_prefix_tokens)


@pytest.mark.parametrize(
    ("prefix", "granularity", "cls", "expected"),
    [
        (1, "full", "match", [0, 1, 2, 3, 4, 5, 6]),
        (1, "full", "mean", [0, 1, 2, 3, 4, 5, 6]),
        (1, "full", "drop", [1, 2, 3, 4, 5, 6]),
        (0, "full", "drop", [0, 1, 2, 3, 4, 5]),
        (5, "full", "match", [0, 5, 6, 7, 8, 9, 10]),
        (5, "full", "drop", [5, 6, 7, 8, 9, 10]),
        (5, "cls", "match", [0]),
        (1, "cls", "mean", [0]),
        (1, "gap", "match", [3.5]),
        (5, "gap", "drop", [7.5]),
        (0, "gap", "match", [2.5]),
    ],
)
def test_selection(prefix: int, granularity: Any, cls: Any, expected: list[float]) -> None:
    features = numbered(prefix)
    got = select(features, granularity=granularity, cls=cls)
    assert got[0, :, 0].tolist() == expected
    assert got[0, :, 1].tolist() == [-x for x in expected]


@pytest.mark.parametrize(("granularity", "cls"), [("full", "match"), ("full", "mean"), ("cls", "match")])
def test_a_class_token_that_is_not_there(granularity: Any, cls: Any) -> None:
    with pytest.raises(ValueError, match="regresses a class token, but this map has none"):
        select(numbered(0), granularity=granularity, cls=cls)


def test_selecting_the_whole_map_copies_nothing() -> None:
    features = numbered(1)
    assert select(features, granularity="full", cls="match") is features.tokens_BND
    dropped = select(features, granularity="full", cls="drop")
    assert dropped.untyped_storage().data_ptr() == features.tokens_BND.untyped_storage().data_ptr()


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_mean_patch_takes_the_place_of_the_class_token(prefix: int) -> None:
    features = mean_as_class(numbered(prefix))
    patches = [float(n) for n in range(prefix, prefix + 6)]
    assert features.num_prefix_tokens == 1
    assert features.tokens_BND[0, :, 0].tolist() == [sum(patches) / 6, *patches]


def test_features_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="1 prefix tokens"):
        Features(torch.zeros(1, 6, 2), (2, 3), 1)
