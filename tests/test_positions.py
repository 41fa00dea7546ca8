"""Position tables of another size: identities, analytic surfaces, axes that must not be swapped."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fd_scale.positions import _offsets, resize_absolute, resize_relative, resized


def table(grid: tuple[int, int], surface, places=None) -> Tensor:
    """A relative table of one head whose entry at (dy, dx) is ``surface(dy, dx)``, and three class rows."""
    ys, xs = places or (np.arange(1 - side, side, dtype=np.float64) for side in grid)
    values = [surface(y, x) for y in ys for x in xs]
    return torch.tensor([*values, 7.0, 8.0, 9.0], dtype=torch.float64)[:, None]


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (7, 4), (14, 14)])
def test_at_equal_size_it_is_the_identity(grid):
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    values = torch.randn(rows, 3, generator=torch.Generator().manual_seed(0))
    # Spline coefficients and back in float64, stored in float32: worst seen 0.
    torch.testing.assert_close(resize_relative(values, grid, grid), values, rtol=0, atol=1e-6)
    assert resized({"a.relative_position_bias_table": values}, grid, grid)[
        "a.relative_position_bias_table"
    ] is (values)


@pytest.mark.parametrize(("before", "after"), [((14, 14), (24, 24)), ((14, 14), (21, 16)), ((7, 5), (5, 4))])
def test_a_cubic_surface_is_met_exactly(before, after):
    """What the table holds is known at geometric places; a cubic there is a cubic everywhere."""

    def surface(y: float, x: float) -> float:
        return 2 - 0.3 * y + 0.05 * x * y - 0.01 * x**3 + 0.002 * y**2 * x

    places = [_offsets(b, a) for b, a in zip(before, after, strict=True)]
    expected = table(after, surface)
    # A cubic spline reproduces cubics; float64 rounding of values up to 1e3: worst seen 4e-12.
    torch.testing.assert_close(
        resize_relative(table(before, surface, places), before, after), expected, rtol=0, atol=1e-9
    )


def test_axes_are_not_swapped_and_class_rows_are_kept():
    wider = resize_relative(table((6, 6), lambda y, x: np.sin(0.4 * x)), (6, 6), (6, 9))
    grid = wider[:-3].view(11, 17)
    assert torch.allclose(grid, grid[:1].expand_as(grid), atol=1e-12)
    assert float(grid.std()) > 0.1
    assert wider[-3:].flatten().tolist() == [7.0, 8.0, 9.0]


@pytest.mark.parametrize(("before", "after"), [(14, 24), (14, 14), (14, 21), (16, 12), (3, 5)])
def test_places_grow_geometrically_and_reach_the_new_edge(before, after):
    places = _offsets(before, after)
    assert len(places) == 2 * before - 1
    assert places[-1] == pytest.approx(after - 1, abs=1e-9)
    assert places[before - 1] == 0
    assert places[before] == 1
    steps = np.diff(places[before - 1 :])
    if len(steps) > 1:
        assert np.allclose(steps[1:] / steps[:-1], steps[1] / steps[0])
    assert np.allclose(places, -places[::-1])


def test_the_smallest_grids_have_nothing_to_grow():
    assert _offsets(2, 5).tolist() == [-4.0, 0.0, 4.0]
    with pytest.raises(ValueError, match="a grid of 2 is too small for positions of a grid of 9"):
        _offsets(9, 2)


def test_near_offsets_keep_their_values():
    """Seen on a bump of width 2: stretching a grid by linear scale would widen it."""
    bump = table((14, 14), lambda y, x: np.exp(-(x**2 + y**2) / 8))
    larger = resize_relative(bump, (14, 14), (24, 24))[:-3].view(47, 47)
    # The first offset is kept to the last bit, further ones are a little further out: worst seen 0.03.
    assert float(larger[23, 23]) == pytest.approx(1.0)
    assert float(larger[23, 24]) == pytest.approx(np.exp(-1 / 8), abs=1e-9)
    assert float(larger[23, 25]) == pytest.approx(np.exp(-4 / 8), abs=0.05)


def test_absolute_positions_of_a_plane_stay_a_plane():
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(1, 64, 2)
    positions = torch.cat((torch.full((1, 1, 2), 5.0), grid), 1)
    larger = resize_absolute(positions, (8, 8), (12, 16))
    assert larger[:, 0].tolist() == [[5.0, 5.0]]
    inner = larger[0, 1:].view(12, 16, 2)[3:-3, 4:-4]
    ys, xs = (torch.arange(12.0) + 0.5) * 8 / 12 - 0.5, (torch.arange(16.0) + 0.5) * 8 / 16 - 0.5
    # Bicubic reproduces planes away from the border; float32: worst seen 2e-6.
    torch.testing.assert_close(inner[:, 0, 0], ys[3:-3], rtol=0, atol=1e-5)
    torch.testing.assert_close(inner[0, :, 1], xs[4:-4], rtol=0, atol=1e-5)
    assert resize_absolute(positions, (8, 8), (8, 8)) is positions


def test_tables_of_another_grid_are_refused_or_left():
    with pytest.raises(
        ValueError, match="of 12 rows is not one of a 3x3 grid with a class token, which has 28"
    ):
        resize_relative(torch.zeros(12, 2), (3, 3), (4, 4))
    with pytest.raises(ValueError, match="4 absolute positions are not those of a 3x3 grid"):
        resize_absolute(torch.zeros(1, 4, 2), (3, 3), (4, 4))
    windows = {"layers.0.relative_position_bias_table": torch.zeros(25, 2), "norm.weight": torch.ones(2)}
    assert resized(windows, (7, 7), (12, 12)) == windows
