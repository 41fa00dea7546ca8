"""Copies of remote shards: by the whole URL, whole or absent, bounded, fetched once for all processes."""

import os
import re
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from fd_scale.data import cache as caching
from fd_scale.data.cache import Cache
from fd_scale.data.faults import LostShardError
from fd_scale.data.remote import Remote
from fd_scale.errors import ShardError
from tests.data.server import HASTE, serving

SIZE = 50_000


@pytest.fixture
def server(tmp_path):
    for folder in "abcde":
        (tmp_path / "far" / folder).mkdir(parents=True)
        content = np.random.default_rng(ord(folder)).integers(0, 256, SIZE, dtype=np.uint8).tobytes()
        (tmp_path / "far" / folder / "train-0.tar").write_bytes(content)
    with serving(tmp_path / "far") as running:
        yield running


def cache_of(tmp_path: Path, limit: int | None = None) -> Cache:
    return Cache(tmp_path / "cache", limit, Remote(HASTE))


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.is_file())


def test_shards_of_one_name_have_copies_of_their_own(tmp_path, server):
    cache = cache_of(tmp_path)
    for folder in "ab":
        copy = cache.path(f"{server.url}/{folder}/train-0.tar", SIZE)
        assert copy.read_bytes() == (tmp_path / "far" / folder / "train-0.tar").read_bytes()
        assert cache.path(f"{server.url}/{folder}/train-0.tar", SIZE) == copy
    assert len(server.requests) == 2
    assert len(copies(tmp_path)) == 2


def test_names_tell_urls_apart_and_stay_in_the_folder():
    urls = [
        "https://h/a/train-0.tar", "https://h/b/train-0.tar", "https://h/a/train-0.tar?v=2", "s3://h/a/train-0.tar",
        "pipe:cat ../../etc/passwd", "https://h/../..", "https://h/" + "x" * 400 + ".tar", "https://h/a/",
    ]  # fmt: skip
    names = [caching.name(url) for url in urls]
    assert len(set(names)) == len(urls)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{0,40}-[0-9a-f]{32}\.tar", name) for name in names)
    assert names[0].startswith("train-0-")


def test_a_failed_copy_is_no_copy_and_is_taken_up_again(tmp_path, server):
    server.cut_after, server.cuts = 30_000, 99
    server.ranges = False
    url = f"{server.url}/a/train-0.tar"
    with pytest.raises(LostShardError, match="given up after 4 attempts"):
        cache_of(tmp_path).path(url, SIZE)
    assert [name.rpartition(".tar.")[2] for name in copies(tmp_path)] == [f"{SIZE}.partial"]
    server.cuts, server.ranges = 0, True
    copy = cache_of(tmp_path).path(url, SIZE)
    assert server.requests[-1][1] == f"bytes=30000-{SIZE - 1}"
    assert copy.read_bytes() == (tmp_path / "far" / "a" / "train-0.tar").read_bytes()
    assert copies(tmp_path) == [copy.name]


def test_a_copy_of_another_size_is_fetched_again(tmp_path, server):
    cache = cache_of(tmp_path)
    copy = cache.path(f"{server.url}/a/train-0.tar", SIZE)
    os.truncate(copy, 100)
    assert cache.path(f"{server.url}/a/train-0.tar", SIZE).stat().st_size == SIZE


def test_the_copies_used_longest_ago_go_first(tmp_path, server):
    cache = cache_of(tmp_path, limit=3 * SIZE + 10)
    kept = {}
    for moment, folder in enumerate("abcade"):  # a is used again before d comes
        kept[folder] = cache.path(f"{server.url}/{folder}/train-0.tar", SIZE)
        os.utime(kept[folder], (moment, moment))
    assert copies(tmp_path) == sorted(kept[folder].name for folder in "ade")


def test_a_copy_that_is_open_outlives_its_name(tmp_path, server):
    cache = cache_of(tmp_path, limit=SIZE)
    with cache.path(f"{server.url}/a/train-0.tar", SIZE).open("rb") as file:
        cache.path(f"{server.url}/b/train-0.tar", SIZE)
        assert file.read() == (tmp_path / "far" / "a" / "train-0.tar").read_bytes()
    assert len(copies(tmp_path)) == 1


def test_what_cannot_be_kept_says_what_to_change(tmp_path, server):
    with pytest.raises(ShardError, match=r"has 50,000 bytes, the cache holds 49,999: raise run\.cache_gib"):
        cache_of(tmp_path, limit=SIZE - 1).path(f"{server.url}/a/train-0.tar", SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"the cache .*/file cannot be used"):
        Cache(tmp_path / "file", None, Remote(HASTE)).path(f"{server.url}/a/train-0.tar", SIZE)


def fetch(folder: Path, url: str) -> int:
    return Cache(folder, None, Remote(HASTE)).path(url, SIZE).stat().st_size


def test_processes_fetch_a_shard_once(tmp_path, server):
    server.bytes_per_s = 100_000
    with get_context("fork").Pool(4) as pool:
        sizes = pool.starmap(fetch, [(tmp_path / "cache", f"{server.url}/a/train-0.tar")] * 4)
    assert sizes == [SIZE] * 4
    assert len(server.requests) == 1
