"""Diagnoses beyond a run and its teacher: other networks, other data, and what cannot be shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fd_scale.data.pack import pack
from fd_scale.diagnose.landscape import Grid
from fd_scale.diagnose.session import Request, diagnose
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.errors import ShardError
from fd_scale.run.world import World
from tests.data.pictures import image_folder

GRID = Grid(points=3, directions=1)


def test_one_network_alone_without_labels_attention_or_enough_images(tmp_path: Path, world: World) -> None:
    pack(image_folder(tmp_path / "images", 3), tmp_path / "shards")
    request = Request(
        "timm:test_efficientnet=random", data=tmp_path / "shards", out=tmp_path / "out", grid=GRID, bf16=True
    )
    page = diagnose(request, world, say=[].append)
    record = json.loads((page.parent / "report.json").read_text())
    assert record["title"] == "Test_efficientnet"
    assert record["about"]["Precision"] == "bfloat16 autocast"
    assert [headline["before"] for headline in record["headlines"]] == [None] * 3
    assert record["notes"] == [
        "Attention of test_efficientnet: EfficientNet has no attention that is known here.",
        "Landscape under a linear head: the data have no labels (give labelled shards with --data).",
        "Similarity of layers: it needs 4 images or more.",
    ]
    text = page.read_text()
    assert all(f'id="{name}"' in text for name in ("landscape-raw", "token-similarity", "pictures"))
    assert 'id="attention-distance"' not in text
    for note in record["notes"]:
        assert note in text


def test_a_swin_is_not_compared_with_a_vit_by_distances(run: Path, tmp_path: Path, world: World) -> None:
    request = Request(str(run), "timm:test_vit3=random", out=tmp_path / "vit", images=4, with_landscape=False)
    assert "before" in str(
        json.loads((diagnose(request, world, say=[].append).parent / "report.json").read_text())
    )
    request = Request(
        "timm:swinv2_cr_tiny_224=random",
        "timm:test_vit=random",
        data=Path(json.loads((run / "recipe.json").read_text())["data"]["shards"]),
        out=tmp_path / "swin",
        images=4,
        with_landscape=False,
    )
    page = diagnose(request, world, say=[].append)
    record = json.loads((page.parent / "report.json").read_text())
    spread = record["headlines"][0]
    assert (spread["before"], spread["verdict"]) == (None, "")
    assert record["headlines"][-1]["before"] is not None
    assert "Rollout of swinv2_cr_tiny_224: its layers attend among changing tokens." in record["notes"]
    assert "attention distance, inside windows, px" in page.read_text()


def test_data_must_be_there(tmp_path: Path, world: World) -> None:
    with pytest.raises(DiagnoseError, match="give a folder of shards with --data"):
        diagnose(Request("timm:test_vit=random"), world)
    with pytest.raises(ShardError):
        diagnose(Request("timm:test_vit=random", data=tmp_path), world)
