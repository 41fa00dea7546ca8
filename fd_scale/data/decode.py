"""What pixels are in these bytes? Always 8-bit RGB, whatever the file calls itself.

The content decides, not the extension. The header is read first, so that of a JPEG no more need be decoded
than a view asks for (``jpeg``); everything else, and any JPEG that its decoders refuse, is read whole by
Pillow.

Policies, each where networks and files would otherwise disagree in silence:

- Grey, palette, CMYK and bilevel images become RGB by Pillow's rules.
- 16-bit grey is scaled to 8 bits (Pillow alone would clip it to white). Float images are taken as 0 .. 1.
- Transparent pixels lie on white, as on a page, instead of showing the hidden colour below them.
- Of an animation, the first frame.
- The EXIF orientation is ignored or applied as the recipe says (``view.exif``). In TIFF it is part of the
  format, and always applied.
- More pixels than ``MAX_PIXELS`` are refused before anything is decoded.
- A JPEG that is cut short is refused; damage inside it that still decodes is not seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Literal, TypeVar

import numpy as np
from PIL import Image, ImageOps

from fd_scale.data import jpeg
from fd_scale.data.faults import SampleError
from fd_scale.data.jpeg import Decoder, Divisor

MAX_PIXELS = 89_478_485
"""Largest image, a quarter GiB of RGB: the size from which Pillow suspects a decompression bomb."""

_JPEG = b"\xff\xd8\xff"
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
"""What Pillow may try: no format whose reader would start another program (EPS) or fetch anything."""

Exif = Literal["ignore", "apply"]
T = TypeVar("T")


class DecodeError(SampleError):
    """Bytes that are no usable image."""

    stage = "decode"


class Picture:
    """An image whose size is known and of which any part can be had; see ``read``."""

    def __init__(
        self, pixels: np.ndarray | None, image: bytes, decoder: Decoder, height: int, width: int
    ) -> None:
        self.height, self.width = height, width
        self._pixels, self._image, self._decoder = pixels, image, decoder

    @property
    def can_shrink(self) -> bool:
        """Whether ``region`` takes a divisor: for JPEGs that need not be turned or converted."""
        return self._pixels is None

    def whole(self) -> np.ndarray:
        """uint8 (height, width, 3), contiguous RGB; raises ``DecodeError``, as all that follows."""
        if self._pixels is None:
            self._pixels = self._guarded(lambda: jpeg.whole(self._image, self._decoder))
        return self._pixels

    def region(self, top: int, left: int, height: int, width: int, divisor: Divisor = 1) -> np.ndarray:
        """The box of these pixels, uint8 (height, width, 3); may share memory with the whole.

        With a divisor, which only a picture that ``can_shrink`` takes, of the image at 1 / divisor of its
        size, rounded up.
        """
        if self._pixels is not None and divisor == 1:
            return self._pixels[top : top + height, left : left + width]
        box = (top, left, height, width)
        return self._guarded(lambda: jpeg.region(self._image, *box, self._decoder, divisor))

    def _guarded(self, make: Callable[[], T]) -> T:
        return _guarded(self._image, make)


def read(image: bytes, *, exif: Exif = "ignore", decoder: Decoder = "simplejpeg") -> Picture:
    """Look into the bytes of an image; raises ``DecodeError``. ``decoder`` is what ``jpeg.resolve`` gave."""
    if not image:
        raise DecodeError("the file is empty")
    return _guarded(image, lambda: _read(image, exif, decoder))


def decode(image: bytes, *, exif: Exif = "ignore", decoder: Decoder = "simplejpeg") -> np.ndarray:
    """The image as a contiguous uint8 array (height, width, 3), RGB; raises ``DecodeError``."""
    return read(image, exif=exif, decoder=decoder).whole()


def of_pixels(pixels_HWC: np.ndarray) -> Picture:
    """A picture from its pixels, uint8 (height, width, 3)."""
    return Picture(pixels_HWC, b"", "simplejpeg", *pixels_HWC.shape[:2])


def _guarded(image: bytes, make: Callable[[], T]) -> T:
    try:
        return make()
    except (DecodeError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # a parser given hostile bytes may raise anything; one image must not end a run
        raise DecodeError(
            f"{_kind(image)} of {len(image):,} bytes: {error or type(error).__name__}"
        ) from None


def _read(image: bytes, exif: Exif, decoder: Decoder) -> Picture:
    if image.startswith(_JPEG) and (found := _plain_jpeg(image)):
        turn = _turn(image) if exif == "apply" else None
        if turn is None:
            return Picture(None, image, decoder, found.height, found.width)
        return of_pixels(_turned(jpeg.whole(image, decoder), *turn))
    return of_pixels(_by_pillow(image, exif))


def _plain_jpeg(image: bytes) -> jpeg.Header | None:
    """The header of an ordinary JPEG; ``None`` leaves it to Pillow, which knows more kinds."""
    try:
        found = jpeg.header(image)
    except ValueError:
        return None
    _check_size(found.height, found.width)
    return None if found.space in ("CMYK", "YCCK") else found


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


def _turn(image: bytes) -> tuple[int, bool] | None:
    with _open(image) as opened:
        return _TURNS.get(opened.getexif().get(0x0112, 1))


def _turned(pixels: np.ndarray, turns: int, mirror: bool) -> np.ndarray:
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
