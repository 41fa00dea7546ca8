"""How do the colours of a view change? By parameters of each sample's own, applied to a batch on its device.

Drawing happens where the sample is read, from its key, so that colours are as repeatable as crops; the
arithmetic is left to the device, where it is cheap. All networks see the same colours. The steps are
torchvision's ColorJitter in a fixed order (brightness, contrast, saturation, hue), then grey.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fd_scale.data import philox
from fd_scale.run.sections import Color

NUM_PARAMETERS = 5
"""Factors of brightness, contrast and saturation, turn of the hue (1 is the full circle), share of grey."""

_GREY_WEIGHTS = (0.2989, 0.587, 0.114)


def draw(color: Color, key: bytes | np.ndarray) -> np.ndarray:
    """The parameters of a sample (its Philox key, ``plan.Samples.key``), float32 (``NUM_PARAMETERS``,)."""
    row = np.frombuffer(key, dtype="<u8") if isinstance(key, bytes) else key
    uniform = philox.uniforms(philox.words(philox.key("fd.color", *row.tolist()), 2 + 4))
    jitters, greys = uniform[0] < color.jitter, uniform[1] < color.grey
    signed = 2 * uniform[2:] - 1 if jitters else np.zeros(4)
    spread = np.array([color.brightness, color.contrast, color.saturation, color.hue])
    # Below zero there is no factor; torchvision cuts the range there too.
    low, high = np.maximum(1 - spread[:3], 0), 1 + spread[:3]
    factors = low + (high - low) * (signed[:3] + 1) / 2 if jitters else np.ones(3)
    return np.array([*factors, signed[3] * spread[3], greys], dtype=np.float32)


def apply(pixels_B3HW: Tensor, color_BP: Tensor) -> Tensor:
    """The uint8 pixels in the colours that ``draw`` gave each sample; of the same shape, device, layout."""
    brightness, contrast, saturation, hue, grey = color_BP.float()[:, :, None, None, None].unbind(1)
    image = pixels_B3HW.float() / 255
    image = (image * brightness).clamp(0, 1)
    image = (contrast * image + (1 - contrast) * _grey(image).mean((1, 2, 3), keepdim=True)).clamp(0, 1)
    image = (saturation * image + (1 - saturation) * _grey(image)).clamp(0, 1)
    image = _turn_hue(image, hue[:, 0])
    image = torch.lerp(image, _grey(image).expand_as(image), grey)
    return torch.empty_like(pixels_B3HW).copy_((image * 255).round())


def _grey(image_B3HW: Tensor) -> Tensor:
    red, green, blue = image_B3HW.unbind(1)
    weights = _GREY_WEIGHTS
    return (weights[0] * red + weights[1] * green + weights[2] * blue)[:, None]


def _turn_hue(image_B3HW: Tensor, hue_B11: Tensor) -> Tensor:
    """Add to the hue, keeping value and saturation: each colour is a clipped triangle wave of the hue."""
    red, green, blue = image_B3HW.unbind(1)
    value, least = image_B3HW.amax(1), image_B3HW.amin(1)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, 1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    turned = sector + 6 * hue_B11
    waves = [((turned + shift) % 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 4, 2)]
    return torch.stack([least + chroma * wave for wave in waves], 1)
