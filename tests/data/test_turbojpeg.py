"""TurboJPEG by itself: which files it takes regions of, and that no library but its own is called."""

import ctypes.util
import importlib.metadata
import importlib.util
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


@pytest.fixture
def nobodys_package(monkeypatch):
    """As if the package turbojpeg were not installed."""

    def files(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", files)


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


@needs_turbojpeg
def test_damaged_files_end_no_process():
    """Bytes changed, left out, put in, and cut off, more of them in the headers, at every size."""
    rng = np.random.default_rng(0)
    images = [encoded(picture(4, 48, 80), "JPEG", **options) for options in KINDS]
    for _ in range(2000):
        bad = bytearray(images[rng.integers(len(images))])
        for _ in range(rng.integers(1, 8)):
            begin = int(rng.integers(2, 700 if rng.random() < 0.6 else len(bad)))
            length = int(rng.integers(0, 6))
            bad[begin : begin + length] = rng.bytes(int(rng.integers(0, 6)))
        divisor = int(2 ** rng.integers(4))
        found = turbojpeg.region(bytes(bad), 0, 0, 48 // divisor, 80 // divisor, divisor)
        assert found is None or found.shape == (48 // divisor, 80 // divisor, 3)


def test_without_the_library_there_are_no_regions(search, nobodys_package):
    search.setattr(turbojpeg, "_NAME", "libturbojpeg-of-nobody.so.0")
    assert not turbojpeg.is_installed()
    assert turbojpeg.region(encoded(picture(4, 64, 96), "JPEG"), 0, 0, 8, 8, 1) is None


def test_an_older_library_is_not_taken(search, nobodys_package):
    """One that loads but lacks the functions of version 3; the environment's is looked at first."""
    older = ctypes.util.find_library("c") or "libc.so.6"
    search.setattr(turbojpeg, "_NAME", older)
    assert not turbojpeg.is_installed()


def test_the_environments_own_library_comes_first_and_the_packages_last(search, tmp_path):
    tried = []

    def load(name):
        tried.append(name)
        raise OSError("not there")

    packaged = importlib.metadata.PackagePath("turbojpeg.libs/libturbojpeg-1.so.0")
    packaged.dist = importlib.metadata.distribution("pip")
    search.setattr(importlib.metadata, "files", {"turbojpeg": [Path("turbojpeg.so"), packaged]}.get)
    search.setattr(sys, "prefix", str(tmp_path))
    search.setattr(ctypes, "CDLL", load)
    assert not turbojpeg.is_installed()
    name = turbojpeg._NAME
    assert tried == [str(tmp_path / "lib" / name), name, str(packaged.locate())]


@pytest.mark.skipif(
    importlib.util.find_spec("turbojpeg") is None, reason="needs the package: pip install turbojpeg"
)
def test_the_packages_library_has_regions(search):
    """Found without those of the environment and the system."""
    search.setattr(turbojpeg, "_NAME", "libturbojpeg-of-nobody.so.0")
    image = encoded(picture(4, 64, 96), "JPEG")
    found = turbojpeg.region(image, 8, 16, 30, 40, 1)
    np.testing.assert_array_equal(found, drafted(image, 1)[8:38, 16:56])
