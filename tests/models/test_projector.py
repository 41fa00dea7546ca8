"""The projector against PyTorch's 1x1 convolution, and its resampling against maps whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import ModelError
from models.projector import Projector, resample_patches


def projector(from_grid, to_grid, resample, *, widths=(5, 7), prefix=1):
    torch.manual_seed(0)
    return Projector(
        *widths, from_grid=from_grid, to_grid=to_grid, num_prefix_tokens=prefix, resample=resample
    )


def identity(from_grid, to_grid, resample, *, width, prefix=1):
    """A projector that only resamples."""
    model = projector(from_grid, to_grid, resample, widths=(width, width), prefix=prefix).double()
    with torch.no_grad():
        model.linear.weight.copy_(torch.eye(width))
        model.linear.bias.zero_()
    return model


def centres(grid):
    """Centres of the patches (h w, 2), as shares of the image's sides."""
    rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in grid)
    return torch.cartesian_prod(rows, columns)


@pytest.mark.parametrize(("batch", "grid", "prefix"), [(1, (1, 1), 0), (3, (2, 5), 1), (2, (3, 3), 5)])
def test_equal_grids_are_a_convolution_with_the_same_weights(batch, grid, prefix):
    model = projector(grid, grid, "exact", prefix=prefix).double()
    conv = nn.Conv1d(5, 7, kernel_size=1).double()
    with torch.no_grad():
        conv.weight.copy_(model.linear.weight[:, :, None])
        conv.bias.copy_(model.linear.bias)
    tokens = torch.randn(batch, prefix + grid[0] * grid[1], 5, dtype=torch.float64)
    # Two orders of a float64 sum of 5 terms. Seen: 2.2e-16.
    torch.testing.assert_close(model(tokens), conv(tokens.mT).mT, rtol=0, atol=1e-14)


def test_initialisation_is_that_of_the_convolution():
    torch.manual_seed(3)
    linear = Projector(5, 7, from_grid=(1, 1), to_grid=(1, 1), num_prefix_tokens=1, resample="exact").linear
    torch.manual_seed(3)
    conv = nn.Conv1d(5, 7, kernel_size=1)
    assert torch.equal(linear.weight, conv.weight[:, :, 0])
    assert torch.equal(linear.bias, conv.bias)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_equal_grids_are_not_touched(resample):
    tokens = torch.randn(2, 1 + 12, 5)
    expected = projector((3, 4), (3, 4), "exact")(tokens)
    assert torch.equal(projector((3, 4), (3, 4), resample)(tokens), expected)


def kernel(distance, resample, antialiased):
    """Triangle, or Keys' cubic with the two constants that PyTorch has for its two forms."""
    distance = abs(distance)
    if resample == "bilinear":
        return max(0.0, 1.0 - distance)
    a = -0.5 if antialiased else -0.75
    if distance < 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def resampling_matrix(old, new, resample, antialiased):
    """(new, old): each new patch as a weighted sum along one side, written from the definition."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    width = max(1.0, old / new) if antialiased else 1.0
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        # Outside the map the plain form repeats the border patch; the antialiased one leaves it out.
        for j in range(old) if antialiased else range(-3, old + 3):
            matrix[i, min(max(j, 0), old - 1)] += kernel((j - centre) / width, resample, antialiased)
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("from_grid", "to_grid"),
    [((7, 7), (14, 14)), ((14, 14), (16, 16)), ((16, 16), (14, 14)), ((9, 15), (11, 5)), ((1, 1), (3, 2))],
)
def test_resampling_is_the_kernel_by_its_definition(from_grid, to_grid, resample):
    sides = list(zip(from_grid, to_grid, strict=True))
    antialiased = any(new < old for old, new in sides)
    rows, columns = (resampling_matrix(old, new, resample, antialiased) for old, new in sides)
    tokens = torch.randn(2, 1 + from_grid[0] * from_grid[1], 3, dtype=torch.float64)
    out = identity(from_grid, to_grid, resample, width=3)(tokens)
    assert torch.equal(out[:, :1], tokens[:, :1])
    patches = tokens[:, 1:].reshape(2, *from_grid, 3)
    expected = torch.einsum("yh,xw,bhwd->byxd", rows, columns, patches).flatten(1, 2)
    # float64 sums of up to 60 terms of size 3. Seen: 6.8e-15.
    torch.testing.assert_close(out[:, 1:], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("from_grid", "to_grid", "resample"),
    [
        ((7, 7), (14, 14), "bilinear"),
        ((14, 14), (16, 16), "bilinear"),
        ((16, 16), (8, 8), "bilinear"),
        ((16, 16), (8, 8), "bicubic"),
        ((15, 27), (5, 9), "bicubic"),
    ],
)
def test_an_affine_ramp_stays_one_inside(from_grid, to_grid, resample):
    """The cases in which the kernel reproduces affine functions wherever its support stays in the map."""
    slope = torch.tensor([[2.0, -3.0], [0.5, 1.0]], dtype=torch.float64)
    offset = torch.tensor([1.0, -4.0], dtype=torch.float64)
    patches = centres(from_grid) @ slope + offset
    prefix = torch.randn(1, 2, dtype=torch.float64)
    out = identity(from_grid, to_grid, resample, width=2)(torch.cat((prefix, patches))[None])[0]
    assert torch.equal(out[:1], prefix)
    reach = 1 if resample == "bilinear" else 2
    sides = zip(from_grid, to_grid, strict=True)
    margin = torch.tensor([reach * max(1 / old, 1 / new) for old, new in sides])
    inside = ((centres(to_grid) > margin) & (centres(to_grid) < 1 - margin)).all(dim=1)
    assert inside.sum() >= 3
    expected = (centres(to_grid) @ slope + offset)[inside]
    # float64 sums of up to 200 terms of size 6. Seen: 1.8e-15.
    torch.testing.assert_close(out[1:][inside], expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_a_constant_map_stays_constant_to_its_edges(resample):
    patches = torch.full((1, 16 * 16, 3), 2.5, dtype=torch.float64)
    out = identity((16, 16), (5, 9), resample, width=3, prefix=0)(patches)
    # The weights sum to 1 up to rounding. Seen: 1.3e-15.
    torch.testing.assert_close(out, torch.full((1, 45, 3), 2.5, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("from_grid", "to_grid"), [((2, 3), (3, 5)), ((4, 3), (2, 2))])
def test_gradients_are_those_of_finite_differences(from_grid, to_grid, resample):
    model = projector(from_grid, to_grid, resample, widths=(2, 3)).double()
    tokens = torch.randn(2, 1 + from_grid[0] * from_grid[1], 2, dtype=torch.float64, requires_grad=True)

    def run(tokens, weight, bias):
        return torch.func.functional_call(model, {"linear.weight": weight, "linear.bias": bias}, tokens)

    assert torch.autograd.gradcheck(run, (tokens, model.linear.weight, model.linear.bias))


def test_half_precision_is_resampled_in_float32():
    model = projector((4, 4), (7, 7), "bicubic").bfloat16()
    tokens = torch.randn(2, 17, 5).bfloat16()
    out = model(tokens)
    assert out.dtype == torch.bfloat16
    projected = model.linear(tokens)
    assert torch.equal(out[:, :1], projected[:, :1])
    expected = resample_patches(projected[:, 1:].float(), (4, 4), (7, 7), "bicubic")
    # One rounding to 8 bits at the end: 2^-8 of the value at most. Seen: 2^-8.
    torch.testing.assert_close(out[:, 1:].float(), expected, rtol=2**-8, atol=0)


def test_unequal_grids_need_a_way_to_resample():
    with pytest.raises(
        ModelError, match=r"student's is 14x14 and the teacher's 16x16: choose 'bilinear' or 'bicubic'"
    ):
        projector((14, 14), (16, 16), "exact")


def test_an_unknown_way_names_the_near_miss():
    with pytest.raises(
        ModelError, match=r"resample='bicubik' is unknown; did you mean bicubic.*exact, bilinear, bicubic"
    ):
        projector((2, 2), (2, 2), "bicubik")
