"""Shards as they are written: whole or not at all, within their bytes, and read back before they count."""

import hashlib

import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.writer import write_shards


def test_the_checksum_of_a_shard_is_in_the_manifest(tmp_path):
    lines = write_shards([("a", {"jpg": b"x"})], tmp_path / "out")
    assert lines[0].sha256 == hashlib.sha256((tmp_path / "out" / lines[0].url).read_bytes()).hexdigest()


@pytest.mark.parametrize("max_bytes", [10_240, 20_480, 51_200])
def test_shards_stay_within_their_bytes(tmp_path, max_bytes):
    sizes = [100, 5_000, 513, 4_000, 60_000, 1, 2_000, 9_000, 8_192, 512]
    write_shards(((f"k{n}", {"jpg": b"x" * s}) for n, s in enumerate(sizes)), tmp_path, max_bytes=max_bytes)
    shards = ShardSet.open(tmp_path)
    assert shards.num_samples == len(sizes)
    for name, count in zip(shards.names, shards.counts, strict=True):
        size = (tmp_path / name).stat().st_size
        assert size <= max_bytes or count == 1
    if max_bytes == 51_200:  # no shard but the large sample's could have taken its neighbour too
        assert shards.counts.tolist() == [4, 1, 5]


def test_samples_that_nobody_could_read_back_are_our_fault(tmp_path):
    with pytest.raises(ValueError, match="no reader would find"):
        write_shards([("a", {"jpg": b"x"}), ("b", {"txt": b"x"})], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar*"))
