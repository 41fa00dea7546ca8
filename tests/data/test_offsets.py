"""Tables of offsets: every member where tarfile finds it, and no damaged tar ever indexed."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from fd_scale.data import offsets
from fd_scale.errors import ShardError


def write_tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path: Path, table: offsets.Table) -> dict[str, dict[str, bytes]]:
    raw = path.read_bytes()
    return {
        table.key(i): {name: raw[begin : begin + length] for name, begin, length in table.members(i)}
        for i in range(table.num_samples)
    }


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, form):
    long = "d" * 60 + "/" + ("n" * 90 if form == tarfile.USTAR_FORMAT else "n" * 190)
    members = [
        ("a/one.jpg", b"1" * 511),
        ("a/one.cls", b"7"),
        ("a/two.cls", b""),
        ("a/two.mask.png", b"m" * 512),
        ("a/two.PNG", b"2" * 513),
        (f"{long}.webp", b"3"),
        ("\u00fcn\u00efcode.jpeg", b"4" * 1025),
    ]
    path = write_tar(tmp_path / "x.tar", members, form)
    table, ignored = offsets.scan(path)
    assert ignored == []
    assert table.file_size == path.stat().st_size
    assert contents(path, table) == {
        "a/one": {"jpg": b"1" * 511, "cls": b"7"},
        "a/two": {"png": b"2" * 513, "cls": b"", "mask.png": b"m" * 512},
        long: {"webp": b"3"},
        "\u00fcn\u00efcode": {"jpeg": b"4" * 1025},
    }
    assert [table.members(i)[0][0] for i in range(4)] == ["jpg", "png", "webp", "jpeg"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_saved_table_comes_back(tmp_path, count):
    members = [(f"{i}.{kind}", bytes([i]) * i) for i in range(count) for kind in ("json", "jpg")]
    table, _ = offsets.scan(write_tar(tmp_path / "x.tar", members))
    offsets.save(table, tmp_path / "table")
    again = offsets.load(tmp_path / "table")
    assert contents(tmp_path / "x.tar", again) == contents(tmp_path / "x.tar", table)
    assert (again.file_size, again.num_samples) == (table.file_size, count)
    assert sorted(os.listdir(tmp_path)) == ["table", "x.tar"]


def test_what_is_left_out_is_listed(tmp_path):
    members = [
        ("first.jpg", b"1"),
        ("README", b"x"),
        (".hidden", b"x"),
        ("trailing.", b"x"),
        ("two.jpg", b"2"),
        ("two.jpg", b"again"),
        ("two.cls", b"3"),
        ("none.json", b"{}"),
        ("both.png", b"x"),
        ("both.jpg", b"x"),
        ("first.cls", b"late"),
        ("first.png", b"late"),
    ]
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as tar:
        tar.addfile(_special("folder", tarfile.DIRTYPE))
        tar.addfile(_special("link.jpg", tarfile.SYMTYPE))
        tar.addfile(_special("hard.jpg", tarfile.LNKTYPE))
    table, ignored = offsets.scan(path)
    assert contents(path, table) == {"first": {"jpg": b"1"}, "two": {"jpg": b"2", "cls": b"3"}}
    assert [(i.shard, i.name, i.reason) for i in ignored] == [
        ("x.tar", "README", "its name is not of the form key.extension"),
        ("x.tar", ".hidden", "its name is not of the form key.extension"),
        ("x.tar", "trailing.", "its name is not of the form key.extension"),
        ("x.tar", "two.jpg", "its name stood before"),
        ("x.tar", "first.cls", "its key stood earlier in the shard, apart from here"),
        ("x.tar", "first.png", "its key stood earlier in the shard, apart from here"),
        ("x.tar", "link.jpg", "not a plain file"),
        ("x.tar", "hard.jpg", "not a plain file"),
        ("x.tar", "none", "no image member among: json"),
        ("x.tar", "both", "several image members (png, jpg) among: png, jpg"),
    ]


def _special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "first.jpg"
    return info


GOOD = [(f"{i}.{kind}", bytes([65 + i]) * 700) for i in range(3) for kind in ("jpg", "cls")]
# A member is a header of 512 bytes and 1024 of data; the six end at byte 9216, where the end mark begins.


@pytest.mark.parametrize(
    "length",
    [0, 1, 300, 512, 700, 1211, 1212, 1400, 1536, 1700, 7680, 7681, 8191, 8192, 9215, 9216, 9500, 9727],
)
def test_a_cut_tar_is_refused_wherever_it_is_cut(tmp_path, length):
    path = write_tar(tmp_path / "cut.tar", GOOD)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ShardError, match=r"cut\.tar is not a complete, uncompressed tar file: \w+"):
        offsets.scan(path)


def test_one_zero_block_is_an_end(tmp_path):
    path = write_tar(tmp_path / "x.tar", GOOD)
    path.write_bytes(path.read_bytes()[: 9216 + 512])
    assert offsets.scan(path)[0].num_samples == 3


@pytest.mark.parametrize("header", [0, 1536, 3072, 7680])
def test_a_damaged_header_is_refused(tmp_path, header):
    path = write_tar(tmp_path / "x.tar", GOOD)
    raw = bytearray(path.read_bytes())
    raw[header + 3] ^= 0xFF  # in the name, so that the check sum is wrong
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=r"x\.tar is not a complete, uncompressed tar file"):
        offsets.scan(path)


def test_what_is_no_tar_is_refused(tmp_path):
    tar = write_tar(tmp_path / "good.tar", GOOD).read_bytes()
    for name, content in (
        ("html.tar", b"<html><body>404 Not Found</body></html>" * 40),
        ("gz.tar", gzip.compress(tar)),
        ("two.tar", tar + tar),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ShardError, match=f"{name} is not a complete, uncompressed tar"):
            offsets.scan(tmp_path / name)
    with pytest.raises(ShardError, match=r"absent\.tar is not .* No such file"):
        offsets.scan(tmp_path / "absent.tar")


def test_a_damaged_table_is_refused(tmp_path):
    table, _ = offsets.scan(write_tar(tmp_path / "x.tar", GOOD))
    path = tmp_path / "table"
    offsets.save(table, path)
    whole = path.read_bytes()
    for content, said in (
        (b"", "cannot be used"),
        (whole[:20], "cut short"),
        (whole[:-1], "its size is not"),
        (whole + b"x", "its size is not"),
        (b"another1" + whole[8:], "no table of offsets"),
    ):
        path.write_bytes(content)
        with pytest.raises(ShardError, match=f"{said}.*fd-scale shards index|{said}"):
            offsets.load(path)
    path.unlink()
    with pytest.raises(ShardError, match="No such file"):
        offsets.load(path)


def test_a_foreign_set_of_extensions_has_a_bound(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), *((f"a.e{i}", b"") for i in range(256))])
    with pytest.raises(ShardError, match="257 different extensions"):
        offsets.scan(path)
