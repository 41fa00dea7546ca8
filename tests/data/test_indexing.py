"""Existing tars become a set of shards by their headers: near or far, in order, all faults at once."""

import os

import pytest

from fd_scale.data.index import Access, ShardSet
from fd_scale.data.indexing import build_index, expanded, find_tars
from fd_scale.errors import ShardError
from tests.data.server import HASTE, serving
from tests.data.test_index import SAMPLES, make_set
from tests.data.test_offsets import write_tar


def test_damaged_tars_are_listed_together_and_leave_no_index(tmp_path):
    make_set(tmp_path)
    (tmp_path / "index.json").unlink()
    for name in ("part-0.tar", "part-2.tar"):
        os.truncate(tmp_path / name, 800)
    with pytest.raises(ShardError, match=r"damaged shards(.|\n)*part-0\.tar(.|\n)*part-2\.tar"):
        build_index(find_tars(tmp_path), tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_indexing_reports_what_it_left_out(tmp_path):
    write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("b.txt", b"x")])
    report = build_index(find_tars(tmp_path), tmp_path)
    assert (report.num_shards, report.num_samples) == (1, 1)
    assert [(i.name, i.reason) for i in report.ignored] == [("b", "no image member among: txt")]


def test_nothing_to_index_is_said(tmp_path):
    with pytest.raises(ShardError, match=r"no \.tar files in"):
        find_tars(tmp_path)
    write_tar(tmp_path / "x.tar", [("b.txt", b"x")])
    with pytest.raises(ShardError, match=r"no sample with an image in 1 tar files.*jpg.*b: no image member"):
        build_index(find_tars(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{008..011}.tar", ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]),
        ("{0..1}/{3..3}", ["0/3", "1/3"]),
        ("{5..4}.tar", []),
        ("{a..c}.tar", ["{a..c}.tar"]),
    ],
)
def test_a_pattern_counts(pattern, names):
    assert expanded(pattern) == names


def test_a_pattern_has_a_bound():
    with pytest.raises(ShardError, match="stands for more than 1,000,000 names"):
        expanded("{0..9999999}.tar")


def test_two_processes_write_the_same_index(tmp_path):
    make_set(tmp_path / "one")
    make_set(tmp_path / "two")
    build_index(find_tars(tmp_path / "two"), tmp_path / "two", classes=["x", "y"], workers=2)
    for name in ("index.json", *(f"offsets/{n:06d}" for n in range(3))):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_remote_tars_are_indexed_where_they_are(tmp_path):
    make_set(tmp_path / "tars")
    with serving(tmp_path / "tars") as server:
        pattern = server.url + "/part-{0..2}.tar?key=1"
        build_index(expanded(pattern), tmp_path / "far", patience=HASTE)
        shards = ShardSet.open(tmp_path / "far", access=Access(patience=HASTE))
        assert shards.names == tuple(expanded(pattern))
        assert shards.read(2, 0).image == SAMPLES[2][0][1]
        urls = [f"{server.url}/{name}" for name in ("absent.tar", "index.json")]
        with pytest.raises(ShardError, match=r"absent\.tar: HTTP 404(.|\n)*/index\.json is not a complete"):
            build_index(urls, tmp_path / "other", patience=HASTE)


def test_the_output_of_a_command_is_indexed_only_where_that_was_allowed(tmp_path):
    make_set(tmp_path / "tars")
    commands = [f"pipe:cat {tmp_path}/tars/part-{n}.tar" for n in range(3)]
    with pytest.raises(ShardError, match="--allow-pipe"):
        build_index(commands, tmp_path / "far")
    report = build_index(commands, tmp_path / "far", allow_pipe=True)
    assert (report.num_shards, report.num_samples) == (3, 3)
    with pytest.raises(ShardError, match=r"ended with status 3"):
        build_index(["pipe:echo x; exit 3"], tmp_path / "other", allow_pipe=True)
