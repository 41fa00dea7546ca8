"""Views of a whole batch: the image itself, its mirror, the boxes of the product's own view."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fd_scale.data import philox
from fd_scale.data.view import draw
from fd_scale.run.sections import View
from studies.views import central_view, random_view


def pixels(count: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("side", [1, 7, 16])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_the_whole_image_is_given_as_it_is(side: int, flip: float) -> None:
    view = View(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=flip)
    images = pixels(3, side)
    found = random_view(images, view, side, torch.Generator().manual_seed(0))
    assert torch.equal(found, images.flip(-1) if flip else images)


def test_boxes_have_the_distribution_of_the_products_own() -> None:
    """A ramp tells the box: its mean is the centre, its range the width."""
    side, count = 64, 4000
    view = View(crop_scale=(0.2, 0.9), flip=0.5)
    ramp = torch.arange(side, dtype=torch.uint8).expand(count, 3, side, side).contiguous()
    found = random_view(ramp, view, side, torch.Generator().manual_seed(0)).float()[:, 0, 0]
    widths = (found.amax(1) - found.amin(1)) / side
    centres = found.mean(1)
    keys = [philox.key("fd.test", number) for number in range(count)]
    boxes = [draw(view, key, side, side) for key in keys]
    own_widths = torch.tensor([box.width / side for box in boxes])
    own_centres = torch.tensor([box.left + (box.width - 1) / 2 for box in boxes])
    # Standard errors of 4000 draws: 0.003 of the widths, 0.15 pixels of the centres. A ramp's range is up to
    # a pixel (0.016) less than the box; wide boxes are cut here and drawn again there.
    assert float(widths.mean()) == pytest.approx(float(own_widths.mean()), abs=0.03)
    assert float(widths.std()) == pytest.approx(float(own_widths.std()), abs=0.02)
    assert float(centres.mean()) == pytest.approx(float(own_centres.mean()), abs=0.6)
    mirrored = (found[:, 0] > found[:, -1]).float().mean()
    assert float(mirrored) == pytest.approx(0.5, abs=0.03)


def test_the_central_view() -> None:
    images = pixels(2, 7)
    assert torch.equal(central_view(images, 7), images)
    assert torch.equal(central_view(images, 3), images[:, :, 2:5, 2:5])
    grey = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8)
    assert torch.equal(central_view(grey, 6), torch.full((1, 3, 6, 6), 77, dtype=torch.uint8))
