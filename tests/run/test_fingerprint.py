"""What a recipe's fingerprint sees, and what it is blind to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fd_scale.errors import RecipeError
from fd_scale.run import recipe as recipe_module
from fd_scale.run.recipe import Recipe, build, derive

MINIMAL = {
    "name": "trial",
    "student": {"architecture": "vit_base_patch16"},
    "teacher": {"library": "timm", "architecture": "vit_base_patch16_224", "weights": "random"},
    "scale": "cpu",
}


@pytest.fixture
def recipe() -> Recipe:
    return build(MINIMAL)


CHANGES = {
    "name": "other",
    "student.architecture": "vit_small_patch16",
    "student.input_size": 64,
    "student.position": "ape",
    "student.layer_scale": 0.2,
    "student.drop_path": 0.0,
    "student.arguments": {"mlp_ratio": 3.0},
    "student.weights": "begin.safetensors",
    "teacher.library": "open_clip",
    "teacher.architecture": "ViT-B-16",
    "teacher.weights": "openai",
    "teacher.input_size": 64,
    "teacher.arguments": {"patch_size": 8},
    "teacher.final_norm": False,
    "teacher.drop_path": 0.1,
    "view.crop_scale": [0.1, 1.0],
    "view.crop_ratio": [0.5, 1.0],
    "view.flip": 0.0,
    "view.interpolation": "bilinear",
    "view.exif": "apply",
    "view.shrink": False,
    "view.color.jitter": 0.8,
    "view.color.brightness": 0.1,
    "view.color.contrast": 0.1,
    "view.color.saturation": 0.1,
    "view.color.hue": 0.2,
    "view.color.grey": 0.2,
    "objective.target": "l2",
    "objective.granularity": "gap",
    "objective.beta": 1.0,
    "objective.cls": "drop",
    "objective.cls_weight": 1.0,
    "objective.embedding_weight": 0.5,
    "objective.normaliser": "weighted_mean",
    "objective.grid": "bilinear",
    "optim.lr": 1e-3,
    "optim.betas": [0.9, 0.98],
    "optim.eps": 1e-6,
    "optim.weight_decay": 0.1,
    "optim.decay_position": False,
    "optim.clip_norm": None,
    "optim.average_decay": 0.999,
    "schedule.images": 100 * 1_281_167,
    "schedule.warmup_images": 0,
    "schedule.warmup_lr": 0.0,
    "schedule.min_lr": 0.0,
    "data.block": 128,
    "data.sources": {"/a": 1.0, "/b": 2.0},
    "global_batch": 1024,
    "seed": 1,
}
"""A change to every field that is science."""

BLIND = {
    "notes": "words",
    "scale": "vitb_1gpu",
    "data.shards": "/elsewhere",
    "data.on_change": "next_epoch",
    "data.max_bad_fraction": 0.0,
    "data.max_bad_shards": 3,
    "run.root": "/elsewhere",
    "run.workers": 9,
    "run.decoder": "pillow",
    "run.cache": "/scratch",
    "run.cache_gib": 100.0,
    "run.allow_pipe": True,
    "run.log_every_steps": 1,
    "run.save_every_steps": 1,
    "run.keep_last": 9,
    "run.keep_every_steps": 5,
    "run.max_nonfinite_steps": 1,
    "run.async_save": False,
    "run.watchdog_s": 60.0,
    "run.probe": "/elsewhere",
    "run.probe_every_steps": 9,
    "run.wandb": "offline",
    "run.wandb_project": "other",
}
"""A change to every field that is not."""


def leaves(model: type, prefix: str = "") -> set[str]:
    found = set()
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, recipe_module.Section):
            found |= leaves(section, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def test_the_two_lists_cover_the_schema():
    assert leaves(Recipe) == CHANGES.keys() | BLIND.keys()


@pytest.mark.parametrize("field", CHANGES)
def test_a_fingerprint_sees_the_science(recipe, field):
    changed = derive(recipe, **{field: CHANGES[field]})
    assert changed != recipe
    assert changed.fingerprint != recipe.fingerprint


@pytest.mark.parametrize("field", BLIND)
def test_a_fingerprint_is_blind_to_the_rest(recipe, field):
    changed = derive(recipe, **{field: BLIND[field]})
    assert changed != recipe
    assert changed.fingerprint == recipe.fingerprint


def test_the_fingerprint_is_this_one_on_any_machine(recipe):
    """A change of schema or defaults that moves this value cuts all runs off from their directories."""
    assert recipe.fingerprint == "0b7bcd95"
    assert recipe.run_name == "trial-0b7bcd95"
    code = "import json, sys, fd_scale.run.recipe as r; print(r.build(json.loads(sys.argv[1])).run_name)"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        answer = subprocess.run(
            [sys.executable, "-c", code, json.dumps(MINIMAL)], env=environment, capture_output=True, text=True
        )
        assert answer.stdout.strip() == recipe.run_name, answer.stderr


def test_a_fingerprint_sees_the_weights_of_sources_and_not_where_they_lie(recipe):
    mixed = derive(recipe, **{"data.sources": {"/a": 1.0, "/b": 2.0}})
    assert derive(recipe, **{"data.sources": {"/x": 1.0, "/y": 2.0}}).fingerprint == mixed.fingerprint
    assert derive(recipe, **{"data.sources": {"/a": 2.0, "/b": 1.0}}).fingerprint != mixed.fingerprint


def test_one_folder_and_several_exclude_each_other(recipe):
    with pytest.raises(
        RecipeError, match=r"shards=./a. and sources exclude each other: set one to null or \{\}"
    ):
        derive(recipe, **{"data.shards": "/a", "data.sources": {"/b": 1.0}})
    with pytest.raises(RecipeError, match=r"data\.sources\./b"):
        derive(recipe, **{"data.sources": {"/b": 0.0}})


def test_a_fingerprint_looks_at_values_and_not_at_how_they_are_written(recipe):
    by_hand = derive(recipe, **{"student.arguments": {"a": 1, "b": 2}, "optim.clip_norm": 3})
    other = derive(recipe, **{"student.arguments": {"b": 2, "a": 1}, "optim.clip_norm": 3.0})
    assert by_hand.fingerprint == other.fingerprint


class Later(Recipe):
    """The schema of a later version, with one field more, and one default changed."""

    ema_decay: float = 0.0
    seed: int = 1


def test_a_field_that_is_added_later_renames_no_run_but_another_default_does(recipe):
    recorded = json.loads(recipe.to_json())
    assert recorded["seed"] == 0
    assert Later.model_validate_json(json.dumps(recorded | {"seed": 1})).fingerprint == recipe.fingerprint
    assert Later.model_validate_json(json.dumps(recorded)).fingerprint != recipe.fingerprint
    with_it = json.dumps(recorded | {"seed": 1, "ema_decay": 0.9})
    assert Later.model_validate_json(with_it).fingerprint != recipe.fingerprint
