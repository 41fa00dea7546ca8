"""The ``shards`` verbs end to end, in this process: what they print, write and answer."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fd_scale.errors import ShardError
from fd_scale.shards_cli import _class_map, app
from tests.data.pictures import image_folder


def run(*words: object) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def packed(tmp_path) -> Path:
    image_folder(tmp_path / "in", 11, classes=2)
    done = run("pack", tmp_path / "in", tmp_path / "set", "--max-count", 4, "--workers", 1)
    assert done.exit_code == 0
    assert "11 images in 3 shards" in done.stdout
    assert "2 classes" in done.stdout
    return tmp_path / "set"


def test_a_list_is_packed_with_a_class_map(tmp_path):
    image_folder(tmp_path / "in", 3)
    rows = "".join(f"picture {n:03d}.JPEG,{name},9\n" for n, name in enumerate(("b", "a", "b")))
    (tmp_path / "list.csv").write_text("path,label,size\n" + rows)
    (tmp_path / "map.json").write_text('{"b": 0, "a": 1}')
    done = run(
        "pack", tmp_path / "list.csv", tmp_path / "out", "--root", tmp_path / "in", "--classes",
        tmp_path / "map.json", "--workers", 1,
    )  # fmt: skip
    assert "left out: 3 x column size" in done.stdout
    assert json.loads((tmp_path / "out" / "index.json").read_text())["classes"] == ["b", "a"]


def test_tars_are_indexed_and_verified(packed, tmp_path):
    done = run("index", packed / "shard-{000000..000002}.tar", "--out", tmp_path / "again", "--workers", 1)
    assert "11 images in 3 shards" in done.stdout
    good = run("verify", packed, "--decode", "--hash", "--workers", 1)
    assert (good.exit_code, good.stdout.count("{")) == (0, 0)
    (packed / "shard-000001.tar").write_bytes(b"")
    bad = run("verify", packed, "--exclude", "--workers", 1)
    assert bad.exit_code == 3
    (line,) = [line for line in bad.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["shard"] == "shard-000001.tar"
    assert json.loads((packed / "excluded.jsonl").read_text())["index"] is None
    assert run("show", packed, "--samples", 3).exit_code == 0


def test_tars_without_a_place_for_their_index_are_refused():
    with pytest.raises(ShardError, match="need --out FOLDER"):
        run("index", "http://host/{0..3}.tar")


def test_a_plan_is_one_key_per_line(packed):
    options = ("--global-batch", 4, "--seed", 3, "--epoch", 1, "--step", 1, "--world-size", 2)
    parts = [run("plan", packed, *options, "--rank", rank).stdout.split() for rank in (0, 1)]
    whole = run("plan", packed, "--global-batch", 4, "--seed", 3, "--epoch", 1, "--step", 1).stdout.split()
    assert [len(part) for part in parts] == [2, 2]
    assert parts[0] + parts[1] == whole
    places = run("plan", packed, *options, "--rank", 0, "--places").stdout.splitlines()
    assert [line.split("\t")[2] for line in places] == parts[0]
    assert run("plan", f"{packed}=2.5", *options, "--rank", 0).stdout.split() == parts[0]
    changes = [word for name, value in (("data.shards", packed), ("global_batch", 4), ("seed", 3))
               for word in ("--set", f"{name}={value}")]  # fmt: skip
    recipe = run("plan", "--recipe", "fd_clip_vitb16", *changes, "--epoch", 1, "--step", 1)
    assert recipe.stdout.split() == whole


def test_a_set_is_shown_and_measured(packed, tmp_path):
    shown = run("show", packed, "--samples", 5, "--sheet", tmp_path / "sheet.png", "--pictures", 4)
    assert "JPEG 5" in shown.stdout
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    measured = run("bench", packed, "--samples", 2, "--size", 16, "--target", 500)
    assert "simplejpeg" in measured.stdout
    assert "one process reads the shards at" in measured.stdout


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("m.json", '["x", "y"]', ["x", "y"]),
        ("m.json", '{"y": 1, "x": 0}', ["x", "y"]),
        ("m.txt", "x\ny\n", ["x", "y"]),
    ],
)
def test_class_maps(tmp_path, name, text, names):
    (tmp_path / name).write_text(text)
    assert _class_map(tmp_path / name) == names


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", '{"x": 1, "y": 2}', "its numbers must be 0 to 1, each once"),
        ("m.json", "[1, 2]", "expected different names"),
        ("m.json", "{", r"m\.json cannot be read"),
        ("m.txt", "x\nx\n", "expected different names"),
        ("m.txt", "", "expected different names"),
    ],
)
def test_wrong_class_maps(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ShardError, match=said):
        _class_map(tmp_path / name)
