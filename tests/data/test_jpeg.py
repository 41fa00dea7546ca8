"""Decoders of JPEG: the same pixels from each, for any region and any shrinking, and the same refusals."""

import io

import numpy as np
import pytest
from PIL import Image

from fd_scale.data import jpeg, turbojpeg
from fd_scale.data.decode import DecodeError, decode, read
from tests.data.pictures import encoded, picture

KINDS = [
    {},
    {"quality": 30},
    {"progressive": True},
    {"subsampling": 0},
    {"subsampling": 1},
    {"restart_marker_blocks": 5},
    {"restart_marker_rows": 1, "subsampling": 1},
]
SIZES = [(1, 1), (8, 9), (17, 33), (120, 75), (64, 300)]

needs_nvimgcodec = pytest.mark.skipif(
    not jpeg._has_nvimgcodec(), reason="needs nvImageCodec: pip install 'fd-scale[fastjpeg]'"
)
needs_turbojpeg = pytest.mark.skipif(
    not turbojpeg.is_installed(), reason="needs libturbojpeg: pip install 'fd-scale[fastjpeg]'"
)
every_decoder = pytest.mark.parametrize(
    "decoder",
    [
        "simplejpeg",
        "pillow",
        pytest.param("nvimgcodec", marks=needs_nvimgcodec),
        pytest.param("turbojpeg", marks=needs_turbojpeg),
    ],
)


def by_pillow(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def drafted(image: bytes, divisor: int) -> np.ndarray:
    opened = Image.open(io.BytesIO(image))
    opened.draft("RGB", (opened.width // divisor, opened.height // divisor))
    return np.asarray(opened.convert("RGB"))


@every_decoder
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_region_is_that_of_pillows_image(decoder, options, mode):
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        image = encoded(picture(number, height, width, mode), "JPEG", **options)
        expected = by_pillow(image)
        photo = read(image, decoder=decoder)
        assert (photo.height, photo.width) == (height, width)
        for _ in range(12):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            tall, wide = int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1))
            found = read(image, decoder=decoder).region(top, left, tall, wide)
            np.testing.assert_array_equal(found, expected[top : top + tall, left : left + wide])
        np.testing.assert_array_equal(photo.whole(), expected)


@every_decoder
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_every_region_of_a_smaller_size_is_that_of_pillows_draft(decoder, options, mode, divisor):
    rng = np.random.default_rng(divisor)
    for number, (height, width) in enumerate([(97, 130), (128, 64), (333, 257)]):
        image = encoded(picture(number, height, width, mode), "JPEG", **options)
        photo, rows, columns = read(image, decoder=decoder), -(-height // divisor), -(-width // divisor)
        expected = drafted(image, divisor)
        assert expected.shape == (rows, columns, 3)
        np.testing.assert_array_equal(photo.region(0, 0, rows, columns, divisor), expected)
        for _ in range(12):
            top, left = int(rng.integers(rows)), int(rng.integers(columns))
            tall, wide = int(rng.integers(1, rows - top + 1)), int(rng.integers(1, columns - left + 1))
            found = photo.region(top, left, tall, wide, divisor)
            np.testing.assert_array_equal(found, expected[top : top + tall, left : left + wide])


@every_decoder
@pytest.mark.parametrize("share", [0.1, 0.5, 0.98])
def test_a_cut_file_is_refused_even_where_the_region_is_whole(decoder, share):
    image = encoded(picture(0, 200, 200), "JPEG")
    cut = image[: int(len(image) * share)]
    with pytest.raises(DecodeError, match="JPEG of"):
        read(cut, decoder=decoder).region(0, 0, 8, 8)
    with pytest.raises(DecodeError, match="JPEG of"):
        read(cut, decoder=decoder).region(0, 0, 8, 8, 2)


@every_decoder
def test_damage_that_decodes_gives_the_same_pixels(decoder):
    image = encoded(picture(0, 200, 260), "JPEG")
    rng = np.random.default_rng(1)
    for _ in range(10):
        hurt = bytearray(image)
        for place in rng.integers(len(image) // 2, len(image) - 10, 6):
            hurt[place] = (hurt[place] + 1) % 0xFF
        try:
            expected = decode(bytes(hurt), decoder="pillow")
        except DecodeError:
            continue
        found = read(bytes(hurt), decoder=decoder).region(50, 20, 150, 200)
        np.testing.assert_array_equal(found, expected[50:200, 20:220])


@every_decoder
def test_bytes_after_the_end_do_not_matter(decoder):
    image = encoded(picture(0, 40, 60), "JPEG")
    for more in (b"\0" * 8, b"x" * 5000):
        found = read(image + more, decoder=decoder).region(3, 4, 20, 30)
        np.testing.assert_array_equal(found, by_pillow(image)[3:23, 4:34])


@every_decoder
def test_orientation_follows_the_policy(decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(picture(0, 30, 40), "JPEG", exif=exif)
    upright = decode(image, exif="apply")
    for policy, expected in (("ignore", by_pillow(image)), ("apply", upright)):
        photo = read(image, exif=policy, decoder=decoder)
        assert (photo.height, photo.width) == expected.shape[:2]
        np.testing.assert_array_equal(photo.region(5, 6, 20, 21), expected[5:25, 6:27])


def test_the_decoder_that_is_meant_is_known(monkeypatch):
    monkeypatch.setattr(jpeg, "_has_nvimgcodec", lambda: False)
    monkeypatch.setattr(turbojpeg, "is_installed", lambda: False)
    assert jpeg.resolve("auto") == "simplejpeg"
    with pytest.raises(ValueError, match=r"run\.decoder='nvimgcodec' is not installed: pip install"):
        jpeg.resolve("nvimgcodec")
    with pytest.raises(ValueError, match=r"run\.decoder='turbojpeg' is not installed: pip install"):
        jpeg.resolve("turbojpeg")
    monkeypatch.setattr(jpeg, "_has_nvimgcodec", lambda: True)
    assert [jpeg.resolve(name) for name in ("auto", "nvimgcodec", "pillow")] == [
        "nvimgcodec", "nvimgcodec", "pillow",
    ]  # fmt: skip
    monkeypatch.setattr(turbojpeg, "is_installed", lambda: True)
    assert [jpeg.resolve(name) for name in ("auto", "turbojpeg", "simplejpeg")] == [
        "turbojpeg", "turbojpeg", "simplejpeg",
    ]  # fmt: skip


@needs_nvimgcodec
def test_a_decoder_in_a_fork_is_its_own(capfd):
    from multiprocessing import get_context

    image = encoded(picture(0, 64, 64), "JPEG")
    expected = jpeg.region(image, 1, 2, 30, 31, "nvimgcodec")
    with get_context("fork").Pool(2) as pool:
        for found in pool.starmap(jpeg.region, [(image, 1, 2, 30, 31, "nvimgcodec")] * 4):
            np.testing.assert_array_equal(found, expected)
    assert capfd.readouterr().err == ""
