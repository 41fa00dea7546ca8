"""Measuring: each decoder that is installed, on the images that can be used, and cores by arithmetic."""

from io import StringIO

import pytest
from rich.console import Console

from fd_scale.data import jpeg as decoders
from fd_scale.data.index import ShardSet
from fd_scale.data.writer import write_shards
from fd_scale.errors import ShardError
from fd_scale.run.sections import View
from fd_scale.shards import bench as benching
from fd_scale.shards.bench import Rates, bench, table
from tests.data.pictures import jpeg


def test_every_installed_decoder_is_measured(tmp_path, monkeypatch):
    images = [jpeg(n, 60, 80) for n in range(3)]
    samples = [(f"s{n}", {"jpg": image}) for n, image in enumerate([*images, b"bad"])]
    write_shards(samples, tmp_path)
    shards = ShardSet.open(tmp_path)
    monkeypatch.setattr(decoders, "_has_nvimgcodec", lambda: False)
    monkeypatch.setattr(decoders.turbojpeg, "is_installed", lambda: False)
    found = bench(shards, [(0, n) for n in range(4)], View(), [16, 24])
    assert set(found.images_per_cpu_s) == {"simplejpeg", "pillow"}
    assert all(rate > 0 for rate in (*found.images_per_cpu_s.values(), found.baseline_per_cpu_s))
    assert (found.num_images, found.unusable, found.mean_pixels) == (3, 1, 4800)
    assert found.mean_bytes == pytest.approx(sum(map(len, images)) / 3)


def test_the_baseline_is_the_same_crop(tmp_path):
    """Both ways see the same box: their pixels differ by the roundings of two resamplings."""
    from fd_scale.data import philox

    key = philox.as_array([philox.key("fd.bench", 0)])[0]
    image = jpeg(5, 200, 300)
    view = View(shrink=False)  # as the baseline, which decodes all of the picture
    ours = benching._ours("simplejpeg", view, [64])(image, key)[64].float()
    theirs = benching._baseline(view, 64)(image, key)
    mean, std = (
        (x.new_tensor(v).view(3, 1, 1))
        for x, v in ((theirs, [0.485, 0.456, 0.406]), (theirs, [0.229, 0.224, 0.225]))
    )
    # One level of 255 apart at most: torchvision's uint8 resampling against Pillow's. 1.0 was seen.
    assert ((theirs * std + mean) * 255 - ours).abs().max() < 1.5


def test_nothing_usable_is_said(tmp_path):
    write_shards([("a", {"jpg": b"x"})], tmp_path)
    with pytest.raises(ShardError, match="none of the 1 samples that were drawn can be decoded"):
        bench(ShardSet.open(tmp_path), [(0, 0)], View(), [16])


def test_cores_are_the_rate_wanted_by_the_rate_of_one():
    rates = Rates({"simplejpeg": 1000.0}, 500.0, 9, 1e5, 2e5, 0, 100.0)
    text = StringIO()
    Console(file=text, width=120).print(table(rates, 2500.0))
    assert "2.5" in text.getvalue()
    assert "5.0" in text.getvalue()
    assert "2.00" in text.getvalue()
