"""Presets against the papers' tables, and recipes of fine-tuning that cannot be run."""

from typing import Any

import pytest

from fd_scale.errors import RecipeError
from fd_scale.run import presets, recipe, transfer
from fd_scale.run.recipe import derive
from fd_scale.run.sections import IMAGENET_1K_IMAGES

MIX, OFF, EMA = (0.8, 1.0), (0.0, 0.0), 0.9998
COLUMNS = (
    *("lr", "decay", "epochs", "warm", "end", "drop", "mix", "ema", "clip", "order", "position"),
    *("crop", "size", "stem"),
)
TABLE: dict[str, tuple[Any, ...]] = {
    "fd_base": (5e-3, 0.65, 100, 20, 2e-6, 0.3, MIX, None, 5.0, "pool_norm", "unshare", 0.875, None, False),
    "fd_large": (1e-3, 0.75, 50, 5, 2e-6, 0.4, MIX, None, 5.0, "pool_norm", "unshare", 0.875, None, False),
    "ftclip_base": (6e-4, 0.60, 50, 10, 1e-6, 0.0, OFF, EMA, None, "norm_pool", "keep", 1.0, None, True),
    "ftclip_base_384": (7e-4, 0.6, 50, 10, 1e-6, 0.0, OFF, EMA, None, "norm_pool", "keep", 1.0, 384, False),
    "ftclip_large": (4e-4, 0.65, 30, 5, 1e-6, 0.0, OFF, EMA, None, "norm_pool", "keep", 1.0, None, True),
    "ftclip_large_336": (6e-4, 0.65, 30, 5, 1e-6, 0.0, OFF, EMA, None, "norm_pool", "keep", 1.0, 336, False),
}  # fmt: skip
"""The columns B and L of FD and B/16 and L/14 of FT-CLIP, as published."""


@pytest.mark.parametrize("name", TABLE)
def test_effective_values_are_those_of_the_papers(name: str) -> None:
    row, found = dict(zip(COLUMNS, TABLE[name], strict=True)), presets.recipe_of(name)
    assert found.global_batch == 2048
    assert found.optim.lr == row["lr"]
    assert found.optim.layer_decay == row["decay"]
    assert found.schedule.images == row["epochs"] * IMAGENET_1K_IMAGES
    assert found.schedule.warmup_images == row["warm"] * IMAGENET_1K_IMAGES
    assert found.schedule.min_lr == row["end"]
    assert found.start.drop_path == row["drop"]
    assert (found.augment.mixup, found.augment.cutmix) == row["mix"]
    assert found.optim.average_decay == row["ema"]
    assert found.optim.clip_norm == row["clip"]
    assert (found.head.order, found.start.position) == (row["order"], row["position"])
    assert found.measure.crop_pct == row["crop"]
    assert (found.start.input_size, found.start.freeze_stem) == (row["size"], row["stem"])
    # Common to all columns.
    assert (found.augment.randaug, found.augment.erase) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert found.augment.smoothing == 0.1
    assert found.head.feature == "gap"
    assert (found.optim.betas, found.optim.eps, found.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.05)
    assert found.scaled_floor
    assert not found.compat.released_code


def test_the_stage_after_in22k_is_that_of_beit() -> None:
    first, second = presets.recipe_of("beit_in22k"), presets.recipe_of("beit_in22k_in1k")
    assert (first.optim.lr, first.global_batch, first.optim.layer_decay) == (3e-3, 4096, 0.65)
    assert (first.optim.clip_norm, first.start.drop_path) == (3.0, 0.2)
    assert (second.optim.lr, second.global_batch, second.optim.layer_decay) == (2e-5, 512, 0.85)
    assert (second.head.init, second.start.drop_path) == ("mapped", 0.1)


def test_the_probe_is_that_of_mae() -> None:
    found = presets.recipe_of("linear")
    assert found.optim.lr == pytest.approx(0.1 * 16384 / 256)
    assert (found.global_batch, found.optim.weight_decay, found.optim.algorithm) == (16384, 0.0, "lars")
    assert found.schedule.images == 90 * IMAGENET_1K_IMAGES
    assert found.schedule.warmup_images == 10 * IMAGENET_1K_IMAGES
    assert (found.schedule.min_lr, found.schedule.warmup_lr) == (0.0, 0.0)
    assert (found.augment.randaug, found.augment.erase, found.augment.mixes) == (None, 0.0, False)


def test_rates_follow_the_batch_by_the_presets_rule() -> None:
    small = presets.recipe_of("fd_base", images=50_000, global_batch=512)
    assert small.optim.lr == pytest.approx(5e-3 / 4)
    assert small.schedule.min_lr == pytest.approx(2e-6 / 4)
    assert small.schedule.images == 100 * 50_000
    assert presets.recipe_of("ftclip_base", global_batch=512).optim.lr == 6e-4


def test_every_preset_makes_a_recipe_and_says_where_it_is_from() -> None:
    for name in presets.names():
        assert presets.recipe_of(name).notes
        assert presets.recipe_of(name).name == name


def test_an_unknown_preset_has_near_misses() -> None:
    with pytest.raises(RecipeError, match=r"unknown preset 'fd_bsae'; did you mean fd_base"):
        presets.find("fd_bsae")


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("fd_base", {"head.keep_norm": True}, "head.keep_norm=true needs head.order='norm_pool'"),
        ("fd_base", {"measure.select": "held_out"}, "needs data.held_out"),
        ("linear", {"augment.mixup": 0.8}, "a linear probe has crop and flip alone"),
        ("fd_base", {"optim.algorithm": "lars"}, "is for linear probes"),
        ("fd_base", {"optim.layer_decay": 1.5}, "optim.layer_decay = 1.5"),
        ("fd_base", {"augment.mixupp": 1}, "did you mean mixup"),
    ],
)
def test_what_does_not_go_together_is_refused(preset: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        derive(presets.recipe_of(preset), **changes)


def test_places_are_no_science_and_seeds_are() -> None:
    found = presets.recipe_of("fd_base")
    places = {"data.shards": "a", "data.test": "b", "data.held_out": "c", "scale": "cpu"}
    assert derive(found, **places).fingerprint == found.fingerprint
    assert derive(found, seed=1).fingerprint != found.fingerprint
    assert derive(found, **{"augment.mixup": 0.5}).fingerprint != found.fingerprint


def test_released_code_has_absolute_floors() -> None:
    assert not derive(presets.recipe_of("fd_base"), **{"compat.released_code": True}).scaled_floor


def test_a_recorded_recipe_is_read_as_its_kind(tmp_path) -> None:
    (tmp_path / "recipe.json").write_text(presets.recipe_of("fd_base").to_json())
    assert transfer.of_run(tmp_path) == presets.recipe_of("fd_base")
    with pytest.raises(RecipeError, match="unknown recipe field"):
        recipe.load(tmp_path / "recipe.json")
