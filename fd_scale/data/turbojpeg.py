"""What does TurboJPEG 3 make of a box of a JPEG at 1, 1/2, 1/4 or 1/8 of its size? The box, and no more.

Of the decoders that ``jpeg`` knows it alone cuts and shrinks at once. The library (``libturbojpeg``, with the
functions of version 3) is that of Python's environment, of the system, or the copy in the package turbojpeg
(extra ``fastjpeg``), whose own functions pass no region on: it is called by ctypes. It survives damaged files
itself and says that it failed; what becomes of the file then is the business of ``jpeg``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_NAME = "libturbojpeg.dylib" if sys.platform == "darwin" else "libturbojpeg.so.0"

# From turbojpeg.h; they hold for the whole of version 3.
_DECOMPRESS = 1
_SUBSAMPLING, _WIDTH, _HEIGHT = 4, 5, 6
_RGB = 0
_UNIT_WIDTHS = (8, 16, 16, 8, 8, 32, 8)
"""By kind of subsampling: a region begins at a multiple of so many pixels of the file."""

_MARGIN = 2
"""Pixels decoded to the left and right of the box: at a rim, colours would miss their neighbours."""


class _Fraction(ctypes.Structure):
    _fields_ = [("numerator", ctypes.c_int), ("denominator", ctypes.c_int)]


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("left", "top", "width", "height")]


def is_installed() -> bool:
    """Whether the library is to be found, in version 3 or later."""
    return _library() is not None


def region(image: bytes, top: int, left: int, height: int, width: int, divisor: int) -> np.ndarray | None:
    """The pixels of a box of the image at 1 / divisor of its size (rounded up), uint8 (height, width, 3) RGB.

    The box counts pixels of that smaller image and lies within it. The same values as if the whole were
    decoded at that size and cut. ``None`` where the file is damaged, too small for the box, or of a kind that
    has no regions.
    """
    library = _library()
    if library is None:
        return None
    with _decoder(library) as decoder:
        library.tj3SetScalingFactor(decoder, _Fraction(1, divisor))
        if library.tj3DecompressHeader(decoder, image, len(image)):
            return None
        subsampling = library.tj3Get(decoder, _SUBSAMPLING)
        if not 0 <= subsampling < len(_UNIT_WIDTHS):
            return None
        unit = -(-_UNIT_WIDTHS[subsampling] // divisor)
        begin = max(0, left - _MARGIN) // unit * unit
        end = min(left + width + _MARGIN, -(-library.tj3Get(decoder, _WIDTH) // divisor))
        if height < 1 or not 0 < width <= end - left:
            return None  # to the library nothing means everything, for which there would be no room
        if library.tj3SetCroppingRegion(decoder, _Region(begin, top, end - begin, height)):
            return None
        pixels = np.empty((height, end - begin, 3), dtype=np.uint8)
        if library.tj3Decompress8(decoder, image, len(image), pixels.ctypes.data, 0, _RGB):
            return None
    return pixels[:, left - begin : left - begin + width]


@contextlib.contextmanager
def _decoder(library: ctypes.CDLL) -> Iterator[int]:
    """A decoder for one image: making one takes microseconds, and nothing is left over for the next."""
    decoder = library.tj3Init(_DECOMPRESS)
    if not decoder:
        raise MemoryError("TurboJPEG cannot make a decoder")
    try:
        yield decoder
    finally:
        library.tj3Destroy(decoder)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library of this Python's environment, or else the system's, or else the package's."""
    for name in (str(Path(sys.prefix) / "lib" / _NAME), _NAME, *_packaged()):
        with contextlib.suppress(OSError, AttributeError):  # not there; of version 2, without the functions
            return _declared(ctypes.CDLL(name))
    return None


def _packaged() -> list[str]:
    """Libraries that came with the package turbojpeg."""
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    whole, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    for name, returned, taken in (
        ("tj3Init", pointer, [whole]),
        ("tj3Destroy", None, [pointer]),
        ("tj3Get", whole, [pointer, whole]),
        ("tj3DecompressHeader", whole, [pointer, ctypes.c_char_p, size]),
        ("tj3SetScalingFactor", whole, [pointer, _Fraction]),
        ("tj3SetCroppingRegion", whole, [pointer, _Region]),
        ("tj3Decompress8", whole, [pointer, ctypes.c_char_p, size, pointer, whole, whole]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = returned, taken
    return library
