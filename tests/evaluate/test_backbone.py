"""Backbones: teachers, students and exported files give the features that their own networks give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fd_scale.errors import RunError
from fd_scale.evaluate.backbone import of_export, of_student, of_teacher, pool
from fd_scale.objective.features import Features
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.run import recipe as recipes
from fd_scale.student import build_backbone, build_student
from fd_scale.teachers import load

SIDE = 24
SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def recipe(**student: Any) -> recipes.Recipe:
    return recipes.build(
        {
            "name": "trial",
            "student": {
                "architecture": "vit_micro_patch8",
                "input_size": SIDE,
                "drop_path": 0.5,
                "arguments": SMALL,
                **student,
            },
            "teacher": {
                "library": "timm",
                "architecture": "vit_tiny_patch16_224",
                "weights": "random",
                "input_size": SIDE,
                "arguments": {"patch_size": 8, **SMALL},
            },
            "scale": "cpu",
        }
    )


def pixels(count: int = 3, side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(1)).byte()


def normalised(values: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values.float() / 255 - mean) / std


def teacher(side: int = SIDE) -> Any:
    spec = recipe().teacher.model_copy(update={"input_size": side})
    return load(spec, device="cpu", dtype=torch.float32, seed=3)


def shaken(network: torch.nn.Module) -> Any:
    """With weights all different from their start, as LayerScale and biases hide faults there."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def test_a_teacher_is_seen_as_the_student_sees_it():
    taught = teacher()
    backbone = of_teacher(taught)
    expected = taught.features(pixels()).tokens_BND
    assert torch.equal(backbone.tokens(pixels()).tokens_BND, expected)
    pooled = backbone.pooled(pixels())
    assert torch.equal(pooled["cls"], expected[:, 0])
    assert torch.equal(pooled["gap"], expected[:, 1:].mean(1))
    assert (backbone.name, backbone.input_size) == ("vit_tiny_patch16_224", SIDE)
    assert backbone.fingerprint["sha256"] == taught.fingerprint["sha256"]


@pytest.mark.parametrize("training", [True, False])
def test_a_student_in_training_is_seen_without_dropped_paths_or_projector(training):
    student = shaken(build_student(recipe(), [teacher()])).train(training)
    backbone = of_student(student)
    seen = backbone.tokens(pixels())
    assert not seen.tokens_BND.requires_grad
    assert all(module.training is training for module in student.modules())
    with torch.no_grad():
        expected = student.eval().backbone(normalised(pixels()))
    # The same arithmetic in another order of operations on pixels; worst seen 1e-6.
    torch.testing.assert_close(seen.tokens_BND, expected, rtol=0, atol=1e-5)
    assert (seen.grid, seen.num_prefix_tokens) == ((3, 3), 1)


def test_a_timm_student_without_class_token_has_mean_patches_alone():
    swin = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 3}
    asked = recipe(
        architecture="timm:swin_tiny_patch4_window7_224",
        position=None,
        layer_scale=None,
        drop_path=0.0,
        arguments=swin,
    )
    asked = recipes.derive(asked, **{"objective.cls": "drop"})
    student = shaken(build_student(asked, [teacher()]))
    backbone = of_student(student)
    with torch.no_grad():
        map_BHWD = student.eval().backbone(normalised(pixels()))
    assert backbone.pooled(pixels()).keys() == {"gap"}
    expected = map_BHWD.mean((1, 2))
    torch.testing.assert_close(backbone.pooled(pixels())["gap"], expected, rtol=0, atol=1e-5)


def test_an_exported_file_is_seen_like_the_student_in_it(tmp_path):
    asked = recipe()
    network = shaken(build_backbone(asked.student)).eval()
    weights = tmp_path / "step-00000007.safetensors"
    save_file(network.state_dict(), weights, metadata={"student": asked.student.model_dump_json()})
    backbone = of_export(weights)
    with torch.no_grad():
        expected = network(normalised(pixels()))
    torch.testing.assert_close(backbone.tokens(pixels()).tokens_BND, expected, rtol=0, atol=1e-5)
    assert (backbone.name, backbone.input_size) == ("step-00000007", SIDE)
    assert of_export(weights, name="mine").name == "mine"


def test_fingerprints_tell_networks_apart(tmp_path):
    student = build_student(recipe(), [teacher()])
    before = of_student(student).fingerprint
    assert before == of_student(student).fingerprint
    assert before["sha256"] != of_student(shaken(student)).fingerprint["sha256"]


def test_registers_have_no_part_in_pooling():
    tokens = torch.arange(2.0 * 7 * 1).view(2, 7, 1)
    pooled = pool(Features(tokens, (2, 2), 3))
    assert pooled["cls"].flatten().tolist() == [0.0, 7.0]
    assert pooled["gap"].flatten().tolist() == [4.5, 11.5]
    assert pool(Features(tokens[:, 3:], (2, 2), 0)).keys() == {"gap"}


def test_what_cannot_be_seen_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"\(3, 3, 16, 16\) reached vit_tiny_patch16_224, which takes 24 x 24"
    ):
        of_teacher(teacher()).tokens(pixels(side=16))
    with pytest.raises(RunError, match="does not exist"):
        of_export(Path("nowhere.safetensors"))
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(1)}, foreign)
    with pytest.raises(RunError, match="was not exported by fd_scale"):
        of_export(foreign)
    foreign.write_bytes(b"garbage")
    with pytest.raises(RunError, match=r"foreign\.safetensors cannot be read: .*header"):
        of_export(foreign)
