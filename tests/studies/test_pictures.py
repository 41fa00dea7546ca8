"""The parts of a study's data: apart from each other, the same from a file and a folder, and refused where
they cannot be had."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fd_scale.errors import ShardError
from studies import pictures
from studies.settings import Sizes

SIZES = Sizes(taught=4, unlabelled=3, labelled=5, held_out=2, test=3)
CLASSES = ("cat", "dog")


def png(number: int) -> bytes:
    """An image whose pixels tell its number."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    number = 0
    for split, count in (("train", 8), ("test", 2)):
        for name in CLASSES:
            place = tmp_path / "set" / split / name
            place.mkdir(parents=True)
            for image in range(count):
                (place / f"{image:04d}.png").write_bytes(png(number))
                number += 1
    return tmp_path / "set"


def numbers(part: pictures.Pictures) -> set[int]:
    return {int(value) for value in part.pixels[:, 0, 0, 0]}


def test_parts_share_no_image_and_hide_what_is_unlabelled(folder: Path, tmp_path: Path) -> None:
    parts = pictures.load(folder, SIZES, tmp_path / "cache")
    names = ("taught", "unlabelled", "labelled", "held_out")
    seen = [numbers(getattr(parts, name)) for name in names]
    assert [len(one) for one in seen] == [4, 3, 5, 2]
    assert len(set.union(*seen)) == 14
    assert max(set.union(*seen)) < 16 <= min(numbers(parts.test))
    assert parts.classes == CLASSES
    for name in ("taught", "labelled", "held_out"):
        part = getattr(parts, name)
        # Numbers 0 to 7 are cats, 8 to 15 dogs.
        assert torch.equal(part.labels, (part.pixels[:, 0, 0, 0] >= 8).long())
    assert parts.unlabelled.labels.tolist() == [-1, -1, -1]
    assert len(parts.distilled) == 7


def test_a_file_gives_what_its_folder_gives(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "set.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            tar.add(path, f"cifar/{path.relative_to(folder)}")
    first, second = (pictures.load(source, SIZES, tmp_path / "cache") for source in (folder, archive))
    again = pictures.load(archive, SIZES, tmp_path / "cache")
    assert first.fingerprint == second.fingerprint == again.fingerprint
    assert torch.equal(first.test.pixels, second.test.pixels)


def test_without_a_source_scenes_are_drawn() -> None:
    parts = pictures.load(None, SIZES, Path("unused"))
    assert parts.test.pixels.shape == (3, 3, 32, 32)
    assert parts.test.pixels.dtype == torch.uint8
    assert parts.fingerprint == pictures.load(None, SIZES, Path("unused")).fingerprint


def test_what_cannot_be_had_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"--data .*absent does not exist: give CIFAR-10"):
        pictures.load(tmp_path / "absent", SIZES, tmp_path)
    with pytest.raises(ShardError, match="train has 16 images, and data asks for 17 of them"):
        pictures.load(folder, SIZES.model_copy(update={"taught": 7}), tmp_path / "cache")
    (tmp_path / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(
        ShardError, match="must hold train/CLASS/IMAGE and test/CLASS/IMAGE of one size; found 0"
    ):
        pictures.load(tmp_path / "empty", SIZES, tmp_path / "cache")
