"""The named recipes: the papers' numbers, what differs between them, and that their parts exist."""

from __future__ import annotations

import pytest
import timm
import torch

import models
from fd_scale.errors import RecipeError
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import Recipe, build

EPOCH = 1_281_167

ISSUED = [
    "fd_clip_vitb16",
    "fd_clip_vitl14",
    "fd_dino_vitb16",
    "fd_deit_vitb16",
    "fd_mae_vitb16",
    "fd_esvit_swinb",
    "fd_swinv2g",
    "fd_swinv2b",
    "fd_swinv2t",
    "demo",
]

VIT = (1.2e-3, 2e-6, 2e-5)
"""Peak, first and last learning rate at batch 2048, of the papers and the released configurations alike."""

PUBLISHED = {
    # name: epochs, (peak, first, last), drop path, smallest crop, class token weight, interpolation
    "fd_clip_vitb16": (300, VIT, 0.2, 0.08, 10.0, "bicubic"),
    "fd_clip_vitb16_released_code": (300, VIT, 0.2, 0.08, 1.0, "bilinear"),
    "fd_clip_vitb16_100ep": (100, VIT, 0.1, 0.08, 10.0, "bicubic"),
    "fd_clip_vitb16_100ep_released_code": (100, VIT, 0.1, 0.67, 1.0, "bilinear"),
    "fd_clip_vitl14": (300, VIT, 0.3, 0.08, 10.0, "bicubic"),
    "fd_clip_vitl14_released_code": (300, VIT, 0.3, 0.08, 1.0, "bilinear"),
    "fd_dino_vitb16": (300, VIT, 0.3, 0.08, 10.0, "bicubic"),
    "fd_dino_vitb16_released_code": (300, VIT, 0.3, 0.08, 1.0, "bilinear"),
    "fd_deit_vitb16": (300, VIT, 0.3, 0.08, 10.0, "bicubic"),
    "fd_deit_vitb16_released_code": (300, VIT, 0.3, 0.08, 1.0, "bilinear"),
    "fd_mae_vitb16": (300, VIT, 0.3, 0.08, 10.0, "bicubic"),
    "fd_esvit_swinb": (300, (8e-4, 4e-6, 4e-5), 0.3, 0.08, 1.0, "bicubic"),
    "fd_esvit_swinb_released_code": (300, (8e-4, 4e-6, 4e-5), 0.3, 0.08, 1.0, "bilinear"),
    "fd_swinv2g": (300, (3e-4, 2e-6, 2e-5), 0.3, 0.08, 1.0, "bicubic"),
    "fd_swinv2b": (300, (3e-4, 2e-6, 2e-5), 0.3, 0.08, 1.0, "bicubic"),
    "fd_swinv2t": (300, (3e-4, 2e-6, 2e-5), 0.3, 0.08, 1.0, "bicubic"),
}

NETWORKS = {
    # name: student, its pixels, teacher's library, name, weights, pixels
    "fd_clip_vitb16": (
        "vit_base_patch16",
        224,
        "timm",
        "vit_base_patch16_clip_quickgelu_224",
        "openai",
        None,
    ),
    "fd_clip_vitl14": (
        "vit_large_patch14",
        224,
        "timm",
        "vit_large_patch14_clip_quickgelu_224",
        "openai",
        None,
    ),
    "fd_dino_vitb16": ("vit_base_patch16", 224, "timm", "vit_base_patch16_224", "dino", None),
    "fd_deit_vitb16": ("vit_base_patch16", 224, "timm", "deit_base_patch16_224", "fb_in1k", None),
    "fd_mae_vitb16": ("vit_base_patch16", 224, "timm", "vit_base_patch16_224", "mae", None),
    "fd_esvit_swinb": (
        "swinv2_base",
        224,
        "timm",
        "swin_base_patch4_window7_224",
        "esvit_swinb_w14.pth",
        None,
    ),
    "fd_swinv2g": ("swinv2_g", 256, "models", "swinv2_g", "swinv2_g.safetensors", 256),
    "fd_swinv2b": ("swinv2_base", 256, "models", "swinv2_base", "swinv2_base.safetensors", 256),
    "fd_swinv2t": ("swinv2_tiny", 256, "models", "swinv2_tiny", "swinv2_tiny.safetensors", 256),
    "demo": ("vit_micro_patch8", 64, "timm", "vit_tiny_patch16_224", "demo_teacher.safetensors", 64),
}

every_recipe = pytest.mark.parametrize("name", recipes.names())


def differences(one: Recipe, other: Recipe) -> dict[str, tuple[object, object]]:
    def flat(values: dict, prefix: str = "") -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in values.items():
            found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return found

    before, after = flat(one.model_dump()), flat(other.model_dump())
    return {
        key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)
    }


def test_the_issued_recipes_are_there():
    assert set(ISSUED) <= set(recipes.names())
    assert {*PUBLISHED, "demo"} == set(recipes.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_numbers_are_the_published_ones(name):
    recipe = recipes.get(name)
    epochs, rates, drop_path, smallest_crop, cls_weight, interpolation = PUBLISHED[name]
    assert recipe.schedule.images == epochs * EPOCH
    assert recipe.schedule.warmup_images == 10 * EPOCH
    assert (recipe.optim.lr, recipe.schedule.warmup_lr, recipe.schedule.min_lr) == rates
    assert (recipe.optim.betas, recipe.optim.eps) == ((0.9, 0.999), 1e-8)
    assert (recipe.optim.weight_decay, recipe.optim.clip_norm, recipe.global_batch) == (0.05, 3.0, 2048)
    assert recipe.optim.decay_position
    assert recipe.student.drop_path == drop_path
    assert recipe.view.crop_scale == (smallest_crop, 1.0)
    assert (recipe.view.flip, recipe.view.interpolation) == (0.5, interpolation)
    assert (recipe.objective.target, recipe.objective.granularity, recipe.objective.beta) == (
        "whiten",
        "full",
        2.0,
    )
    assert recipe.objective.cls_weight == cls_weight
    assert recipe.objective.cls == ("drop" if "swin" in name else "match")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_networks_are_the_papers(name):
    student, teacher = recipes.get(name).student, recipes.get(name).teacher
    assert (
        student.architecture,
        student.input_size,
        teacher.library,
        teacher.architecture,
        teacher.weights,
        teacher.input_size,
    ) == NETWORKS[name]
    vit = student.architecture.startswith("vit_")
    assert (student.position, student.layer_scale) == (("shared_rpb", 0.1) if vit else (None, None))


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.endswith("_released_code")])
def test_a_released_code_variant_differs_where_the_code_does(name):
    changed = differences(recipes.get(name.removesuffix("_released_code")), recipes.get(name))
    expected = {"name", "notes", "view.interpolation"}
    if name.startswith("fd_esvit"):
        expected |= {"student.arguments.position_bias", "student.arguments.residual_norm_weight"}
    else:
        expected |= {"objective.cls_weight"}
    if "100ep" in name:
        expected |= {"view.crop_scale"}
    assert changed.keys() == expected


@every_recipe
def test_a_recipe_has_its_name_its_story_and_a_record_form(name):
    recipe = recipes.get(name)
    assert recipe.name == name
    assert recipe.notes == recipes.describe(name)
    assert recipe.notes
    assert build(recipe.model_dump(mode="json")) == recipe


def test_no_two_recipes_share_a_directory():
    assert len({recipes.get(name).run_name for name in recipes.names()}) == len(recipes.names())


def test_the_story_is_no_science():
    assert recipes.get("demo").fingerprint == recipes.demo().fingerprint


def test_an_unknown_name_is_refused_with_near_misses():
    with pytest.raises(RecipeError, match=r"unknown recipe 'fd_clip_vitb_16'; did you mean fd_clip_vitb16"):
        recipes.get("fd_clip_vitb_16")
    with pytest.raises(RecipeError, match=r"unknown recipe 'zzz' \(recipes: fd_clip_vitb16,"):
        recipes.describe("zzz")


def test_the_table_has_a_line_for_each():
    assert recipes.table().row_count == len(recipes.names())


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "demo"])
def test_student_and_teacher_can_be_built_with_these_arguments(name):
    """On the meta device: names, tags and arguments exist, and both maps have the same grid."""
    recipe = recipes.get(name)
    student, teacher = recipe.student, recipe.teacher
    with torch.device("meta"):
        own = (
            {}
            if student.position is None
            else {"position": student.position, "layer_scale": student.layer_scale}
        )
        built = models.create(
            student.architecture,
            input_size=student.input_size,
            drop_path=student.drop_path,
            **own,
            **student.arguments,
        )
        if teacher.library == "models":
            guest = models.create(teacher.architecture, input_size=teacher.input_size, **teacher.arguments)
            assert guest.grid == built.grid
            return
        guest = timm.create_model(teacher.architecture, num_classes=0, **teacher.arguments)
    if "." not in teacher.weights:
        assert f"{teacher.architecture}.{teacher.weights}" in timm.list_pretrained(
            f"{teacher.architecture}.*"
        )
    grid = (
        guest.feature_info[-1]["reduction"]
        if teacher.architecture.startswith("swin")
        else guest.patch_embed.patch_size[0]
    )
    assert (224 // grid, 224 // grid) == built.grid
    assert guest.num_features == built.embed_dim


def test_the_demos_networks_fit_each_other():
    recipe = recipes.get("demo")
    assert recipe.teacher.input_size == recipe.student.input_size
    with torch.device("meta"):
        student = models.create(recipe.student.architecture, input_size=recipe.student.input_size)
        teacher = timm.create_model(
            recipe.teacher.architecture,
            num_classes=0,
            img_size=recipe.teacher.input_size,
            **recipe.teacher.arguments,
        )
    assert teacher.patch_embed.grid_size == student.grid
    assert recipe.steps < 1000


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        *((name, size) for name in PUBLISHED for size in (1, 2, 4, 8, 16)),
        ("demo", 1),
        ("demo", 2),
        ("demo", 4),
    ],
)
def test_a_recipe_runs_at_its_scale_on_the_usual_numbers_of_processes(name, world_size):
    recipe = recipes.get(name)
    resolved = scale.resolve(scale.load(recipe.scale), recipe, world_size)
    assert resolved.micro_batch * resolved.accumulation * world_size == recipe.global_batch
