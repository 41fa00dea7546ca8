"""Pictures made by code: smooth, so that JPEG and resampling treat them like photographs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int, mode: str = "RGB") -> Image.Image:
    """A smooth random picture with fine grain on top."""
    rng = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = [Image.fromarray(rng.integers(0, 256, (4, 5), dtype=np.uint8)) for _ in range(channels)]
    planes = [
        np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC), dtype=int) for plane in coarse
    ]
    grain = rng.integers(-8, 9, (height, width))
    bands = [Image.fromarray(np.clip(plane + grain, 0, 255).astype(np.uint8)) for plane in planes]
    return Image.merge(mode, bands) if channels > 1 else bands[0]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    """The bytes of a picture in a file format."""
    buffer = BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed: int, height: int = 48, width: int = 64, mode: str = "RGB", **options: Any) -> bytes:
    """A JPEG file."""
    return encoded(picture(seed, height, width, mode), "JPEG", **options)


def image_folder(folder: Path, count: int, classes: int = 0) -> Path:
    """A folder of ``count`` JPEGs of different sizes, flat or spread over so many class folders."""
    for number in range(count):
        place = folder / f"class_{number % classes}" if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        content = jpeg(number, 40 + number % 7, 50 + number % 11)
        (place / f"picture {number:03d}.JPEG").write_bytes(content)
    return folder
