"""What pixels are in these bytes? Always 8-bit RGB, whatever the file calls itself.

The content decides, not the extension. JPEG goes through simplejpeg, everything else and any JPEG that it
refuses through Pillow; both use libjpeg-turbo with its accurate transform and agree bit for bit.

Policies, each where networks and files would otherwise disagree in silence:

- Grey, palette, CMYK and bilevel images become RGB by Pillow's rules.
- 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white). Float images are taken as 0 .. 1.
- Transparent pixels lie on white, as on a page, instead of showing the hidden colour below them.
- Of an animation, the first frame.
- The EXIF orientation is ignored or applied as the recipe says (``view.exif``). In TIFF it is part of the
  format, and always applied.
- More pixels than ``MAX_PIXELS`` are refused before anything is decoded.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from fd_scale.data.faults import SampleError

MAX_PIXELS = 89_478_485
"""Largest image, a quarter GiB of RGB: the size from which Pillow suspects a decompression bomb."""

_JPEG = b"\xff\xd8\xff"
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What Pillow may try: no format whose reader would start another program (EPS) or fetch anything."""

Exif = Literal["ignore", "apply"]


class DecodeError(SampleError):
    """Bytes that are no usable image."""

    stage = "decode"


def decode(image: bytes, *, exif: Exif = "ignore") -> np.ndarray:
    """The image as a contiguous uint8 array (height, width, 3), RGB; raises ``DecodeError``."""
    if not image:
        raise DecodeError("the file is empty")
    try:
        if image.startswith(_JPEG) and (pixels := _fast_jpeg(image)) is not None:
            return _oriented(pixels, image) if exif == "apply" else pixels
        return _by_pillow(image, exif)
    except (DecodeError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # a parser given hostile bytes may raise anything, and one image must not end a run
        raise DecodeError(
            f"{_kind(image)} of {len(image):,} bytes: {error or type(error).__name__}"
        ) from None


def _fast_jpeg(image: bytes) -> np.ndarray | None:
    """The pixels of an ordinary JPEG; ``None`` leaves it to Pillow, which knows more kinds."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(image)
        _check_size(height, width)
        return None if space in ("CMYK", "YCCK") else simplejpeg.decode_jpeg(image, "RGB")
    except ValueError:
        return None


def _by_pillow(image: bytes, exif: Exif) -> np.ndarray:
    with warnings.catch_warnings(), _open(image) as opened:
        warnings.simplefilter("ignore")  # oddities of metadata do not matter to the pixels
        _check_size(opened.height, opened.width)
        opened.load()
        upright = ImageOps.exif_transpose(opened) if exif == "apply" else opened
        return np.array(_rgb(upright), dtype=np.uint8)


def _open(image: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its size is judged by _check_size
        Image.init()
        return Image.open(BytesIO(image), formats=[name for name in _FORMATS if name in Image.OPEN])


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")


def _rgb(image: Image.Image) -> Image.Image:
    """An 8-bit RGB image of the same size, by the policies above."""
    if image.mode.startswith("I"):
        return _grey(np.asarray(image).astype(np.float32) / 65535, "16-bit")
    if image.mode == "F":
        return _grey(np.asarray(image).astype(np.float32), "float")
    if image.has_transparency_data:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        return page.convert("RGB")
    return image.convert("RGB")


def _grey(share: np.ndarray, kind: str) -> Image.Image:
    """Grey from shares of full white; a range that is not the one stated cannot be guessed."""
    if not (share.min() >= 0 and share.max() <= 1):
        raise DecodeError(
            f"{kind} grey image with values from {share.min():g} to {share.max():g} of full white"
        )
    return Image.fromarray(np.rint(share * 255).astype(np.uint8)).convert("RGB")


_TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
"""EXIF orientation: quarter turns counter-clockwise, then whether to mirror left to right."""


def _oriented(pixels: np.ndarray, image: bytes) -> np.ndarray:
    with _open(image) as opened:
        turns, mirror = _TURNS.get(opened.getexif().get(0x0112, 1), (0, False))
    turned = np.rot90(pixels, turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirror else turned)


def _kind(image: bytes) -> str:
    """What the first bytes say, for a message."""
    known = (
        (_JPEG, "JPEG"),
        (b"\x89PNG", "PNG"),
        (b"RIFF", "WebP"),
        (b"GIF8", "GIF"),
        (b"II*", "TIFF"),
        (b"MM", "TIFF"),
    )
    return next((name for magic, name in known if image.startswith(magic)), f"file beginning {image[:12]!r}")
