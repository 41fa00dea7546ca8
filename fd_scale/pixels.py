"""The front door of every network: uint8 pixels to its own normalised floats.

Pixels travel as uint8, and each network, teacher or student, normalises them on its device by its own mean
and standard deviation. Cropping, resizing and flipping happened before, once for all networks.

Shape letters: B images, 3 colours (RGB), H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(pixels_B3HW: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """``(pixels / 255 - mean) / std`` per channel, (B, 3, H, W) in ``dtype``.

    The arithmetic is float32 (float64 for a float64 result) and the cast comes last: mean and std rounded
    to bf16 would shift every image by up to 0.4 % of its range. They are plain numbers rather than tensors,
    so that no engine can cast them with a module and no step waits for their copy to a device. Raises
    ``ValueError`` for pixels that are not uint8 (B, 3, H, W).
    """
    if pixels_B3HW.dtype != torch.uint8 or pixels_B3HW.ndim != 4 or pixels_B3HW.shape[1] != 3:
        raise ValueError(
            f"pixels of shape {tuple(pixels_B3HW.shape)} and dtype {pixels_B3HW.dtype} are not uint8 "
            "(B, 3, H, W): they stay uint8 until here, so that nobody normalises them twice"
        )
    values_B3HW = pixels_B3HW.to(torch.promote_types(dtype, torch.float32)).div_(255)
    for channel in range(3):
        values_B3HW[:, channel].sub_(mean[channel]).div_(std[channel])
    return values_B3HW.to(dtype)
