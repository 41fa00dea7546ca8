"""Test images that are training images are found; equal names alone are not held against anyone."""

from pathlib import Path

import numpy as np
from PIL import Image

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.evaluate.overlap import warning


def shards(folder: Path, pictures: dict[str, int]) -> ShardSet:
    """Pictures by path without suffix; equal numbers are equal pictures."""
    for name, seed in pictures.items():
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    pack(folder / "images", folder / "shards", max_count=2)
    return ShardSet.open(folder / "shards")


def test_shared_images_are_told_by_key(tmp_path):
    train = shards(tmp_path / "train", {"a/1": 1, "a/2": 2, "b/3": 3, "b/4": 4})
    test = shards(tmp_path / "test", {"a/2": 2, "b/4": 40, "b/9": 9})
    words = warning(train, test)
    assert words is not None
    assert "2 of 3 test samples have a key of the training set" in words
    assert "50% of the 2 looked at are the same image (a/2)" in words


def test_equal_keys_of_other_images_are_no_overlap(tmp_path):
    train = shards(tmp_path / "train", {"a/1": 1, "b/1": 2})
    assert warning(train, shards(tmp_path / "test", {"a/1": 3, "b/1": 4})) is None
    assert warning(train, shards(tmp_path / "other", {"c/7": 1, "d/8": 4})) is None
