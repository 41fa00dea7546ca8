"""What a set holds: figures against NumPy's over all pixels, pictures where they belong."""

from io import StringIO

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fd_scale.data.decode import decode
from fd_scale.data.index import ShardSet
from fd_scale.data.writer import write_shards
from fd_scale.shards.show import THUMBNAIL, chosen, contact_sheet, look, table
from tests.data.pictures import encoded, jpeg, picture

IMAGES = {
    "grey": jpeg(0, 40, 50, "L"),
    "colour": jpeg(1, 30, 70),
    "clear": encoded(picture(2, 20, 20, "RGBA"), "PNG"),
    "bad": b"<html>",
}
EXTENSIONS = {"clear": "png"}


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    labels = {"grey": b"0", "colour": b"1", "clear": b"1", "bad": b"x"}
    samples = [
        (key, {EXTENSIONS.get(key, "jpg"): image, "cls": labels[key]}) for key, image in IMAGES.items()
    ]
    write_shards(samples, tmp_path, max_count=3, classes=["cat", "dog"])
    return ShardSet.open(tmp_path)


def everything(shards: ShardSet) -> list[tuple[int, int]]:
    return [(shard, index) for shard, count in enumerate(shards.counts) for index in range(count)]


def test_figures_are_those_of_all_pixels(shards):
    found = look(shards, everything(shards))
    good = [decode(image) for key, image in IMAGES.items() if key != "bad"]
    pixels = np.concatenate([image.reshape(-1, 3) for image in good]).astype(np.float64) / 255
    # Sums of whole numbers, one division: 1e-16 seen.
    np.testing.assert_allclose(found.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std(0), rtol=1e-9)
    assert found.formats == {"JPEG": 2, "PNG": 1}
    assert found.modes == {"L": 1, "RGB": 1, "RGBA": 1}
    assert sorted(map(tuple, found.sides.tolist())) == [(20, 20), (30, 70), (40, 50)]
    assert found.bytes_per_image.sum() == sum(len(image) for key, image in IMAGES.items() if key != "bad")
    assert found.labels == {1: 2, 0: 1}
    assert list(found.unusable) == ["bad"]
    assert found.oriented == 0


def test_orientations_are_counted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    write_shards(
        [("a", {"jpg": encoded(picture(0, 9, 8), "JPEG", exif=exif)}), ("b", {"jpg": jpeg(0)})], tmp_path
    )
    shards = ShardSet.open(tmp_path)
    assert look(shards, everything(shards)).oriented == 1


def test_the_table_says_it(shards):
    text = StringIO()
    Console(file=text, width=200).print(table(shards, look(shards, everything(shards))))
    for part in ("4 samples", "JPEG 2, PNG 1", "dog 2, cat 1", shards.fingerprint, "bad: file beginning"):
        assert part in text.getvalue()


@pytest.mark.parametrize(("total", "count"), [(4, 9), (4, 2), (1000, 10), (1000, 300)])
def test_the_chosen_are_different_and_drawn_from_all(total, count):
    counts = np.array([total // 2, 0, total - total // 2])
    stand_in = type("Shards", (), {"counts": counts, "num_samples": total})()
    places = chosen(stand_in, count, 0)
    assert len(set(places)) == len(places) == min(count, total)
    assert places == sorted(places)
    assert all(0 <= index < counts[shard] for shard, index in places)
    assert {shard for shard, _ in places} == {0, 2} or total == 4
    assert chosen(stand_in, count, 0) == places


def test_a_contact_sheet_shows_the_middle_of_each(tmp_path):
    plain = {name: encoded(Image.new("RGB", (60, 40), name), "PNG") for name in ("red", "lime", "blue")}
    samples = [(name, {"png": image}) for name, image in plain.items()] + [("bad", {"jpg": b"x"})]
    write_shards(samples, tmp_path / "set")
    shards = ShardSet.open(tmp_path / "set")
    contact_sheet(shards, everything(shards), tmp_path / "new" / "sheet.png")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        columns = sheet.width // THUMBNAIL
        assert columns * (sheet.height // THUMBNAIL) >= 4
        colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        for number, expected in enumerate([*colours, (255, 0, 0)]):  # the last is the cross of a bad one
            left, top = number % columns * THUMBNAIL, number // columns * (THUMBNAIL + 14)
            assert sheet.getpixel((left + THUMBNAIL // 2, top + THUMBNAIL // 2)) == expected
        assert (
            sheet.getpixel((THUMBNAIL * (3 % columns) + 30, 3 // columns * (THUMBNAIL + 14) + 10))
            == (255,) * 3
        )
