"""The first images of the data, shared by processes, and how many of them by default."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.data.pack import pack
from fd_scale.diagnose.images import Images, choose, default_count, flop_per_image, has_labels, read_file
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.evaluate.features import CROP_PCT
from fd_scale.run.world import Place, World
from tests.data.pictures import image_folder, picture
from tests.diagnose.tiny import ALONE, SMALL, own_subject, timm_subject


def everything(shards: ShardSet) -> torch.Tensor:
    batches = evaluation_batches(shards, size=16, crop_pct=CROP_PCT, batch=40, labels=False)
    return torch.cat([batch.pixels[16] for batch in batches])


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("count", [1, 10, 40])
def test_the_first_images_in_order(shards: Path, processes: int, count: int) -> None:
    data = ShardSet.open(shards)
    worlds = [World(Place(rank, processes, 0, "")) for rank in range(processes)]
    images = Images(data, count, batch=3)
    found = [pixels for world in worlds for pixels in images.batches(16, world)]
    assert torch.equal(torch.cat(found), everything(data)[:count])
    seen = [seen for world in worlds for seen in images.labelled(16, world)]
    assert torch.cat([part.places for part in seen]).tolist() == list(range(count))
    labels = [data.read(shard, index).label for shard, n in enumerate(data.counts) for index in range(n)]
    assert torch.cat([part.labels for part in seen]).tolist() == labels[:count]
    assert data.num_samples == 40  # the set itself is as it was


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 5)
    (folder / "picture 002.JPEG").write_bytes(b"\xff\xd8\xff no picture")
    pack(folder, tmp_path / "shards")
    images = Images(ShardSet.open(tmp_path / "shards"), 5, batch=2)
    assert sum(len(pixels) for pixels in images.batches(16, ALONE)) == 4


def test_a_number_that_was_asked_for_is_kept_or_refused(shards: Path) -> None:
    data = ShardSet.open(shards)
    subject = own_subject("vit_micro_patch8")
    assert choose(data, 7, [subject], batch=2, workers=0, bad=0.0).count == 7
    assert choose(data, None, [subject], batch=2, workers=0, bad=0.0).count == 40
    with pytest.raises(DiagnoseError, match="--images 41 is more than the 40 of the data"):
        choose(data, 41, [subject], batch=2, workers=0, bad=0.0)


def test_costly_networks_are_shown_fewer_images() -> None:
    small = timm_subject("vit_tiny_patch16_224", **SMALL)
    # By hand: 2 x parameters x tokens.
    parameters = sum(parameter.numel() for parameter in small.network.parameters())
    assert flop_per_image(small) == 2 * parameters * 17
    assert default_count(small) == 512
    large = own_subject("vit_tiny_patch16", side=224)
    assert flop_per_image(large) == pytest.approx(2 * 5.4e6 * 197, rel=0.05)
    assert 16 < default_count(large) < 100


def test_labels_are_seen(shards: Path, tmp_path: Path) -> None:
    assert has_labels(ShardSet.open(shards))
    pack(image_folder(tmp_path / "images", 3), tmp_path / "shards")
    assert not has_labels(ShardSet.open(tmp_path / "shards"))


def test_a_users_own_image_is_turned_upright(tmp_path: Path) -> None:
    upright = picture(0, 60, 40)
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    expected = read_file(tmp_path / "upright.png", 24)
    assert expected.shape == (3, 24, 24)
    assert torch.equal(read_file(tmp_path / "turned.png", 24), expected)
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("text.jpg", "missing.jpg"):
        with pytest.raises(DiagnoseError, match=f"--image .*{name} cannot be read"):
            read_file(tmp_path / name, 24)
