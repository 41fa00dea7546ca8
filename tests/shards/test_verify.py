"""Verification: every kind of damage is found at its depth, named, and can be left out of the data set."""

import json
import os
from pathlib import Path

import pytest

from fd_scale.data.index import Access, ShardSet
from fd_scale.data.plan import Plan
from fd_scale.data.writer import write_shards
from fd_scale.errors import ShardError
from fd_scale.shards.verify import Depth, Verdict, exclude, verify
from tests.data.pictures import jpeg
from tests.data.server import HASTE, serving
from tests.data.test_stream import index_of

FULL = Depth(decode=True, labels=True, hash=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine samples in three shards."""
    samples = [(f"s{n}", {"jpg": jpeg(n), "cls": b"1"}) for n in range(9)]
    write_shards(samples, tmp_path / "set", max_count=3)
    return tmp_path / "set"


def found(verdict: Verdict) -> list[tuple[str, int | None, str | None, str]]:
    return [(one.shard, one.index, one.key, one.stage) for one in verdict.findings]


def overwrite(path: Path, content: bytes, offset: int) -> None:
    """Without a change of size."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_good_set_has_no_findings(folder, workers):
    assert verify(folder, depth=FULL, workers=workers) == Verdict(3, 9, 0, ())


def test_files_that_are_gone_cut_or_no_tars_are_found_without_asking(folder):
    (folder / "shard-000000.tar").unlink()
    os.truncate(folder / "shard-000001.tar", 1000)
    size = (folder / "shard-000002.tar").stat().st_size
    (folder / "shard-000002.tar").write_bytes(b"<html>".ljust(size))
    verdict = verify(folder)
    assert found(verdict) == [
        ("shard-000000.tar", None, None, "shard"),
        ("shard-000001.tar", None, None, "size"),
        ("shard-000002.tar", None, None, "shard"),
    ]
    said = [one.error for one in verdict.findings]
    assert "No such file" in said[0]
    assert said[1].startswith("1,000 bytes, ")
    assert "is not a complete, uncompressed tar" in said[2]


def test_headers_that_differ_from_the_table_are_found(folder):
    first, second = (folder / f"shard-00000{n}.tar" for n in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    assert found(verify(folder)) == [("shard-000000.tar", None, None, "headers")]


def test_a_table_that_is_gone_is_found(folder):
    (folder / "offsets" / "000001").unlink()
    assert found(verify(folder)) == [("shard-000001.tar", None, None, "shard")]


def test_flipped_bits_are_found_by_the_checksum_alone(folder):
    shards = ShardSet.open(folder)
    _, offset, length = shards.members(1, 1)[0]
    overwrite(folder / "shard-000001.tar", b"\0" * 64, offset + length - 100)
    assert found(verify(folder)) == []
    verdict = verify(folder, depth=Depth(hash=True))
    assert found(verdict) == [("shard-000001.tar", None, None, "hash")]
    assert verdict.findings[0].error.startswith("its SHA-256 is ")


@pytest.mark.parametrize("workers", [1, 2])
def test_damaged_images_and_labels_are_found_one_by_one(folder, workers):
    shards = ShardSet.open(folder)
    image, label = shards.members(0, 2)[0], shards.members(2, 0)[1]
    overwrite(folder / "shard-000000.tar", b"<html>", image[1])
    overwrite(folder / "shard-000002.tar", b"x", label[1])
    assert found(verify(folder)) == []
    verdict = verify(folder, depth=Depth(decode=True), workers=workers)
    assert found(verdict) == [("shard-000000.tar", 2, shards.key(0, 2), "decode")]
    verdict = verify(folder, depth=Depth(decode=True, labels=True), workers=workers)
    assert found(verdict)[1] == ("shard-000002.tar", 0, shards.key(2, 0), "label")


def test_what_is_found_is_left_out_of_the_data_set(folder):
    before = ShardSet.open(folder)
    overwrite(folder / "shard-000000.tar", b"<html>", before.members(0, 1)[0][1])
    (folder / "shard-000002.tar").unlink()
    assert exclude(folder, verify(folder, depth=FULL)) == 3
    after = ShardSet.open(folder)
    assert after.counts.tolist() == [0, 3, 0]  # the first shard's checksum is wrong as well
    assert after.fingerprint != before.fingerprint
    assert exclude(folder, verify(folder, depth=Depth(decode=True))) == 2
    after = ShardSet.open(folder)
    assert after.counts.tolist() == [2, 3, 0]
    keys = {after.read(shard, n).key for shard, count in enumerate(after.counts) for n in range(count)}
    assert keys == {f"s{n}" for n in (0, 2, 3, 4, 5)}
    plan = Plan(after.counts, seed=0, global_batch=5, fingerprint=after.fingerprint)
    assert {
        after.key(s, i) for s, i in zip(plan.samples(0).shard, plan.samples(0).index, strict=True)
    } == keys


def test_looking_at_one_shard_keeps_what_is_known_of_others(folder):
    for name in ("shard-000000.tar", "shard-000002.tar"):
        os.truncate(folder / name, 0)
    exclude(folder, verify(folder))
    write_back = folder / "shard-000000.tar"
    write_back.write_bytes((folder / "shard-000001.tar").read_bytes())  # whole again, but of other samples
    verdict = verify(folder, only=["shard-000000.tar"])
    assert (verdict.num_shards, verdict.num_samples) == (1, 3)
    assert exclude(folder, verdict, ["shard-000000.tar"]) == 2
    stages = [json.loads(line)["stage"] for line in (folder / "excluded.jsonl").read_text().splitlines()]
    assert stages == ["size", "headers"]


def test_a_set_that_was_repaired_is_whole_again(folder):
    content = (folder / "shard-000001.tar").read_bytes()
    os.truncate(folder / "shard-000001.tar", 5)
    assert exclude(folder, verify(folder)) == 1
    (folder / "shard-000001.tar").write_bytes(content)
    assert exclude(folder, verify(folder)) == 0
    assert not (folder / "excluded.jsonl").exists()


def test_names_that_are_not_in_the_index_are_refused(folder):
    with pytest.raises(ShardError, match=r"has no such shards:\n  nothing\.tar"):
        verify(folder, only=["nothing.tar", "shard-000000.tar"])


def test_tars_of_others_have_no_checksum(folder):
    lines = json.loads((folder / "index.json").read_text())
    del lines["shardlist"][1]["sha256"]
    (folder / "index.json").write_text(json.dumps(lines))
    assert verify(folder, depth=Depth(hash=True)).without_hash == 1
    assert verify(folder).without_hash == 0


@pytest.mark.parametrize("cache", [False, True])
def test_remote_shards_are_verified_where_they_are(folder, tmp_path, cache):
    shards = ShardSet.open(folder)
    overwrite(folder / "shard-000001.tar", b"<html>", shards.members(1, 2)[0][1])
    with serving(folder) as server:
        far = index_of(shards, tmp_path / "far", server.url + "/{}")
        access = Access(cache=tmp_path / "cache" if cache else None, patience=HASTE)
        assert found(verify(far, access=access)) == []
        verdict = verify(far, depth=Depth(decode=True), access=access)
        assert found(verdict) == [(f"{server.url}/shard-000001.tar", 2, shards.key(1, 2), "decode")]
        (folder / "shard-000002.tar").unlink()
        fresh = Access(patience=HASTE)
        assert found(verify(far, access=fresh)) == [(f"{server.url}/shard-000002.tar", None, None, "size")]
