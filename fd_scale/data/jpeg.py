"""How does a JPEG become pixels fastest? By the decoder that is installed, the same pixels from each.

``turbojpeg`` decodes a region at full or smaller size, and no more; ``nvimgcodec`` does so at full size only
(both in the extra ``fastjpeg``); ``simplejpeg`` decodes the whole image and cuts; ``pillow`` does the same,
slower, and reads what the others refuse. All four are libjpeg-turbo with its accurate transform and agree bit
for bit. Images of other formats, and what is done about colour spaces and orientation, are the business of
``decode``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from fd_scale.data import turbojpeg

Decoder = Literal["auto", "turbojpeg", "nvimgcodec", "simplejpeg", "pillow"]
Divisor = Literal[1, 2, 4, 8]
"""By which the size of an image may be divided while it is decoded."""

_END = b"\xff\xd9"
_END_WITHIN = 1024
"""Bytes at the end of a file among which a whole JPEG has its end mark."""
_NARROWEST = 8
"""Narrower regions are cut from the whole: at one pixel beside the left edge, colours come out wrong."""


class Header(NamedTuple):
    """Size in pixels, and the file's colour space: ``Gray``, ``YCbCr``, ``RGB``, ``CMYK`` or ``YCCK``."""

    height: int
    width: int
    space: str


def resolve(decoder: Decoder) -> Decoder:
    """The decoder that ``auto`` means here; raises ``ValueError`` for one that is not installed."""
    if decoder == "auto":
        if turbojpeg.is_installed():
            return "turbojpeg"
        return "nvimgcodec" if _has_nvimgcodec() else "simplejpeg"
    if decoder == "turbojpeg" and not turbojpeg.is_installed():
        raise ValueError(
            "run.decoder='turbojpeg' is not installed: pip install 'fd-scale[fastjpeg]', "
            "or libturbojpeg of version 3 or later on the system"
        )
    if decoder == "nvimgcodec" and not _has_nvimgcodec():
        raise ValueError("run.decoder='nvimgcodec' is not installed: pip install 'fd-scale[fastjpeg]'")
    return decoder


def header(image: bytes) -> Header:
    """Raises ``ValueError`` when the header cannot be read."""
    height, width, space, _ = simplejpeg.decode_jpeg_header(image)
    return Header(height, width, space)


def whole(image: bytes, decoder: Decoder) -> np.ndarray:
    """All pixels, uint8 (height, width, 3) RGB; damage raises ``ValueError`` or ``OSError``."""
    if decoder != "pillow":
        with contextlib.suppress(ValueError):  # stricter than Pillow, which takes oddities of old cameras
            return simplejpeg.decode_jpeg(image, "RGB")
    with Image.open(BytesIO(image), formats=["JPEG"]) as opened:
        return np.array(opened.convert("RGB"), dtype=np.uint8)


def region(
    image: bytes, top: int, left: int, height: int, width: int, decoder: Decoder, divisor: Divisor = 1
) -> np.ndarray:
    """The pixels of a box of the image at 1 / divisor of its size (rounded up), uint8 (height, width, 3).

    The same as those of the whole; a file without its end is damaged as a whole. At a smaller size each block
    is transformed to fewer pixels.
    """
    found = None
    if width >= _NARROWEST and image.rfind(_END, len(image) - _END_WITHIN) >= 0:
        if decoder == "turbojpeg":
            found = turbojpeg.region(image, top, left, height, width, divisor)
        elif decoder == "nvimgcodec" and divisor == 1:
            found = _by_nvimgcodec(image, top, left, height, width)
    if found is not None:
        return found
    everything = whole(image, decoder) if divisor == 1 else _shrunk(image, divisor, decoder)
    return everything[top : top + height, left : left + width]


def _shrunk(image: bytes, divisor: Divisor, decoder: Decoder) -> np.ndarray:
    height, width, _ = header(image)
    if decoder != "pillow":
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg(
                image, "RGB", min_height=-(-height // divisor), min_width=-(-width // divisor)
            )
    with Image.open(BytesIO(image), formats=["JPEG"]) as opened:
        opened.draft("RGB", (width // divisor, height // divisor))
        return np.array(opened.convert("RGB"), dtype=np.uint8)


@functools.cache
def _has_nvimgcodec() -> bool:
    try:
        return importlib.util.find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:  # there is no nvidia package at all
        return False


def _by_nvimgcodec(image: bytes, top: int, left: int, height: int, width: int) -> np.ndarray | None:
    """``None`` where it fails, without saying why."""
    library, decoder, options = _nvimgcodec(os.getpid())
    stream = library.CodeStream(image)
    box = library.Region(top, left, top + height, left + width)
    decoded = decoder.decode(stream.get_sub_code_stream(region=box), params=options)
    return None if decoded is None else np.asarray(decoded)


@functools.lru_cache(maxsize=1)
def _nvimgcodec(_: int) -> tuple[Any, Any, Any]:
    """The library with a decoder of this process (its id), which may be the fork of another."""
    with _no_stderr():  # it lists every decoder of a GPU that it does without
        from nvidia import nvimgcodec

        backend = nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)
        decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY, max_num_cpu_threads=1, backends=[backend]
        )
    options = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
    return nvimgcodec, decoder, options


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Hold back what native code writes to the error stream."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
