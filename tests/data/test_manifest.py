"""Manifests: arrays beside the JSON that never go stale, exclusions, and a start that is fast and small."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_start
from fd_scale.data import manifest
from fd_scale.data.index import ShardSet
from fd_scale.data.indexing import build_index, find_tars
from fd_scale.errors import ShardError
from tests.data.test_offsets import write_tar


def write_set(folder: Path) -> Path:
    """Shards of 4, 3 and 2 samples with keys p0s0, p0s1 and so on."""
    for number, count in enumerate((4, 3, 2)):
        members = [(f"p{number}s{n}.jpg", b"%d%d" % (number, n)) for n in range(count)]
        write_tar(folder / f"part-{number}.tar", members)
    build_index(find_tars(folder), folder, classes=["x", "y"])
    return folder


def as_values(found: manifest.Manifest) -> list[object]:
    return [
        found.urls, found.num_samples.tolist(), found.file_sizes.tolist(), found.offsets, found.classes,
        found.fingerprint, dict(found.excluded),
    ]  # fmt: skip


def exclude(folder: Path, *lines: tuple[str, int | None, str]) -> None:
    entries = [json.dumps({"shard": shard, "index": index, "key": key}) for shard, index, key in lines]
    (folder / "excluded.jsonl").write_text("\n".join(entries) + "\n")


def test_the_arrays_say_what_the_json_says(tmp_path):
    write_set(tmp_path)
    by_arrays = as_values(manifest.read(tmp_path))
    (tmp_path / "index.npz").unlink()
    assert as_values(manifest.read(tmp_path)) == by_arrays
    assert by_arrays[:2] == [("part-0.tar", "part-1.tar", "part-2.tar"), [4, 3, 2]]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_the_arrays_are_passed_over_when_damaged_or_of_another_json(tmp_path, damage):
    write_set(tmp_path)
    text = (tmp_path / "index.json").read_text()
    if damage is None:
        (tmp_path / "index.json").write_text(text.replace('"nsamples": 3', '"nsamples": 5'))
    else:
        (tmp_path / "index.npz").write_bytes(damage)
    assert manifest.read(tmp_path).num_samples.tolist() == [4, 3 if damage is not None else 5, 2]


def test_pickled_arrays_are_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)

    write_set(tmp_path)
    np.savez(tmp_path / "index.npz", digest=np.array([Bomb()], dtype=object))
    assert manifest.read(tmp_path).num_samples.sum() == 9
    assert not (tmp_path / "hacked").exists()


def test_excluded_samples_and_shards_have_no_part(tmp_path):
    write_set(tmp_path)
    whole = ShardSet.open(tmp_path)
    exclude(tmp_path, ("part-0.tar", 2, "p0s2"), ("part-0.tar", 0, "p0s0"), ("part-2.tar", None, ""))
    (tmp_path / "part-2.tar").unlink()  # what is left out need not be there
    shards = ShardSet.open(tmp_path)
    assert shards.counts.tolist() == [2, 3, 0]
    read = [shards.read(shard, n) for shard, count in enumerate(shards.counts) for n in range(count)]
    assert [sample.key for sample in read] == ["p0s1", "p0s3", "p1s0", "p1s1", "p1s2"]
    assert [sample.image for sample in read] == [b"01", b"03", b"10", b"11", b"12"]
    assert [shards.key(0, n) for n in (0, 1)] == ["p0s1", "p0s3"]
    assert shards.fingerprint != whole.fingerprint


def test_an_exclusion_that_does_not_fit_is_refused(tmp_path):
    write_set(tmp_path)
    for line, said in (
        (("other.tar", 0, ""), "KeyError: 'other.tar'"),
        (("part-1.tar", 3, ""), r"part-1\.tar has no sample 3"),
        (("part-1.tar", "x", ""), "TypeError"),
    ):
        exclude(tmp_path, line)
        with pytest.raises(ShardError, match=rf"excluded\.jsonl does not fit index\.json.*{said}.*verify"):
            ShardSet.open(tmp_path)
    exclude(tmp_path, ("part-1.tar", 1, "another"))
    with pytest.raises(ShardError, match=r"excludes sample 1 of part-1\.tar as another, but its key is p1s1"):
        ShardSet.open(tmp_path).read(1, 0)


def test_several_folders_are_numbered_through(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_set(tmp_path / name)
    exclude(tmp_path / "b", ("part-1.tar", 0, "p1s0"))
    shards = ShardSet.open(tmp_path / "a", tmp_path / "b")
    assert shards.counts.tolist() == [4, 3, 2, 4, 2, 2]
    assert shards.shards_per_folder == (3, 3)
    assert [shards.read(n, 0).image for n in range(6)] == [b"00", b"10", b"20", b"00", b"11", b"20"]
    assert shards.names[4] == f"{tmp_path}/b/part-1.tar"
    one = ShardSet.open(tmp_path / "a")
    assert len({shards.fingerprint, one.fingerprint, ShardSet.open(tmp_path / "b").fingerprint}) == 3
    (tmp_path / "b" / "part-0.tar").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards of .*/b are missing.*\n  part-0\.tar: No such file"):
        ShardSet.open(tmp_path / "a", tmp_path / "b")


def test_processes_may_share_the_look_at_the_files(tmp_path):
    write_set(tmp_path)
    (tmp_path / "part-0.tar").unlink()
    os.truncate(tmp_path / "part-2.tar", 3)
    shards = ShardSet.open(tmp_path, check=False)
    parts = [shards.faults(part, 2) for part in (0, 1)]
    assert [[len(lines) for lines in part] for part in parts] == [[2], [0]]
    with pytest.raises(
        ShardError, match=r"2 of 3 shards(.|\n)*part-0\.tar(.|\n)*part-2\.tar: 3 bytes, 10,240"
    ):
        shards.refuse_faults(*parts)


def test_a_remote_folder_says_how_to_get_an_index():
    with pytest.raises(ShardError, match=r"shards index URLS\.\.\. --out FOLDER makes one"):
        ShardSet.open("s3://bucket/set")


def test_a_large_set_opens_fast_in_little_memory(tmp_path):
    figures = data_start.rank(data_start.made_up(tmp_path / "set", 20_000))
    assert figures["samples"] == 200_000_000
    assert not figures["torch"]
    # Seen with 100,000 shards on one busy core: 0.5 s, 0.02 s, 120 MiB; the limits there are 1 s, 0.1 s, 200.
    assert figures["start_s"] < 1
    assert figures["resume_s"] < 0.1
    assert figures["peak_mib"] < 150
