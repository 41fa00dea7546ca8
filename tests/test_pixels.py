"""The front door against torchvision's ToTensor and Normalize."""

from __future__ import annotations

import pytest
import torch
import torchvision.transforms.functional as TF

from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

ALL_BYTES = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)


def test_every_byte_equals_torchvision() -> None:
    got = normalise(ALL_BYTES, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    expected = TF.normalize(ALL_BYTES.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    # The same three operations in float32: bit for bit.
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_the_cast_comes_last(dtype: torch.dtype, tolerance: float) -> None:
    got = normalise(ALL_BYTES, IMAGENET_MEAN, IMAGENET_STD, dtype)
    exact = normalise(ALL_BYTES, IMAGENET_MEAN, IMAGENET_STD, torch.float64)
    assert got.dtype == dtype
    # One rounding to nearest: half an ulp of the dtype, relative.
    assert torch.all((got.double() - exact).abs() <= tolerance * exact.abs() + 1e-7)


def test_float64_is_exact() -> None:
    got = normalise(ALL_BYTES, IMAGENET_MEAN, IMAGENET_STD, torch.float64)
    for channel in range(3):
        expected = (torch.arange(256).double() / 255 - IMAGENET_MEAN[channel]) / IMAGENET_STD[channel]
        assert torch.equal(got[0, channel].flatten(), expected)


def test_the_pixels_stay_as_they_are() -> None:
    values = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8)
    before = values.clone()
    normalise(values, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
    assert torch.equal(values, before)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4).byte(), torch.zeros(1, 4, 4, 3).byte()]
)
def test_bad_input(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"are not uint8 \(B, 3, H, W\)"):
        normalise(wrong, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
