"""TurboJPEG by itself: which files it takes regions of, and that no library but its own is called."""

import ctypes.util
import sys
from pathlib import Path

import numpy as np
import pytest

from fd_scale.data import turbojpeg
from tests.data.pictures import encoded, picture
from tests.data.test_jpeg import KINDS, drafted, needs_turbojpeg


@pytest.fixture
def search(monkeypatch):
    """Lets a test say where libraries are; what was found is forgotten before and after."""
    turbojpeg._library.cache_clear()
    yield monkeypatch
    turbojpeg._library.cache_clear()


@needs_turbojpeg
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_it_decodes_regions_itself_wherever_the_others_would_cut(options, mode, divisor):
    """``jpeg`` would decode the whole by another library where this one gives nothing."""
    image = encoded(picture(3, 203, 301, mode), "JPEG", **options)
    expected = drafted(image, divisor)
    rows, columns = expected.shape[:2]
    for top, left, height, width in [
        (0, 0, rows, columns),
        (0, 0, 1, 8),
        (rows - 1, columns - 8, 1, 8),
        (rows // 3, columns // 3, rows // 2, columns // 2),
    ]:
        found = turbojpeg.region(image, top, left, height, width, divisor)
        np.testing.assert_array_equal(found, expected[top : top + height, left : left + width])


@needs_turbojpeg
def test_what_it_cannot_decode_is_none():
    image = encoded(picture(4, 64, 96), "JPEG")
    cmyk = encoded(picture(4, 64, 96, "CMYK"), "JPEG")
    half = image[: len(image) // 2]
    for bad in (b"", b"\xff\xd8\xff", image[:100], half, half + b"\xff\xd9", cmyk, b"\x89PNG" + image):
        assert turbojpeg.region(bad, 0, 0, 64, 96, 1) is None


@needs_turbojpeg
@pytest.mark.parametrize(
    "box",
    [
        *[(0, 0, 65, 96), (0, 0, 64, 97), (60, 0, 5, 96), (-1, 0, 8, 8)],  # over an edge
        *[(64, 0, 8, 8), (0, 96, 8, 8), (0, 98, 8, 8), (0, 2**20, 8, 8)],  # beyond it
        *[(0, 0, 0, 96), (0, 0, 64, 0), (0, 8, 8, -8)],  # of no size
    ],
)
def test_a_box_that_is_not_within_the_image_is_not_decoded(box):
    """More pixels than there is room for would be written elsewhere."""
    assert turbojpeg.region(encoded(picture(4, 64, 96), "JPEG"), *box, 1) is None


@needs_turbojpeg
def test_it_holds_no_memory_back():
    """A decoder kept for every image would grow by 100 KiB and more each time; 0 KiB seen."""
    resource = pytest.importorskip("resource")
    image = encoded(picture(4, 64, 96), "JPEG")
    for bad in (image, image[: len(image) // 2]):
        for _ in range(20):
            turbojpeg.region(bad, 8, 8, 32, 32, 1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(300):
            turbojpeg.region(bad, 8, 8, 32, 32, 1)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB


def test_without_the_library_there_are_no_regions(search, tmp_path):
    search.setattr(turbojpeg, "_NAME", "libturbojpeg-of-nobody.so.0")
    assert not turbojpeg.is_installed()
    assert turbojpeg.region(encoded(picture(4, 64, 96), "JPEG"), 0, 0, 8, 8, 1) is None


def test_an_older_library_is_not_taken(search, tmp_path):
    """One that loads but lacks the functions of version 3; the environment's is looked at first."""
    older = ctypes.util.find_library("c") or "libc.so.6"
    search.setattr(turbojpeg, "_NAME", older)
    assert not turbojpeg.is_installed()


@needs_turbojpeg
def test_the_environments_own_library_comes_first(search, tmp_path):
    loaded = []
    real = ctypes.CDLL

    def load(name):
        loaded.append(name)
        return real(turbojpeg._NAME)

    search.setattr(sys, "prefix", str(tmp_path))
    search.setattr(ctypes, "CDLL", load)
    assert turbojpeg.is_installed()
    assert loaded == [str(Path(tmp_path) / "lib" / turbojpeg._NAME)]
