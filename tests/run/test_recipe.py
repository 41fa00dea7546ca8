"""The schema of a recipe: what it refuses, and how; the record form."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fd_scale.errors import RecipeError
from fd_scale.run.recipe import Recipe, apply_overrides, build, derive, load

MINIMAL = {
    "name": "trial",
    "student": {"architecture": "vit_base_patch16"},
    "teacher": {"library": "timm", "architecture": "vit_base_patch16_224", "weights": "random"},
    "scale": "cpu",
}


@pytest.fixture
def recipe() -> Recipe:
    return build(MINIMAL)


def refusal(assignment: str) -> str:
    with pytest.raises(RecipeError) as caught:
        apply_overrides(build(MINIMAL), [assignment])
    return str(caught.value)


def test_defaults_are_those_of_the_papers(recipe):
    assert (recipe.student.position, recipe.student.layer_scale) == ("shared_rpb", 0.1)
    assert (recipe.objective.target, recipe.objective.beta, recipe.objective.cls_weight) == (
        "whiten",
        2.0,
        10.0,
    )
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip_norm) == (1.2e-3, 0.05, 3.0)
    assert recipe.schedule.images == 300 * 1_281_167
    assert recipe.view.crop_scale == (0.08, 1.0)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        (
            "optim.weight_dacay=0",
            "unknown recipe field 'optim.weight_dacay'; did you mean weight_decay, average_decay? (fields",
        ),
        ("studnet.input_size=64", "unknown recipe field 'studnet.input_size'; did you mean student"),
        ("objective.cls_wieght=1", "did you mean cls_weight"),
        ("zzz=1", "unknown recipe field 'zzz' (fields here: name, notes, view, optim,"),
        ("optim.lr.peak=1", "unknown recipe field 'optim.lr.peak' (fields here: none, it is a plain value)"),
        ("student.arguments.a.b=1", "unknown recipe field 'student.arguments.a.b'"),
        ("optim={'lr': 1e-3, 'clip': 1.0}", "unknown recipe field 'optim.clip'; did you mean clip_norm?"),
    ],
)
def test_an_unknown_field_is_refused_with_near_misses(assignment, said):
    assert said in refusal(assignment)


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("global_batch=true", "recipe field global_batch = True: Input should be a valid integer"),
        ("global_batch=2048.0", "global_batch = 2048.0: Input should be a valid integer"),
        ("global_batch='2048'", "global_batch = '2048': Input should be a valid integer"),
        ("global_batch=0", "global_batch = 0: Input should be greater than 0"),
        ("optim.lr=fast", "optim.lr = 'fast': Input should be a valid number"),
        ("optim.lr=1e999", "optim.lr = inf: Input should be a finite number"),
        ("optim.lr=nan", "optim.lr = 'nan': Input should be a valid number"),
        ("optim.betas=(0.9, 1.0)", "optim.betas.1 = 1.0: Input should be less than 1"),
        ("optim.betas=(0.9,)", "optim.betas.1"),
        ("optim.decay_position=1", "optim.decay_position = 1: Input should be a valid boolean"),
        (
            "student.position=shared_rbp",
            "student.position = 'shared_rbp': Input should be 'shared_rpb', 'rpb' or",
        ),
        ("teacher.library=hub", "Input should be 'timm', 'open_clip' or 'models'"),
        ("student.drop_path=1", "student.drop_path = 1: Input should be less than 1"),
        ("teacher=CLIP", "recipe field teacher = 'CLIP': Input should be an object"),
        ("name=My Run", "recipe field name = 'My Run': String should match pattern"),
        ("seed=-1", "seed = -1: Input should be greater than or equal to 0"),
        (
            "student.arguments.a=[1, 'x']",
            "student.arguments.a = [1, 'x']: expected a number, text, true, false",
        ),
        ("student.arguments.a={'b': 1}", "student.arguments.a: expected a number, text"),
    ],
)
def test_a_wrong_type_or_value_names_the_field_and_the_value(assignment, said):
    message = refusal(assignment)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student.architecture": "timm:resnet50"}, "set student.position=null"),
        ({"student.architecture": "swinv2_base"}, "'swinv2_base' brings its own: set student.position=null"),
        (
            {"student.architecture": "swinv2_base", "student.position": None},
            "set student.layer_scale=null",
        ),
        ({"student.position": None}, "choose shared_rpb, rpb or ape"),
        ({"objective.granularity": "cls", "objective.cls": "drop"}, "leaves nothing to regress"),
        ({"view.crop_scale": [0.5, 0.1]}, "crop_scale=(0.5, 0.1) must rise"),
        ({"view.crop_scale": [0.5, 1.5]}, "must end at 1 or below"),
        ({"view.crop_ratio": [2.0, 0.5]}, "crop_ratio=(2.0, 0.5) must rise"),
        ({"schedule.min_lr": 1.0}, "schedule.min_lr=1.0 must not exceed optim.lr=0.0012"),
        ({"schedule.warmup_lr": 1.0}, "schedule.warmup_lr=1.0 must not exceed optim.lr=0.0012"),
        ({"schedule.warmup_images": 300 * 1_281_167}, "must be below images=384,350,100"),
        ({"schedule.images": 2047, "schedule.warmup_images": 0}, "is below one global_batch=2,048"),
        (
            {"schedule.images": 100, "schedule.warmup_images": 99, "global_batch": 64},
            "schedule.warmup_images=99 fills all 2 steps of global_batch=64",
        ),
    ],
)
def test_an_impossible_pair_is_refused(recipe, changes, said):
    with pytest.raises(RecipeError) as caught:
        derive(recipe, **changes)
    assert said in str(caught.value)


def test_a_student_of_another_family_has_neither_position_nor_layer_scale(recipe):
    changes = {"student.position": None, "student.layer_scale": None}
    for architecture in ("swinv2_g", "timm:resnet50"):
        assert derive(recipe, **changes, **{"student.architecture": architecture}).student.position is None
    assert derive(recipe, **{"student.layer_scale": None}).student.layer_scale is None


def test_a_missing_field_is_named():
    with pytest.raises(RecipeError, match=r"recipe field teacher\.weights: Field required"):
        build({**MINIMAL, "teacher": {"library": "timm", "architecture": "x"}})


def test_all_faults_are_told_at_once():
    with pytest.raises(RecipeError) as caught:
        build({**MINIMAL, "seed": "x", "global_batsh": 3, "optim": {"lr": -1.0}})
    assert len(str(caught.value).splitlines()) == 3


def test_values_that_json_has_not_are_refused():
    with pytest.raises(RecipeError, match="not JSON serializable"):
        build({**MINIMAL, "notes": {1, 2}})


def test_a_recipe_is_frozen(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim.lr = 1.0


# Record form.


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.lists(st.integers(-9, 9), min_size=1, max_size=4).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(
    arguments=st.dictionaries(st.text(min_size=1, max_size=8), scalars, max_size=3),
    lr=st.floats(min_value=1e-3, max_value=1.0),
    notes=st.text(max_size=30),
)
def test_json_gives_the_same_recipe_back(arguments, lr, notes):
    written = derive(build(MINIMAL), **{"student.arguments": arguments, "optim.lr": lr, "notes": notes})
    read = build(json.loads(written.to_json()))
    assert read == written
    assert read.fingerprint == written.fingerprint
    assert read.to_json() == written.to_json()
    assert {key: type(value) for key, value in read.student.arguments.items()} == {
        key: type(value) for key, value in arguments.items()
    }


def test_a_recorded_recipe_is_loaded(recipe, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(recipe.to_json())
    assert load(path) == recipe
    assert recipe.to_json().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        (b"", "is not JSON"),
        (b'{"name": "tr', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "holds list, expected an object"),
        (b"{}", "recipe field name: Field required"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, content, said):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert said in str(caught.value)


def test_a_folder_is_no_recipe_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load(tmp_path)


# --set.


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("optim.lr=2e-4", "optim.lr", 2e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        (" optim.lr = 2e-4 ", "optim.lr", 2e-4),
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("optim.clip_norm=None", "optim.clip_norm", None),
        ("optim.decay_position=false", "optim.decay_position", False),
        ("optim.decay_position=False", "optim.decay_position", False),
        ("optim.betas=[0.9, 0.95]", "optim.betas", (0.9, 0.95)),
        ("optim.betas=(0.9, 0.95)", "optim.betas", (0.9, 0.95)),
        ("global_batch=1_024", "global_batch", 1024),
        ("teacher.weights=random", "teacher.weights", "random"),
        ("teacher.weights=/data/a b=c.pth", "teacher.weights", "/data/a b=c.pth"),
        ("teacher.weights=", "teacher.weights", ""),
        ("teacher.weights={1, 2}", "teacher.weights", "{1, 2}"),
        ('data.shards="2024"', "data.shards", "2024"),
        ("student.arguments.window_size=14", "student.arguments", {"window_size": 14}),
        ("student.arguments.sizes=(12, 6)", "student.arguments", {"sizes": (12, 6)}),
        ("student.arguments={'a': 1.5}", "student.arguments", {"a": 1.5}),
        ("notes=plain words", "notes", "plain words"),
    ],
)
def test_an_assignment_is_parsed_and_checked(recipe, assignment, field, value):
    found = apply_overrides(recipe, [assignment])
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_later_assignments_win_and_are_checked_together(recipe):
    both = apply_overrides(
        recipe, ["student.position=null", "student.layer_scale=null", "student.architecture=a"]
    )
    assert both.student.architecture == "a"
    assert apply_overrides(recipe, ["seed=1", "seed=2"]).seed == 2
    assert apply_overrides(recipe, []) == recipe


@pytest.mark.parametrize("assignment", ["optim.lr", "=3", " = 3", ""])
def test_an_assignment_without_field_or_value_is_refused(assignment):
    assert "is not of the form section.field=value" in refusal(assignment)


def test_deriving_leaves_the_first_recipe_alone(recipe):
    before = recipe.to_json()
    derive(recipe, **{"student.arguments.a": 1, "optim.lr": 1.0})
    assert recipe.to_json() == before


# Derived counts.


@pytest.mark.parametrize(
    ("images", "warmup", "batch", "steps", "warmup_steps"),
    [
        (300 * 1_281_167, 10 * 1_281_167, 2048, 187_671, 6256),
        (1, 0, 1, 1, 0),
        (129, 64, 64, 3, 1),
        (128, 0, 64, 2, 0),
        (127, 63, 64, 2, 1),
    ],
)
def test_steps_follow_from_images_and_batch(recipe, images, warmup, batch, steps, warmup_steps):
    trial = derive(
        recipe, **{"schedule.images": images, "schedule.warmup_images": warmup, "global_batch": batch}
    )
    assert (trial.steps, trial.warmup_steps) == (steps, warmup_steps)
