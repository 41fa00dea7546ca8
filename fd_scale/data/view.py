"""Which part of an image do the networks see, and at which sizes?

One crop and flip per sample, shared by all networks, drawn from the sample's own key; each distinct input
size is resampled from that same crop, and asking for other sizes changes no crop. No more of the image is
decoded than the crop needs. Pixels stay uint8: every network normalises at its own door. Colours are changed
later, on the device (``color``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as geometry

from fd_scale.data import philox
from fd_scale.data.decode import Picture
from fd_scale.run import recipe

TRIES = 10
"""Attempts to fit a crop before the central one is taken (torchvision's RandomResizedCrop)."""

MARGINS: dict[Literal[8, 4, 2], int] = {8: 2, 4: 2, 2: 1}
"""By divisor: a photograph is decoded at that part of its size only if the crop keeps this many pixels per
pixel of a view. On photographs that is 50 dB from the exact view of the same box, which is first snapped to
whole pixels of the small image (so against the box as drawn it is a slightly other crop)."""

_MANY_ROWS = 1.25
"""From so many rows for each one of the view on, the height is resampled before the width. PyTorch by itself
begins with the width, and works on rows of which few are left: a quarter of the time on large crops."""

Interpolation = Literal["bicubic", "bilinear"]


class Box(NamedTuple):
    """A crop in pixels of the decoded image, and whether it is mirrored left to right after resampling."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


def draw(view: recipe.View, key: bytes | np.ndarray, height: int, width: int) -> Box:
    """The crop and flip of a sample (its Philox key, ``plan.Samples.key``) whose image is height x width.

    The algorithm of torchvision's RandomResizedCrop: area uniform in ``crop_scale``, log aspect ratio uniform
    in ``crop_ratio``, ``TRIES`` attempts, then the largest central crop within the ratios.
    """
    # As plain numbers, since most crops fit at once: arrays would cost more than they hold.
    uniform = map(philox.uniform, philox.words(key, 1 + 4 * TRIES).tolist())
    flip = next(uniform) < view.flip
    low, high = view.crop_scale
    log_low, log_high = math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])
    for by_area, by_ratio, by_top, by_left in zip(*[uniform] * 4, strict=True):
        area = height * width * (low + (high - low) * by_area)
        ratio = math.exp(log_low + (log_high - log_low) * by_ratio)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(by_top * (height - crop_height + 1)), int(by_left * (width - crop_width + 1))
            return Box(top, left, crop_height, crop_width, flip)
    return _central(view.crop_ratio, height, width)._replace(flip=flip)


def apply(
    picture: Picture, box: Box, sizes: Sequence[int], interpolation: Interpolation, *, shrink: bool = False
) -> dict[int, Tensor]:
    """Every size (pixels) with its uint8 (3, size, size) view of the crop; antialiased on uint8.

    ``shrink`` lets a large photograph be decoded at a part of its size, the box moved by less than a pixel of
    the view, where that leaves enough for the largest size (``MARGINS``). Channels are last in memory.
    """
    crop_HWC = _crop(picture, box, max(sizes), shrink)
    views = {size: _resize(crop_HWC, size, size, interpolation) for size in sizes}
    return {size: view.flip(-1) if box.flip else view for size, view in views.items()}


def training_view(
    picture: Picture, key: np.ndarray, sizes: Sequence[int], *, view: recipe.View
) -> dict[int, Tensor]:
    """Draw and apply: the views of one training sample."""
    box = draw(view, key, picture.height, picture.width)
    return apply(picture, box, sizes, view.interpolation, shrink=view.shrink)


def centre_view(image_HWC: np.ndarray, *, size: int, crop_pct: float) -> Tensor:
    """The view of evaluation: short side to floor(size / crop_pct), central square; uint8 (3, size, size).

    As timm evaluates with ``crop_mode='center'``; ``crop_pct`` is in (0, 1], resampling bicubic.
    """
    height, width = image_HWC.shape[:2]
    short = math.floor(size / crop_pct)
    if height <= width:
        resized = _resize(image_HWC, short, short * width // height, "bicubic")
    else:
        resized = _resize(image_HWC, short * height // width, short, "bicubic")
    return geometry.center_crop(resized, [size, size])


def _crop(picture: Picture, box: Box, largest: int, shrink: bool) -> np.ndarray:
    """The pixels of a box, or fewer where that is enough."""
    if shrink and picture.can_shrink:
        for divisor, margin in MARGINS.items():
            if min(box.height, box.width) >= margin * largest * divisor:
                # Rounded to whole pixels of the small image, or the crop would sit beside its place.
                top, left, height, width = (round(side / divisor) for side in box[:4])
                height = min(height, -(-picture.height // divisor) - top)
                width = min(width, -(-picture.width // divisor) - left)
                return picture.region(top, left, height, width, divisor)
    return picture.region(*box[:4])


def _resize(image_HWC: np.ndarray, height: int, width: int, interpolation: Interpolation) -> Tensor:
    """uint8 (3, height, width) with the channels of a pixel side by side, which is also the fastest way.

    PyTorch itself and not torchvision, which on some processors would calculate in float32 and round
    otherwise, and takes 0.05 ms to find out that it need not.
    """
    pixels_NHWC = np.ascontiguousarray(image_HWC).reshape(1, *image_HWC.shape)
    planes_NCHW = torch.from_numpy(pixels_NHWC.transpose(0, 3, 1, 2))
    if planes_NCHW.shape[2] > _MANY_ROWS * height:
        planes_NCHW = F.interpolate(
            planes_NCHW, (height, planes_NCHW.shape[3]), mode=interpolation, antialias=True
        )
    return F.interpolate(planes_NCHW, (height, width), mode=interpolation, antialias=True)[0]


def _central(crop_ratio: tuple[float, float], height: int, width: int) -> Box:
    lowest, highest = crop_ratio
    crop_height, crop_width = height, width
    if width / height < lowest:
        crop_height = round(width / lowest)
    elif width / height > highest:
        crop_width = round(height * highest)
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, False)
