"""Colours: torchvision's arithmetic for every sample's own parameters, drawn from its key alone."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as theirs

from fd_scale.data import color, philox
from fd_scale.run.sections import Color
from tests.data.pictures import picture

JITTER = Color(jitter=1.0, brightness=0.6, contrast=0.5, saturation=0.7, hue=0.3, grey=0.3)


def key(number: int) -> np.ndarray:
    return philox.as_array([philox.key("fd.test", number)])[0]


def pixels(count: int, height: int = 31, width: int = 40) -> torch.Tensor:
    images = [np.asarray(picture(n, height, width)) for n in range(count)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def one_by_one(image_3HW: torch.Tensor, parameters: np.ndarray) -> torch.Tensor:
    brightness, contrast, saturation, hue, grey = map(float, parameters)
    image = image_3HW.double() / 255
    image = theirs.adjust_brightness(image, brightness)
    image = theirs.adjust_contrast(image, contrast)
    image = theirs.adjust_saturation(image, saturation)
    image = theirs.adjust_hue(image, hue)
    return (theirs.rgb_to_grayscale(image, 3) if grey else image) * 255


def test_a_batch_is_torchvisions_sample_by_sample():
    batch = pixels(24)
    drawn = np.stack([color.draw(JITTER, key(n)) for n in range(24)])
    changed = color.apply(batch, torch.from_numpy(drawn))
    assert changed.dtype == torch.uint8
    assert changed.is_contiguous(memory_format=torch.channels_last)
    for row in range(24):
        expected = one_by_one(batch[row], drawn[row])
        # Half a level is the rounding; float32 against float64 adds 0.003 (hue of nearly grey pixels).
        assert (changed[row] - expected).abs().max() < 0.51
    assert 2 <= (drawn[:, 4] == 1).sum() <= 14


def test_no_change_is_exactly_none():
    batch = pixels(3)
    off = np.stack([color.draw(Color(), key(n)) for n in range(3)])
    np.testing.assert_array_equal(off, np.tile(np.float32([1, 1, 1, 0, 0]), (3, 1)))
    assert torch.equal(color.apply(batch, torch.from_numpy(off)), batch)
    every = torch.arange(256, dtype=torch.uint8)
    cube = torch.stack(torch.meshgrid(every[::5], every[::7], every[::3], indexing="ij")).reshape(1, 3, -1, 1)
    assert torch.equal(color.apply(cube, torch.from_numpy(off[:1])), cube)


def test_parameters_lie_in_their_ranges_and_depend_on_the_key_alone():
    drawn = np.stack([color.draw(JITTER, key(n)) for n in range(3000)])
    for column, (low, high) in enumerate([(0.4, 1.6), (0.5, 1.5), (0.3, 1.7), (-0.3, 0.3)]):
        values = drawn[:, column]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        # The mean of 3000 uniform values strays by 0.5 % of the range; 4 standard deviations.
        assert abs(values.mean() - (low + high) / 2) < 0.022 * (high - low)
    assert abs(drawn[:, 4].mean() - 0.3) < 0.034
    np.testing.assert_array_equal(color.draw(JITTER, key(5)), drawn[5])
    np.testing.assert_array_equal(color.draw(JITTER, philox.key("fd.test", 5)), drawn[5])


def test_jitter_comes_at_its_rate_and_factors_stay_above_zero():
    rate = Color(jitter=0.25, brightness=3.0)
    drawn = np.stack([color.draw(rate, key(n)) for n in range(3000)])
    changed = (drawn[:, :4] != np.float32([1, 1, 1, 0])).any(1)
    assert abs(changed.mean() - 0.25) < 0.032  # 4 standard deviations
    assert drawn[:, 0].min() >= 0
    assert drawn[changed, 0].max() > 3.9


def test_what_is_off_is_off():
    assert not Color().is_on
    assert Color(jitter=0.1).is_on
    assert Color(grey=0.1).is_on
    only_hue = np.stack(
        [
            color.draw(Color(jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0), key(n))
            for n in range(9)
        ]
    )
    assert (only_hue[:, :3] == 1).all()
    assert (only_hue[:, 3] != 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_gives_the_same_colours():
    batch = pixels(8)
    drawn = torch.from_numpy(np.stack([color.draw(JITTER, key(n)) for n in range(8)]))
    there = color.apply(batch.cuda(), drawn.cuda()).cpu()
    # A product rounded otherwise may cross the middle between two levels.
    assert (there.int() - color.apply(batch, drawn).int()).abs().max() <= 1
