"""What can be packed: folders, lists, sets of shards; labels by numbers, names and class maps."""

import json
import pickle
from pathlib import Path

import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.pack import pack
from fd_scale.data.sources import Source, file_list, image_folder, open_source, shard_set, unique_keys
from fd_scale.data.writer import write_shards
from fd_scale.errors import ShardError
from tests.data import pictures
from tests.data.pictures import jpeg


def members(source: Source) -> dict[str, dict[str, bytes]]:
    """Of every entry, read by a copy of the source, as another process would."""
    read = pickle.loads(pickle.dumps(source.read))
    return {entry.key: dict(read(entry)) for entry in source.entries}


def write_list(folder: Path, name: str, rows: list[dict[str, object]], delimiter: str = ",") -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        columns = list(rows[0])
        lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
        path.write_text("\n".join(delimiter.join(line) for line in lines) + "\n")
    return path


@pytest.fixture
def images(tmp_path) -> Path:
    """Three files, one below a folder."""
    (tmp_path / "deep").mkdir()
    for name in ("a.jpg", "b.png", "deep/a.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize(("name", "delimiter"), [("l.csv", ","), ("l.tsv", "\t"), ("l.jsonl", "")])
def test_a_list_names_files_and_numbers(images, name, delimiter):
    paths = ("a.jpg", "deep/a.jpg", "b.png")
    rows = [{"path": path, "label": 2 - n, "caption": "x"} for n, path in enumerate(paths)]
    found = open_source(str(write_list(images, name, rows, delimiter)))
    assert members(found) == {
        "a": {"jpg": b"a.jpg", "cls": b"2"},
        "deep/a": {"jpg": b"deep/a.jpg", "cls": b"1"},
        "b": {"png": b"b.png", "cls": b"0"},
    }
    assert found.classes is None
    assert found.skipped == {"column caption": 3}


def test_a_list_may_have_names_of_classes_and_a_root(images, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    rows = [{"path": "a.jpg", "label": "dog"}, {"path": "b.png", "label": "cat"}]
    path = write_list(elsewhere, "l.csv", rows)
    found = file_list(path, root=images)
    assert found.classes == ("cat", "dog")
    assert [entry.label for entry in found.entries] == [1, 0]
    mapped = file_list(path, root=images, classes=["dog", "emu", "cat"])
    assert mapped.classes == ("dog", "emu", "cat")
    assert [entry.label for entry in mapped.entries] == [0, 2]
    with pytest.raises(ShardError, match=r"1 classes that the class map of 1 does not name: cat"):
        file_list(path, root=images, classes=["dog"])


def test_numbers_in_a_list_fit_the_class_map(images):
    path = write_list(images, "l.csv", [{"path": "a.jpg", "label": 0}, {"path": "b.png", "label": 2}])
    assert file_list(path, classes=["x", "y", "z"]).classes == ("x", "y", "z")
    with pytest.raises(ShardError, match="labels from 0 to 2, the class map names 2: 0 to 1"):
        file_list(path, classes=["x", "y"])


def test_a_list_without_labels_has_none(images):
    found = file_list(write_list(images, "l.jsonl", [{"path": "a.jpg"}, {"path": "b.png"}]))
    assert members(found) == {"a": {"jpg": b"a.jpg"}, "b": {"png": b"b.png"}}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.csv", "path,label\na.jpg,1\nb.png,\n", "1 of 2 rows have no label; give all of them one"),
        ("l.csv", "file\na.jpg\n", r"row 1 names no file: a list has a column 'path'.*found \['file'\]"),
        ("l.csv", "path\na.txt\n", r"row 1: a\.txt has no extension of an image; these are: jpg"),
        ("l.csv", "path\n", "lists no files"),
        ("l.jsonl", "[1]\n", "row 1 names no file"),
        ("l.jsonl", "{\n", r"l\.jsonl cannot be read"),
        ("l.csv", "path\ngone.jpg\nlost.jpg\n", r"2 files cannot be read:\n  .*gone\.jpg(.|\n)*lost\.jpg"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(images, name, text, said):
    (images / name).write_text(text)
    with pytest.raises(ShardError, match=said):
        file_list(images / name)


def test_a_list_that_is_not_there(tmp_path):
    with pytest.raises(ShardError, match=r"the list .*no\.csv cannot be read: .*No such file"):
        file_list(tmp_path / "no.csv")


def test_class_folders_may_be_numbered_by_a_map(tmp_path):
    source = pictures.image_folder(tmp_path, 4, classes=2)
    found = image_folder(source, classes=["class_1", "more", "class_0"])
    assert {(entry.key.split("/")[0], entry.label) for entry in found.entries} == {
        ("class_0", 2),
        ("class_1", 0),
    }


def test_a_set_of_shards_is_packed_again_with_all_members(tmp_path):
    samples = [(f"s{n}", {"jpg": jpeg(n), "json": b'{"caption": "x"}', "txt": b"y"}) for n in range(5)]
    write_shards(samples, tmp_path / "first", max_count=2, classes=["u"])
    (tmp_path / "first" / "excluded.jsonl").write_text(
        json.dumps({"shard": "shard-000001.tar", "index": 1, "key": "s3"}) + "\n"
    )
    found = open_source(str(tmp_path / "first"))
    assert found.classes == ("u",)
    assert members(found) == {key: dict(parts) for key, parts in samples if key != "s3"}
    pack(found, tmp_path / "second")
    again = shard_set(tmp_path / "second")
    assert members(again) == members(found)


def test_keys_of_several_shards_may_be_the_same(tmp_path):
    from fd_scale.data.indexing import build_index, find_tars
    from tests.data.test_offsets import write_tar

    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", [("same.jpg", b"%d" % number)])
    build_index(find_tars(tmp_path), tmp_path)
    found = shard_set(tmp_path)
    assert sorted(parts["jpg"] for parts in members(found).values()) == [b"0", b"1", b"2"]


def test_keys_differ_whatever_the_names():
    names = ["a b", "a_b", "a_b", "a_b", "n" * 200, "n" * 200, "../x", "\u043a"]
    keys = unique_keys(names)
    assert len(set(keys)) == len(names)
    assert all(len(key) <= 80 and key.isascii() and "." not in key for key in keys)
    assert unique_keys(names) == keys


def test_a_folder_of_tars_says_what_to_do(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="index tar files where they lie with fd-scale shards index"):
        open_source(str(tmp_path))


def test_a_file_that_changed_is_another_job(tmp_path):
    """A pack that goes on must not mix two versions of a file."""
    source = pictures.image_folder(tmp_path / "in", 3)
    before = image_folder(source).entries
    (source / "picture 001.JPEG").write_bytes(b"new")
    after = image_folder(source).entries
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False, True]


def test_hugging_face_needs_its_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ShardError, match=r"hf:beans needs the package datasets: pip install 'fd-scale\[data"):
        open_source("hf:beans")


def test_images_are_read_back_from_shards_as_packed(tmp_path):
    source = pictures.image_folder(tmp_path / "in", 3, classes=2)
    pack(image_folder(source), tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out")
    assert {tuple(shards.read_members(0, n)) for n in range(3)} == {("jpeg", "cls")}
