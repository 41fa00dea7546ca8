"""Students that cannot be built, each with the words that say why."""

from __future__ import annotations

from typing import Any

import pytest

from fd_scale.errors import RecipeError
from fd_scale.student import build_student
from tests.student.test_student import SMALL, Map, from_timm, recipe


@pytest.mark.parametrize(
    ("changes", "objective", "teacher", "words"),
    [
        ({"architecture": "vit_mikro_patch8"}, {}, Map(), "unknown model 'vit_mikro_patch8'; did you mean"),
        (from_timm("vit_bas_patch16_224"), {}, Map(), "unknown timm architecture .*did you mean"),
        ({"arguments": {"widht": 3}}, {}, Map(), "takes no argument 'widht'.*student.arguments"),
        ({"input_size": 33}, {}, Map(), "input_size=33 is not a multiple.*student.arguments"),
        (from_timm("resnet18", arguments={"drop_path_rate": 0.1}), {}, Map(), "student.drop_path says it"),
        (from_timm("resnet18", arguments={"global_pool": "avg"}), {}, Map(), "maps are not pooled"),
        (from_timm("resnet18", arguments={"img_size": 64}), {}, Map(), "input_size says it"),
        (
            from_timm("deit_base_distilled_patch16_224", arguments=SMALL),
            {},
            Map(),
            "timm cannot build deit_base_dist",
        ),
        (from_timm("mobilenetv3_small_050"), {"cls": "drop"}, Map(), "does more than a norm after its map"),
        (
            {},
            {},
            Map(num_prefix_tokens=0),
            "needs a teacher with a class token, teacher has none: set objective.cls=drop",
        ),
        ({}, {"cls": "mean"}, Map(num_prefix_tokens=0), "needs a teacher with a class token"),
        ({}, {"granularity": "cls"}, Map(num_prefix_tokens=0), "set objective.granularity=gap"),
        (
            from_timm("resnet18"),
            {},
            Map(grid=(1, 1)),
            "needs a student with a class token.*or objective.cls=mean",
        ),
        (from_timm("resnet18"), {"granularity": "cls"}, Map(), "needs a student with a class token"),
        (
            {},
            {},
            Map(grid=(7, 7)),
            "at 32 px has a grid of 4x4, teacher teacher one of 7x7.*"
            "set student.input_size=56.*objective.grid=bilinear",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes: Any, objective: Any, teacher: Map, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        build_student(recipe(changes, **objective), [teacher])
