"""The student: what it gives for each choice of a recipe, what it refuses, and the gradients of the whole
chain."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from fd_scale import student as students
from fd_scale import timm_maps
from fd_scale.errors import RecipeError
from fd_scale.objective import Objective
from fd_scale.pixels import normalise
from fd_scale.run import recipe as recipes
from fd_scale.student import Student, begin, build_backbone, build_student, loading_recipe
from tests.reference import objective as reference
from tests.teachers.tiny import pixels, saved, shaken

SIDE = 32
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}


@dataclass(frozen=True)
class Map:
    """The form of a teacher's map."""

    name: str = "teacher"
    width: int = 12
    grid: tuple[int, int] = (4, 4)
    num_prefix_tokens: int = 1


def recipe(student: dict[str, Any] | None = None, **objective: Any) -> recipes.Recipe:
    own = {"architecture": "vit_micro_patch8", "input_size": SIDE, "drop_path": 0.0, "arguments": SMALL}
    return recipes.build(
        {
            "name": "trial",
            "student": {**own, **(student or {})},
            "teacher": {"library": "timm", "architecture": "none", "weights": "random"},
            "objective": objective,
            "scale": "none",
        }
    )


def from_timm(name: str, **more: Any) -> dict[str, Any]:
    return {"architecture": f"timm:{name}", "position": None, "layer_scale": None, "arguments": {}, **more}


def made(asked: recipes.Recipe, *teachers: Map) -> Any:
    torch.manual_seed(0)
    student = build_student(asked, teachers or [Map()])
    shaken(student)
    return student


def test_names_of_parameters_and_size() -> None:
    student = made(recipe(), Map(), Map(width=7))
    names = [name for name, _ in student.named_parameters()]
    assert {name.partition(".")[0] for name in names} == {"backbone", "projectors"}
    assert [name for name in names if name.startswith("projectors")] == [
        f"projectors.{n}.linear.{kind}" for n in (0, 1) for kind in ("weight", "bias")
    ]
    assert student.input_size == SIDE
    assert [tuple(tokens.shape) for tokens in student(pixels(SIDE))] == [(2, 17, 12), (2, 17, 7)]


@pytest.mark.parametrize(("name", "students_parameters"), [("base", 85_665_360), ("large", 302_955_584)])
def test_parameter_counts_of_the_papers(name: str, students_parameters: int) -> None:
    """Counts of the released code: student B/16 and its projector to CLIP B/16; student L/14."""
    architecture, side, width = {
        "base": ("vit_base_patch16", 14, 768),
        "large": ("vit_large_patch14", 16, 1024),
    }[name]
    asked = recipe({"architecture": architecture, "input_size": 224, "arguments": {}})
    with torch.device("meta"):
        student = build_student(asked, [Map(width=width, grid=(side, side))])
    assert sum(p.numel() for p in student.backbone.parameters()) == students_parameters
    assert sum(p.numel() for p in student.projectors.parameters()) == width * width + width


FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "own vit": ({}, True),
    "own swinv2": (
        {
            "architecture": "swinv2_micro",
            "position": None,
            "layer_scale": None,
            "arguments": {},
            "input_size": 64,
        },
        False,
    ),
    "vit": (from_timm("vit_base_patch16_224", arguments=SMALL), True),
    "relative positions": (
        from_timm(
            "vit_relpos_base_patch16_224",
            arguments={**SMALL, "rel_pos_type": "bias", "shared_rel_pos": True, "class_token": True},
        ),
        True,
    ),
    "beit": (from_timm("beit_base_patch16_224", arguments=SMALL), True),
    "swin": (from_timm("swin_base_patch4_window7_224", arguments=SWIN, input_size=64, drop_path=0.1), False),
    "swinv2": (from_timm("swinv2_base_window12_192", arguments=SWIN, input_size=64), False),
    "resnet": (from_timm("resnet18", arguments={"channels": [4, 8, 12, 16], "layers": [1, 1, 1, 1]}), False),
    "convnext": (
        from_timm("convnext_tiny", arguments={"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]}),
        False,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_any_family_trains_and_gives_the_map_that_a_teacher_would(name: str) -> None:
    changes, has_class_token = FAMILIES[name]
    asked = recipe(changes, cls="match" if has_class_token else "drop", grid="bilinear")
    student = made(asked, Map(grid=(3, 3)))
    values = pixels(asked.student.input_size)
    (tokens,) = student(values)
    assert tokens.shape == (2, 9 + has_class_token, 12)
    with torch.no_grad():
        seen = normalise(values, student.mean, student.std, torch.float32)
        if asked.student.architecture.startswith("timm:"):
            expected = timm_maps.read(student.backbone, seen).tokens_BND
        else:
            expected = student.backbone(seen)
        got = timm_maps.as_features(student.backbone(seen), student.form).tokens_BND
    assert torch.equal(got, expected)
    student.train()
    student(values)[0].square().sum().backward()
    idle = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def expected_tokens(student: Any, values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = student.backbone(normalise(values, student.mean, student.std, dtype))
    return tokens


@pytest.mark.parametrize(
    ("granularity", "cls", "pick"),
    [
        ("full", "match", lambda t: t),
        ("full", "drop", lambda t: t[:, 1:]),
        ("full", "mean", lambda t: torch.cat((t[:, 1:].mean(1, keepdim=True), t[:, 1:]), 1)),
        ("cls", "match", lambda t: t[:, :1]),
        ("cls", "mean", lambda t: t[:, 1:].mean(1, keepdim=True)),
        ("gap", "match", lambda t: t[:, 1:].mean(1, keepdim=True)),
        ("gap", "mean", lambda t: t[:, 1:].mean(1, keepdim=True)),
    ],
)
def test_the_tokens_of_each_choice(granularity: Any, cls: Any, pick: Any) -> None:
    student = made(recipe(granularity=granularity, cls=cls))
    values = pixels(SIDE)
    expected = student.projectors[0].linear(pick(expected_tokens(student, values)))
    # The choice itself is exact (0 seen); the mean of a map may be summed in another order.
    assert torch.allclose(student(values)[0], expected, rtol=0, atol=1e-5)


def test_pooled_choices_need_no_equal_grids() -> None:
    for granularity in ("cls", "gap"):
        student = made(recipe(granularity=granularity), Map(grid=(9, 9)))
        assert student(pixels(SIDE))[0].shape == (2, 1, 12)


def test_unequal_grids_are_resampled_where_asked() -> None:
    student = made(recipe(grid="bilinear"), Map(grid=(2, 2)))
    values = pixels(SIDE)
    projected = student.projectors[0].linear(expected_tokens(student, values))
    # Antialiased halving under a triangle of two cells: weights 1, 3, 3, 1 inside, renormalised at the
    # border.
    weights = torch.tensor([[3.0, 3, 1, 0], [0, 1, 3, 3]]) / 7
    patches = projected[:, 1:].unflatten(1, (4, 4))
    expected = torch.einsum("yh,xw,bhwd->byxd", weights, weights, patches).flatten(1, 2)
    assert torch.allclose(student(values)[0][:, 1:], expected, rtol=0, atol=1e-5)
    assert torch.allclose(student(values)[0][:, :1], projected[:, :1], rtol=0, atol=1e-6)


def test_mean_and_std_survive_a_cast() -> None:
    student = made(recipe()).bfloat16()
    seen: list[Tensor] = []
    student.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    values = pixels(SIDE)
    (tokens,) = student(values)
    assert tokens.dtype == torch.bfloat16
    exact = normalise(values, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), torch.float32)
    assert torch.equal(seen[0], exact.bfloat16())
    assert not any("mean" in name or "std" in name for name in student.state_dict())


@torch.no_grad()
def moved(
    parameters: Iterable[Tensor], way: list[Tensor], step: float, value: Callable[[], Tensor]
) -> Tensor:
    """A value with the parameters a step further, which are then put back."""
    before = [parameter.clone() for parameter in parameters]
    for parameter, direction in zip(parameters, way, strict=True):
        parameter.add_(direction, alpha=step)
    found = value()
    for parameter, old in zip(parameters, before, strict=True):
        parameter.copy_(old)
    return found


@pytest.mark.parametrize("normaliser", ["mean", "weighted_mean"])
def test_gradients_of_the_whole_chain_against_the_reference(normaliser: Any) -> None:
    """uint8 pixels to every gradient, in float64, with a fixed teacher and one invalid image."""
    asked = recipe(normaliser=normaliser, cls_weight=10.0, beta=0.5)
    student = made(asked).double()
    values, valid = pixels(SIDE, batch=3), torch.tensor([True, False, True])
    taught = torch.randn(3, 17, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3 + 1

    def loss_of() -> Tensor:
        return Objective(asked.objective)(student(values), [taught], valid)

    loss = loss_of()
    loss.backward()

    tokens = student.backbone(normalise(values, student.mean, student.std, torch.float64))
    linear = student.projectors[0].linear
    weight = np.ones((3, 17))
    weight[:, 0] = 10
    if normaliser == "weighted_mean":
        weight *= 17 / weight.sum(1, keepdims=True)
    weight[1] = 0
    answer = reference.projected(
        tokens.detach().numpy(),
        linear.weight.detach().numpy(),
        linear.bias.detach().numpy(),
        taught.numpy(),
        beta=0.5,
        token_weight=weight,
    )
    assert loss.item() == pytest.approx(answer.loss, rel=1e-12)
    # Summation order in float64: 1e-15 seen, relative to the largest entry.
    assert np.allclose(linear.weight.grad, answer.weight, rtol=0, atol=1e-12 * np.abs(answer.weight).max())
    assert np.allclose(linear.bias.grad, answer.bias, rtol=0, atol=1e-12 * np.abs(answer.bias).max())

    named = dict(student.backbone.named_parameters())
    through = torch.autograd.grad(tokens, list(named.values()), torch.from_numpy(answer.student))
    for (name, parameter), expected in zip(named.items(), through, strict=True):
        assert torch.allclose(parameter.grad, expected, rtol=0, atol=1e-12 * float(expected.abs().max())), (
            name
        )

    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        way = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in named.values()]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(named.values(), way, strict=True))
        sides = [float(moved(named.values(), way, step, loss_of)) for step in (1e-6, -1e-6)]
        # Central differences: the step's square times the third derivative, and rounding over the step.
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", ["own vit", "own swinv2", "vit", "swin"])
def test_recomputed_activations_change_no_gradient(name: str) -> None:
    changes, has_class_token = FAMILIES[name]
    asked = recipe({**changes, "drop_path": 0.0}, cls="match" if has_class_token else "drop", grid="bilinear")
    gradients = []
    for enable in (False, True):
        student = made(asked).train()
        student.set_grad_checkpointing(enable)
        student(pixels(asked.student.input_size))[0].square().mean().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][parameter], rtol=1e-5, atol=1e-7), parameter


@pytest.mark.parametrize(
    ("name", "granularity", "said"),
    [
        ("vit", {"every": 2}, "recomputes all of its blocks or none, not {'every': 2}"),
        ("own vit", {"stages": [0]}, "recomputes all of its blocks or none, not {'stages': [0]}"),
        ("own swinv2", {"stages": [9]}, "activation_checkpointing in the scale file"),
    ],
)
def test_a_granularity_that_the_backbone_does_not_know(name: str, granularity: Any, said: str) -> None:
    changes, has_class_token = FAMILIES[name]
    student = made(recipe(changes, cls="match" if has_class_token else "drop", grid="bilinear"))
    with pytest.raises(RecipeError, match=re.escape(said)):
        student.set_grad_checkpointing(True, **granularity)


def test_a_backbone_that_cannot_recompute() -> None:
    form = timm_maps.MapForm("tokens", (4, 4), 0, False, 3)
    student = Student(nn.Linear(1, 1), form, [], input_size=SIDE, objective=recipes.Objective())
    student.set_grad_checkpointing(False)
    with pytest.raises(RecipeError, match="set activation_checkpointing to false in the scale file"):
        student.set_grad_checkpointing(True)


@pytest.mark.parametrize("name", ["own vit", "vit", "relative positions", "swin", "convnext"])
@torch.no_grad()
def test_exported_weights_load_in_timm(name: str, tmp_path: Path) -> None:
    changes, has_class_token = FAMILIES[name]
    asked = recipe(changes, cls="match" if has_class_token else "drop", grid="bilinear")
    student = made(asked)
    path = saved(student.backbone.state_dict(), tmp_path / "student.safetensors")
    how = loading_recipe(asked)
    assert how["library"] == "timm"
    network = timm.create_model(how["architecture"], checkpoint_path=str(path), **how["arguments"]).eval()
    values = torch.randn(2, 3, asked.student.input_size, asked.student.input_size)
    # One implementation of attention against another: 2.4e-7 seen.
    assert torch.allclose(network(values), student.backbone.eval()(values), rtol=0, atol=3e-5)


def test_a_student_begins_with_the_weights_that_it_is_given(tmp_path: Path) -> None:
    giver, student = made(recipe()), made(recipe())
    shaken(giver)
    before = {name: value.clone() for name, value in student.projectors.state_dict().items()}
    path = saved(giver.backbone.state_dict(), tmp_path / "giver.safetensors")
    begin(student, recipe().student)
    assert not torch.equal(student.backbone.norm.weight, giver.backbone.norm.weight)
    begin(student, recipe({"weights": str(path)}).student)
    for name, value in student.backbone.state_dict().items():
        assert torch.equal(value, giver.backbone.state_dict()[name]), name
    # Projectors are the student's own: the giver has none.
    assert all(torch.equal(value, before[name]) for name, value in student.projectors.state_dict().items())


def test_weights_that_a_student_cannot_begin_with(tmp_path: Path) -> None:
    path = saved(made(recipe({"position": "ape"})).backbone.state_dict(), tmp_path / "ape.safetensors")
    words = (
        r"do not fit vit_micro_patch8 \(2 tensors\):\n  pos_embed: \(1, 17, 16\) there, absent in the student"
    )
    with pytest.raises(RecipeError, match=words):
        begin(made(recipe()), recipe({"weights": str(path)}).student)
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(
            RecipeError, match=rf"student.weights='.*{name}' is no readable .safetensors file"
        ):
            begin(made(recipe()), recipe({"weights": str(tmp_path / name)}).student)


def test_exported_weights_load_in_models() -> None:
    changes, _ = FAMILIES["own swinv2"]
    asked = recipe(changes, cls="drop")
    how = loading_recipe(asked)
    assert how == {"library": "models", "architecture": "swinv2_micro", "arguments": {"input_size": 64}}
    backbone = build_backbone(asked.student)
    students.models.create(how["architecture"], **how["arguments"]).load_state_dict(backbone.state_dict())


def test_a_student_without_class_token_learns_the_teachers_by_its_mean() -> None:
    changes, _ = FAMILIES["resnet"]
    student = made(recipe(changes, cls="mean"), Map(grid=(1, 1)))
    tokens = student(pixels(SIDE))[0]
    assert tokens.shape == (2, 2, 12)
    # A map of one patch: its mean is itself.
    assert torch.allclose(tokens[:, 0], tokens[:, 1], rtol=0, atol=1e-6)
