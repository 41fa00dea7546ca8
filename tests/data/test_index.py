"""Sets of shards: what is missing or changed is found at opening, at once; nothing in a shard is run."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from fd_scale.data import index, manifest
from fd_scale.data.faults import LabelError, LostShardError
from fd_scale.data.index import ShardSet
from fd_scale.data.indexing import build_index, find_tars
from fd_scale.errors import ShardError
from tests.data.test_offsets import write_tar

SAMPLES = [[("a", b"A" * 100, b"3"), ("b", b"B" * 50, b"-1\n")], [], [("c", b"C" * 999, b"12")]]


def make_set(folder: Path, *, tars: Path | None = None) -> Path:
    """Three shards of 2, 0 and 1 samples."""
    tars = tars or folder
    tars.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(SAMPLES):
        members = [m for key, image, label in samples for m in ((f"{key}.jpg", image), (f"{key}.cls", label))]
        write_tar(tars / f"part-{number}.tar", members)
    build_index(find_tars(tars), folder, classes=["x", "y"])
    return folder


def test_a_set_gives_back_what_was_put_in(tmp_path):
    shards = ShardSet.open(make_set(tmp_path))
    assert shards.names == ("part-0.tar", "part-1.tar", "part-2.tar")
    assert shards.counts.tolist() == [2, 0, 1]
    assert shards.counts.dtype == np.int64
    assert shards.num_samples == 3
    assert shards.classes == ("x", "y")
    for shard, samples in enumerate(SAMPLES):
        for place, (key, image, label) in enumerate(samples):
            sample = shards.read(shard, place)
            assert (sample.key, sample.shard) == (key, f"part-{shard}.tar")
            assert (sample.image, sample.label) == (image, int(label))
            assert shards.read(shard, place, label=False).label is None
            assert shards.key(shard, place) == key


def test_the_manifest_is_what_wids_style_readers_expect(tmp_path):
    content = json.loads((make_set(tmp_path) / "index.json").read_text())
    assert content["wids_version"] == 1
    for line, count in zip(content["shardlist"], (2, 0, 1), strict=True):
        assert line["nsamples"] == count
        assert line["filesize"] == (tmp_path / line["url"]).stat().st_size


def test_tars_may_lie_elsewhere(tmp_path):
    shards = ShardSet.open(make_set(tmp_path / "index", tars=tmp_path / "tars"))
    assert shards.read(2, 0).image == b"C" * 999
    assert shards.fingerprint == ShardSet.open(make_set(tmp_path / "beside")).fingerprint


def test_the_fingerprint_is_of_names_counts_sizes_and_order(tmp_path):
    original = ShardSet.open(make_set(tmp_path)).fingerprint
    assert len(original) == 64
    lines = json.loads((tmp_path / "index.json").read_text())["shardlist"]
    seen = {original}
    for change in (
        lambda: lines.reverse(),
        lambda: lines[0].update(url="other.tar"),
        lambda: lines[0].update(nsamples=9),
        lambda: lines[0].update(filesize=9),
    ):
        change()
        shards = [manifest.Shard(line["url"], line["nsamples"], line["filesize"], "") for line in lines]
        seen.add(manifest.of_shards(tmp_path, shards, None).fingerprint)
    assert len(seen) == 5


@pytest.mark.parametrize("many", [0, 2000])
def test_all_missing_and_changed_shards_are_listed_at_once(tmp_path, monkeypatch, many):
    monkeypatch.setattr(manifest, "_MANY", many)
    make_set(tmp_path)
    (tmp_path / "part-0.tar").unlink()
    with (tmp_path / "part-1.tar").open("ab") as file:
        file.write(b"more")
    (tmp_path / "offsets" / "000002").unlink()
    with pytest.raises(ShardError) as caught:
        ShardSet.open(tmp_path)
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith("3 of 3 shards of")
    assert lines == [
        "part-0.tar: No such file or directory",
        "part-1.tar: 10,244 bytes, 10,240 when it was indexed",
        "part-2.tar: its table offsets/000002 is missing",
    ]


def test_a_long_list_of_faults_is_cut_and_counted(tmp_path):
    lines = [manifest.Shard(f"{n}.tar", 1, 1, "x") for n in range(manifest.MAX_LISTED + 7)]
    manifest.write(tmp_path, lines, None)
    with pytest.raises(ShardError, match=r"57 of 57 shards(.|\n)*49\.tar.*\n.*and 7 more$"):
        ShardSet.open(tmp_path)


def test_folders_that_are_no_set_say_what_to_do(tmp_path):
    with pytest.raises(ShardError, match=r"absent' is not a folder of shards.*shards pack"):
        ShardSet.open(tmp_path / "absent")
    with pytest.raises(ShardError, match=r"no index\.json.*make it with fd-scale shards pack"):
        ShardSet.open(tmp_path)
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x")])
    with pytest.raises(ShardError, match="index its 1 tar files with fd-scale shards index"):
        ShardSet.open(tmp_path)
    path = tmp_path / "index.json"
    for content in (
        "{",
        "[]",
        "{}",
        '{"fd_scale_version": 1, "shardlist": [{"url": 3}]}',
        '{"wids_version": 1}',
    ):
        path.write_text(content)
        with pytest.raises(ShardError, match=r"index\.json is not an index of this program"):
            ShardSet.open(tmp_path)
    path.write_text('{"fd_scale_version": 9, "shardlist": []}')
    with pytest.raises(ShardError, match="has version 9, this program reads 1"):
        ShardSet.open(tmp_path)
    manifest.write(tmp_path, [], None)
    with pytest.raises(ShardError, match="hold no samples"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("url", ["pipe:touch {}/hacked", "file:///etc/passwd", "zip://x::file:///y.zip"])
def test_urls_that_reach_into_this_machine_are_refused_and_nothing_is_run(tmp_path, url):
    manifest.write(tmp_path, [manifest.Shard(url.format(tmp_path), 1, 1, "x")], None)
    with pytest.raises(ShardError, match=r"run\.allow_pipe=true|give a path, or a URL of"):
        ShardSet.open(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["index.json", "index.npz"]


def test_a_table_of_another_shard_is_refused(tmp_path):
    make_set(tmp_path)
    os.replace(tmp_path / "offsets" / "000002", tmp_path / "offsets" / "000000")
    (tmp_path / "offsets" / "000002").write_bytes(b"")
    shards = ShardSet.open(tmp_path)
    with pytest.raises(ShardError, match=r"000000 describes 1 samples .*index\.json 2 .*part-0\.tar"):
        shards.read(0, 0)


def test_a_shard_that_changes_while_in_use_is_a_fault_of_its_samples(tmp_path):
    shards = ShardSet.open(make_set(tmp_path))
    os.truncate(tmp_path / "part-2.tar", 600)
    with pytest.raises(LostShardError, match=r"part-2\.tar ends inside the sample"):
        shards.read(2, 0)
    (tmp_path / "part-0.tar").unlink()
    with pytest.raises(LostShardError, match=r"part-0\.tar: No such file"):
        shards.read(0, 0)
    assert shards.key(0, 1) == "b"


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ([("a.cls", b" 7\n")], 7),
        ([("a.json", b'{"label": 5, "more": "x"}')], 5),
        ([("a.json", b'{"label": 5}'), ("a.cls", b"6")], 6),
        ([("a.cls", b"6"), ("a.json", b'{"label": 5}')], 6),
        ([("a.json", b'{"caption": "a cat"}')], None),
        ([("a.json", b"[1, 2]")], None),
        ([("a.txt", b"5")], None),
    ],
)
def test_labels(tmp_path, members, label):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), *members])
    build_index(find_tars(tmp_path), tmp_path)
    assert ShardSet.open(tmp_path).read(0, 0).label == label


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (("a.cls", b"cat"), r"\.cls holds b'cat', not a whole number"),
        (("a.cls", b""), r"\.cls holds b''"),
        (("a.json", b"{"), r"\.json holds b'{'"),
        (("a.json", b'{"label": "cat"}'), "the label in .json is 'cat'"),
        (("a.json", b'{"label": true}'), "the label in .json is True"),
        (("a.cls", b"9" * 30), r"the label in \.cls is 9+, not a whole number of 64 bits"),
        (("a.json", b'{"label": 1.5}'), "the label in .json is 1.5"),
    ],
)
def test_labels_that_are_no_whole_numbers(tmp_path, member, said):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), member])
    build_index(find_tars(tmp_path), tmp_path)
    shards = ShardSet.open(tmp_path)
    with pytest.raises(LabelError, match=said):
        shards.read(0, 0)
    assert shards.read(0, 0, label=False).image == b"x"


def test_a_hostile_shard_runs_and_writes_nothing(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/hacked",)

    inside = tmp_path / "set"
    inside.mkdir()
    bomb = pickle.dumps(Bomb())
    names = ("pkl", "pyd", "pickle", "pth", "npy", "json", "cls")
    members = [("../../escape.jpg", b"x"), *((f"../../escape.{name}", bomb) for name in names)]
    write_tar(inside / "x.tar", [*members, ("/absolute.jpg", b"y")])
    build_index(find_tars(inside), inside)
    shards = ShardSet.open(inside)
    assert shards.read(0, 0, label=False).image == b"x"
    with pytest.raises(LabelError):
        shards.read(0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_set_travels_to_another_process_and_opens_files_again(tmp_path):
    shards = ShardSet.open(make_set(tmp_path))
    shards.read(0, 0)
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.read(2, 0) == shards.read(2, 0)
    assert (copy.fingerprint, copy.classes) == (shards.fingerprint, shards.classes)
    before = len(os.listdir("/proc/self/fd"))
    shards.close()
    copy.close()
    assert len(os.listdir("/proc/self/fd")) < before
    assert shards.read(0, 0).image == b"A" * 100


def test_open_files_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(index.resource, "getrlimit", lambda _: (40, 40))  # room for 10 shards
    for number in range(30):
        write_tar(tmp_path / f"{number:02d}.tar", [("a.jpg", b"%d" % number)])
    build_index(find_tars(tmp_path), tmp_path)
    shards = ShardSet.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(30), *range(30)]:
        assert shards.read(number, 0).image == b"%d" % number
    assert len(os.listdir("/proc/self/fd")) - before <= 20
