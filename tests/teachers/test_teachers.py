"""What holds for every teacher: frozen, recorded, reproducible; the front door; guests; own architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import models
from fd_scale.errors import RecipeError, TeacherError
from fd_scale.objective.features import Features
from fd_scale.run import recipe as recipes
from fd_scale.teachers import Guest, difference
from fd_scale.teachers.fingerprint import digest
from tests.teachers.tiny import CLIP_VISION, VIT, as_upstream, loaded, pixels, saved, shaken, spec

SIDE = 32
LIBRARIES = {
    "timm": spec("deit_base_patch16_224", input_size=SIDE, arguments=VIT),
    "open_clip": spec("ViT-B-16-quickgelu", library="open_clip", input_size=SIDE, arguments=CLIP_VISION),
    "models": spec("vit_micro_patch8", library="models", input_size=SIDE, arguments={"embed_dim": 16}),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_frozen(library: str) -> None:
    teacher = loaded(LIBRARIES[library])
    assert not any(p.requires_grad for p in teacher.network.parameters())
    assert not any(module.training for module in teacher.network.modules())
    features = teacher.features(pixels(SIDE))
    assert not features.tokens_BND.requires_grad
    assert not features.tokens_BND.is_inference()


@pytest.mark.parametrize("library", LIBRARIES)
def test_random_weights_follow_the_seed_alone(library: str) -> None:
    torch.manual_seed(0)
    first = loaded(LIBRARIES[library], seed=3)
    torch.manual_seed(1)
    again, other = loaded(LIBRARIES[library], seed=3), loaded(LIBRARIES[library], seed=4)
    values = pixels(SIDE)
    assert torch.equal(first.features(values).tokens_BND, again.features(values).tokens_BND)
    assert first.fingerprint == again.fingerprint
    assert [line[:21] for line in difference(first.fingerprint, other.fingerprint)] == [
        "the weights themselve"
    ]


def test_pixels_must_be_of_the_teachers_size() -> None:
    teacher = loaded(LIBRARIES["timm"])
    with pytest.raises(ValueError, match="reached teacher deit_base_patch16_224, which takes 32 x 32"):
        teacher.features(pixels(48))
    with pytest.raises(ValueError, match="are not uint8"):
        teacher.features(pixels(SIDE).float())


@torch.no_grad()
def test_own_architectures_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = shaken(models.create("vit_micro_patch8", input_size=SIDE, embed_dim=16))
    head = {"head.weight": torch.ones(3, 16)}
    path = saved({**network.state_dict(), **head}, tmp_path / "vit.safetensors")
    teacher = loaded(spec("vit_micro_patch8", path, "models", input_size=SIDE, arguments={"embed_dim": 16}))
    values = pixels(SIDE)
    expected = network(as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(teacher.features(values).tokens_BND, expected, rtol=0, atol=1e-5)
    assert (teacher.grid, teacher.num_prefix_tokens, teacher.width) == ((4, 4), 1, 16)
    assert teacher.mean == (0.485, 0.456, 0.406)
    assert teacher.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("library", ["timm", "models"])
@torch.no_grad()
def test_the_map_before_the_final_norm(library: str) -> None:
    """A LayerNorm of it, with the norm's own scale and shift, is the map after."""
    asked = LIBRARIES[library]
    after, before = loaded(asked), loaded(asked.model_copy(update={"final_norm": False}))
    norm = after.network.norm
    norm.weight.mul_(1.5)
    norm.bias.add_(0.25)
    values = pixels(SIDE)
    bare = before.features(values).tokens_BND
    expected = after.features(values).tokens_BND
    # The same float32 operations in another place: equal here.
    assert torch.allclose(norm(bare), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(bare, expected, atol=0.1)
    told, weights = difference(after.fingerprint, before.fingerprint)
    assert (
        told == "feature_point was 'last map after norm on all tokens', now 'last map before its final norm'"
    )
    assert weights.startswith("the weights themselves")  # those of the norm are gone


def test_a_network_without_a_final_norm_has_none_to_take_off() -> None:
    asked = spec("resnet18", input_size=SIDE, final_norm=False)
    with pytest.raises(TeacherError, match="ResNet has no final norm to take off"):
        loaded(asked)


@pytest.mark.parametrize("library", ["timm", "models"])
def test_a_teacher_that_drops_paths(library: str) -> None:
    """Two calls differ, by stochastic depth alone; a record tells such a teacher from the steady one."""
    asked = LIBRARIES[library]
    steady, dropping = loaded(asked), loaded(asked.model_copy(update={"drop_path": 0.5}))
    values = pixels(SIDE)
    torch.manual_seed(0)
    first, second = (dropping.features(values).tokens_BND for _ in range(2))
    assert not torch.equal(first, second)
    assert {type(m).__name__ for m in dropping.network.modules() if m.training} == {"DropPath"}
    assert difference(steady.fingerprint, dropping.fingerprint) == ["drop_path was None, now 0.5"]
    assert "drop_path" not in steady.fingerprint


def test_open_clip_keeps_norm_and_paths() -> None:
    for changes in ({"final_norm": False}, {"drop_path": 0.1}):
        with pytest.raises(TeacherError, match="are not for open_clip: name the same network in timm"):
            loaded(LIBRARIES["open_clip"].model_copy(update=changes))


@torch.no_grad()
def test_own_swinv2_takes_microsofts_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = shaken(models.create("swinv2_micro", input_size=64))
    published = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        published[".".join(parts)] = tensor
    torch.save({"model": {**published, "head.weight": torch.ones(2, 2)}}, tmp_path / "swin.pth")
    teacher = loaded(spec("swinv2_micro", tmp_path / "swin.pth", "models", input_size=64))
    values = pixels(64)
    expected = network(as_upstream(values, teacher.mean, teacher.std))
    assert torch.allclose(teacher.features(values).tokens_BND, expected, rtol=0, atol=1e-5)


def test_own_architectures_have_no_hub_and_near_misses() -> None:
    with pytest.raises(TeacherError, match="neither a local file nor 'random'"):
        loaded(spec("vit_micro_patch8", "openai", "models"))
    with pytest.raises(TeacherError, match="unknown model 'vit_mikro_patch8'; did you mean vit_micro_patch8"):
        loaded(spec("vit_mikro_patch8", library="models"))


def test_fingerprint_holds_what_decides_a_feature() -> None:
    teacher = loaded(LIBRARIES["timm"])
    record = teacher.fingerprint
    assert json.loads(json.dumps(record)) == record
    assert record == {
        "library": "timm",
        "architecture": "deit_base_patch16_224",
        "arguments": VIT,
        "weights": "random",
        "feature_point": "last map after norm on all tokens",
        "input_size": SIDE,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "sha256": digest(teacher.network.state_dict()),
    }


def test_digest_sees_names_shapes_dtypes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.arange(12.0)[:6].clone()}
    assert digest(base) == digest(same)
    strided = torch.stack((torch.arange(6.0), torch.zeros(6)), dim=1)[:, 0]
    assert digest({**base, "a": strided}) == digest(base)
    others = [
        {**base, "a": torch.arange(6.0).view(2, 3)},
        {**base, "a": torch.arange(6.0).double()},
        {**base, "b": torch.tensor(2)},
        {"c": base["a"], "b": base["b"]},
        {**base, "e": torch.empty(0)},
        {**base, "a": torch.arange(6.0).bfloat16()},
    ]
    assert len({digest(other) for other in [base, *others]}) == len(others) + 1


def test_difference_says_what_differs() -> None:
    record = loaded(LIBRARIES["timm"]).fingerprint
    assert difference(record, json.loads(json.dumps(record))) == []
    assert difference(record, {**record, "weights": "renamed.pth"}) == []
    changed = {
        **record,
        "architecture": "vit",
        "mean": [0.5, 0.5, 0.5],
        "sha256": "0" * 64,
        "weights": "b.pth",
    }
    lines = difference(record, changed)
    assert lines == [
        "architecture was 'deit_base_patch16_224', now 'vit'",
        "mean was [0.485, 0.456, 0.406], now [0.5, 0.5, 0.5]",
        f"the weights themselves (sha256 {record['sha256'][:12]} of 'random', now 000000000000 of 'b.pth')",
    ]
    del changed["std"]
    assert any(
        line.startswith("std was [0.229, 0.224, 0.225], now None") for line in difference(record, changed)
    )


class Scripted:
    """A teacher whose map is given."""

    def __init__(self, tokens_BND: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> None:
        self.map = Features(tokens_BND, grid, num_prefix_tokens)
        self.name, self.input_size = "scripted", SIDE
        self.num_prefix_tokens = num_prefix_tokens
        self.seen: list[Tensor] = []

    def features(self, values: Tensor) -> Features:
        self.seen.append(values)
        assert not torch.is_grad_enabled()
        return self.map


@pytest.mark.parametrize(
    ("granularity", "cls", "expected"),
    [
        ("full", "match", [0, 3, 4, 5, 6]),
        ("full", "mean", [0, 3, 4, 5, 6]),
        ("full", "drop", [3, 4, 5, 6]),
        ("cls", "match", [0]),
        ("gap", "match", [4.5]),
    ],
)
def test_guest_gives_the_tokens_that_are_regressed(granularity: Any, cls: Any, expected: list[float]) -> None:
    teacher: Any = Scripted(torch.arange(7.0).view(1, 7, 1), (2, 2), 3)
    guest = Guest(teacher, recipes.Objective(granularity=granularity, cls=cls))
    views = {SIDE: pixels(SIDE), 48: pixels(48)}
    assert guest(views)[0, :, 0].tolist() == expected
    assert teacher.seen[0] is views[SIDE]


def test_guest_does_not_whiten() -> None:
    teacher = loaded(LIBRARIES["timm"])
    guest = Guest(teacher, recipes.Objective())
    values = pixels(SIDE)
    assert torch.equal(guest({SIDE: values}), teacher.features(values).tokens_BND)


def test_guest_without_the_view_or_the_class_token() -> None:
    teacher: Any = Scripted(torch.zeros(1, 4, 2), (2, 2), 0)
    for granularity, cls in (("full", "match"), ("full", "mean"), ("cls", "match")):
        with pytest.raises(RecipeError, match=r"scripted has none: set objective.cls=drop"):
            Guest(teacher, recipes.Objective(granularity=granularity, cls=cls))  # type: ignore[arg-type]
    guest = Guest(teacher, recipes.Objective(cls="drop"))
    with pytest.raises(ValueError, match="teacher scripted takes 32 px, the batch holds 48, 64"):
        guest({64: pixels(64), 48: pixels(48)})


def test_a_library_is_imported_when_it_is_asked_for() -> None:
    import subprocess
    import sys

    program = "import sys, fd_scale.teachers; print(any(m.startswith('open_clip') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@torch.no_grad()
def test_a_networks_own_size_is_taken_without_input_size() -> None:
    name = "test_vit"
    teacher = loaded(spec(name))
    assert teacher.input_size == timm.get_pretrained_cfg(name).input_size[-1]
