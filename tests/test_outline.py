"""What a dry run says of the data (shares of a mix, rounds, how many processes can share it) and of the
engine."""

from pathlib import Path

from fd_scale.data.sets import open_shards
from fd_scale.outline import _data_rows, _engine, _plan_rows
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import derive
from tests.data.test_manifest import write_set


def two_sets(folder: Path) -> tuple[str, str]:
    for name in "ab":
        (folder / name).mkdir()
        write_set(folder / name)
    return str(folder / "a"), str(folder / "b")


def test_a_mix_is_laid_out(tmp_path: Path) -> None:
    a, b = two_sets(tmp_path)
    changes = {"data.sources": {a: 3.0, b: 1.0}, "global_batch": 12, "schedule.images": 36}
    recipe = derive(recipes.demo(), **changes, **{"schedule.warmup_images": 0})
    rows = list(_plan_rows(recipe, open_shards(recipe)))
    assert rows == [
        ("data", f"{a}: 9 images in 3 shards, 75.0% of every batch, seen 3.0 times"),
        ("data", f"{b}: 9 images in 3 shards, 25.0% of every batch, seen 1.0 times"),
        ("to see", "36 images"),
        ("order", "12 streams, shuffled in blocks of 256"),
        ("processes", "numbers that can share it: 1, 2, 3, 4, 6, 12"),
    ]


def test_without_data_the_rest_is_said(tmp_path: Path) -> None:
    recipe = recipes.demo()
    rows = dict(_data_rows(recipe, scale.resolve(scale.load(recipe.scale), recipe, 1), 1, None))
    assert rows["data"] == "data.shards is not set"
    assert rows["to see"] == f"{recipe.schedule.images:,} images"
    assert f"{recipe.global_batch:,} = 1 processes" in rows["global batch"]


def test_a_loss_in_pieces_is_said() -> None:
    resolved = scale.Resolved({}, 8, 1, 3, True, False, loss_chunk_tokens=4096)
    assert _engine(resolved, "mine") == (
        "ZeRO-3, bf16, activation checkpointing off, teacher: replicate, loss in pieces of 4096 tokens "
        "(scale mine)"
    )
