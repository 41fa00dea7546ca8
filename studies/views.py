"""The random view of a whole batch at once, on its device: what ``fd_scale.data.view`` does image by image.

Boxes have the distribution of the product's own (area uniform, log ratio uniform), except that a side longer
than the image is cut to it instead of drawn again. Pixels stay uint8, and all networks see the same ones.

Shape letters: B images, S the side of an image and T of a view, pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_scale.run import recipe as recipes


def random_view(pixels_B3SS: Tensor, view: recipes.View, size: int, generator: torch.Generator) -> Tensor:
    """uint8 (B, 3, T, T): a crop and flip per image, resampled bilinearly; ``generator`` is the CPU's."""
    count, device = len(pixels_B3SS), pixels_B3SS.device
    drawn = torch.rand(5, count, generator=generator).to(device, non_blocking=True)
    low, high = view.crop_scale
    area = low + (high - low) * drawn[0]
    log_low, log_high = (math.log(ratio) for ratio in view.crop_ratio)
    ratio = torch.exp(log_low + (log_high - log_low) * drawn[1])
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    mirror = torch.where(drawn[2] < view.flip, -1.0, 1.0)
    # To grid_sample the image reaches from -1 to 1, and a box is its centre and half its sides.
    left, top = (1 - width) * (2 * drawn[3] - 1), (1 - height) * (2 * drawn[4] - 1)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirror, left
    theta[:, 1, 1], theta[:, 1, 2] = height, top
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    sampled = F.grid_sample(pixels_B3SS.float(), grid, padding_mode="reflection", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def central_view(pixels_B3SS: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, T, T): the central square, which is cut out of a larger image and blown up from a smaller
    one."""
    side = pixels_B3SS.shape[-1]
    if side >= size:
        first = (side - size) // 2
        return pixels_B3SS[:, :, first : first + size, first : first + size]
    resized = F.interpolate(pixels_B3SS.float(), size=(size, size), mode="bicubic", align_corners=False)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
