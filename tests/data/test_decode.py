"""Decoding: bit for bit as Pillow, stated values for odd files, one kind of error for damaged ones."""

import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from fd_scale.data import decode as decoding
from fd_scale.data.decode import MAX_PIXELS, DecodeError, decode
from tests.data.pictures import encoded, jpeg, picture


def by_pillow(image: bytes) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


@pytest.mark.parametrize(
    "options", [{}, {"quality": 30}, {"progressive": True}, {"subsampling": 0}, {"optimize": True}]
)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (64, 47), (1, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_is_bit_identical_to_pillow(mode, size, options):
    image = jpeg(3, *size, mode=mode, **options)
    pixels = decode(image)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, by_pillow(image))


def test_ordinary_jpeg_takes_the_fast_way_and_cmyk_does_not(monkeypatch):
    monkeypatch.setattr(decoding, "_by_pillow", lambda *_: np.zeros((1, 2, 3), dtype=np.uint8))
    assert decode(jpeg(0)).shape == (48, 64, 3)
    assert decode(jpeg(0, mode="CMYK")).shape == (1, 2, 3)


def test_cmyk_jpeg_has_pillows_colours():
    image = jpeg(0, mode="CMYK")
    np.testing.assert_array_equal(decode(image), by_pillow(image))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP"])
def test_lossless_formats_give_the_pixels_back(form):
    image = picture(1, 21, 34).quantize(64).convert("RGB")
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(image, form, **options)), np.asarray(image))


@pytest.mark.skipif(
    "AVIF" not in Image.SAVE and not Image.init() and "AVIF" not in Image.SAVE, reason="Pillow without AVIF"
)
def test_avif_is_read():
    image = picture(1, 32, 48)
    # Lossy: 38.7 dB; a wrong channel order or range would be far below 20.
    error = np.square(decode(encoded(image, "AVIF", quality=90)).astype(float) - np.asarray(image)).mean()
    assert 10 * np.log10(255**2 / error) > 30


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_become_rgb_by_pillows_rules(mode):
    image = picture(2, 20, 30).convert(mode)
    np.testing.assert_array_equal(decode(encoded(image, "PNG")), np.asarray(image.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (values.astype(int) * 510 + 65535) // 131070  # 255 v / 65535, rounded, in whole numbers
    for form in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(values), form))
        np.testing.assert_array_equal(pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bit_colour_keeps_its_upper_byte():
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    np.testing.assert_array_equal(
        decode(png(7, 5, 16, 2, values.tobytes(), 42)), (values >> 8).astype(np.uint8)
    )


def png(width: int, height: int, depth: int, colour: int, raw: bytes, row: int) -> bytes:
    """A PNG written by hand, for what Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    lines = b"".join(b"\0" + raw[begin : begin + row] for begin in range(0, len(raw), row))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_float_grey_is_zero_to_one():
    values = np.linspace(0, 1, 77, dtype=np.float32).reshape(7, 11)
    pixels = decode(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(pixels[:, :, 1], np.rint(values * 255))


@pytest.mark.parametrize("values", [[[0.0, 1.5]], [[-0.1, 1]], [[np.nan, 1]], [[0, 70000]], [[-1, 5]]])
def test_grey_without_a_stated_range_is_refused(values):
    kind = np.int32 if isinstance(values[0][0], int) else np.float32
    with pytest.raises(DecodeError, match="grey image with values from"):
        decode(encoded(Image.fromarray(np.array(values, dtype=kind)), "TIFF"))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparent_pixels_lie_on_white(form):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (9, 13, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    pixels = decode(encoded(Image.fromarray(rgba), form, **options)).astype(float)
    share = rgba[:, :, 3:] / 255.0
    expected = share * rgba[:, :, :3] + (1 - share) * 255
    assert np.abs(pixels - expected).max() <= 1  # Pillow composes in whole numbers; 0.50 seen
    np.testing.assert_array_equal(pixels[0], 255)
    np.testing.assert_array_equal(pixels[1], rgba[1, :, :3])


def test_transparent_palette_and_grey_lie_on_white():
    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.putdata([0, 1, 0, 1])
    pixels = decode(encoded(palette, "PNG", transparency=1))
    np.testing.assert_array_equal(pixels[0], [[10, 20, 30], [255] * 3] * 2)
    grey = Image.fromarray(np.array([[[77, 255], [77, 0]]], dtype=np.uint8), "LA")
    np.testing.assert_array_equal(decode(encoded(grey, "PNG"))[0], [[77] * 3, [255] * 3])
    keyed = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    np.testing.assert_array_equal(
        decode(encoded(keyed, "PNG", transparency=(4, 5, 6)))[0], [[1, 2, 3], [255] * 3]
    )


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    image = encoded(
        frames[0],
        form,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if form == "WEBP" else {}),
    )
    np.testing.assert_array_equal(decode(image), np.asarray(frames[0]))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_ignored_or_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encoded(picture(4, 16, 24), form, exif=exif)
    stored = by_pillow(image)
    np.testing.assert_array_equal(decode(image), stored)
    tagged = Image.fromarray(stored)
    tagged.getexif()[0x0112] = orientation
    upright = decode(image, exif="apply")
    np.testing.assert_array_equal(upright, np.asarray(ImageOps.exif_transpose(tagged)))
    assert upright.flags.c_contiguous


def test_an_unknown_orientation_is_none():
    exif = Image.Exif()
    exif[0x0112] = 77
    image = encoded(picture(4, 16, 24), "JPEG", exif=exif)
    np.testing.assert_array_equal(decode(image, exif="apply"), decode(image))


WHOLE = jpeg(5, 100, 120)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "the file is empty"),
        (b"\xff\xd8\xff", "JPEG of 3 bytes"),
        (b"garbage" * 100, "file beginning b'garbagegarba' of 700 bytes"),
        (b"<html>404</html>", "cannot identify"),
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (WHOLE[: len(WHOLE) * 98 // 100], "truncated"),
        (encoded(picture(5, 50, 60), "PNG")[:900], "PNG of 900 bytes"),
        (encoded(picture(5, 50, 60), "WEBP")[:300], "WebP of 300 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n", "cannot identify"),
    ],
)
@pytest.mark.parametrize("exif", ["ignore", "apply"])
def test_damaged_files_are_decode_errors(image, said, exif):
    with pytest.raises(DecodeError, match=said):
        decode(image, exif=exif)


def test_a_jpeg_with_trailing_bytes_is_read():
    np.testing.assert_array_equal(decode(WHOLE + b"trailing" * 9), decode(WHOLE))


def test_bombs_are_refused_by_their_header():
    side = int(MAX_PIXELS**0.5) + 1
    said = f"{side} x {side} pixels, more than the 89,478,485"
    with pytest.raises(DecodeError, match=said):
        decode(png(side, side, 8, 2, b"", 1))
    raw = bytearray(jpeg(0, 16, 16))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    assert simplejpeg.decode_jpeg_header(bytes(raw))[:2] == (side, side)
    with pytest.raises(DecodeError, match=said):
        decode(bytes(raw))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_flipped_bytes_give_pixels_or_a_decode_error(form):
    whole = encoded(picture(6, 24, 31), form)
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        raw = bytearray(whole)
        for place in rng.integers(0, min(len(raw), 400), 3):
            raw[place] ^= int(rng.integers(1, 256))
        try:
            pixels = decode(bytes(raw), exif="apply")
        except DecodeError as error:
            outcomes[False] += 1 if str(error) else 0
        else:
            outcomes[True] += 1
            assert pixels.dtype == np.uint8
            assert pixels.shape[2] == 3
    assert outcomes[False] > 0
