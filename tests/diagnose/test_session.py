"""Diagnoses beyond a run and its teacher: other networks, other data, and what cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fd_scale.data.pack import pack
from fd_scale.diagnose.figures_attention import distance_figure
from fd_scale.diagnose.landscape import Grid
from fd_scale.diagnose.results import Results
from fd_scale.diagnose.session import Request, diagnose
from fd_scale.diagnose.subjects import DiagnoseError, Pair
from fd_scale.diagnose.summary import headlines
from fd_scale.diagnose.teller import SILENT, Teller
from fd_scale.errors import ShardError
from fd_scale.run.world import World
from tests.data.pictures import image_folder
from tests.diagnose.tiny import SMALL, SWIN, timm_subject

GRID = Grid(points=3, directions=1)


def test_one_network_alone_without_labels_attention_or_enough_images(tmp_path: Path, world: World) -> None:
    pack(image_folder(tmp_path / "images", 3), tmp_path / "shards")
    request = Request(
        "timm:test_efficientnet@random", data=tmp_path / "shards", out=tmp_path / "out", grid=GRID, bf16=True
    )
    page = diagnose(request, world, teller=SILENT)
    record = json.loads((page.parent / "report.json").read_text())
    assert record["title"] == "Test_efficientnet"
    assert record["about"]["Precision"] == "bfloat16 autocast"
    assert [headline["before"] for headline in record["headlines"]] == [None] * 3
    assert record["notes"] == [
        "Landscape under a linear head: the data have no labels (give labelled shards with --data).",
        "Attention of test_efficientnet: EfficientNet has no attention that is known here.",
        "Similarity of layers: it needs 4 images or more.",
    ]
    text = page.read_text()
    assert all(f'id="{name}"' in text for name in ("landscape-raw", "token-similarity", "pictures"))
    assert 'id="attention-distance"' not in text
    for note in record["notes"]:
        assert note in text


def test_a_swin_is_not_compared_with_a_vit_by_distances(
    shards: Path, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    swin = timm_subject("swin_tiny_patch4_window7_224", **SWIN)
    vit = timm_subject("vit_tiny_patch16_224", **SMALL)
    found: list[Results] = []

    def written(results: Results, folder: Path, *, live: bool) -> Path:
        found.append(results)
        return folder

    monkeypatch.setattr("fd_scale.diagnose.session.load_pair", lambda *_, **__: Pair(swin, vit, None))
    monkeypatch.setattr("fd_scale.diagnose.session.write", written)
    request = Request("swin", data=shards, out=tmp_path, images=4, with_landscape=False)
    diagnose(request, world, teller=SILENT)
    (results,) = found
    spread, *_, last = headlines(results)
    assert (spread.before, spread.verdict) == (None, "")
    assert last.before is not None
    assert results.notes == [f"Rollout of {swin.name}: its layers attend among changing tokens."]
    drawing = distance_figure(results)
    assert drawing is not None
    assert "attention distance, inside windows, px" in drawing.svg
    assert "attention distance, px" in drawing.svg


def test_what_is_wrong_is_said_before_anything_is_measured(
    run: Path, shards: Path, tmp_path: Path, world: World
) -> None:
    told: list[str] = []
    request = Request(str(run), out=tmp_path, images=4, pictures=[tmp_path / "none.png"])
    with pytest.raises(DiagnoseError, match=r"--image .*none\.png cannot be read"):
        diagnose(request, world, teller=Teller(told.append))
    request = Request(str(run), out=tmp_path, images=4, fine_tuned=True)
    with pytest.raises(DiagnoseError, match="teacher has no classifier of its own"):
        diagnose(request, world, teller=Teller(told.append))
    assert told == ["student, step 6 against teacher: 4 of 40 images"]


def test_data_must_be_there(tmp_path: Path, world: World) -> None:
    with pytest.raises(DiagnoseError, match="give a folder of shards with --data"):
        diagnose(Request("timm:test_vit@random"), world)
    with pytest.raises(ShardError):
        diagnose(Request("timm:test_vit@random", data=tmp_path), world)
