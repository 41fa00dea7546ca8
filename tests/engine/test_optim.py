"""Which parameters are decayed, against lists written by hand from the released code's rule."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import models
from fd_scale.engine.optim import parameter_groups

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)}


class Wrapped(nn.Module):
    """A backbone and a projector, named as a student's are."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projectors = nn.ModuleList([nn.Linear(4, 3)])


def split(model: nn.Module, decay_position: bool = True) -> tuple[set[str], set[str]]:
    """Names that are decayed and names that are not."""
    groups = parameter_groups(model, weight_decay=0.05, decay_position=decay_position)
    by_name = {group["name"]: set(group["names"]) for group in groups}
    return by_name.get("decay", set()), by_name.get("no_decay", set())


BLOCK_PRODUCTS = {f"backbone.blocks.0.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
SHARED_TABLE = "backbone.rel_pos_bias.relative_position_bias_table"


def test_own_vit_by_hand() -> None:
    model = Wrapped(models.create("vit_micro_patch8", input_size=16, **SMALL))
    decayed, kept = split(model)
    assert decayed == {
        *BLOCK_PRODUCTS,
        "backbone.patch_embed.proj.weight",
        SHARED_TABLE,
        "projectors.0.weight",
    }
    assert {"backbone.cls_token", "backbone.blocks.0.gamma_1", "backbone.blocks.0.attn.q_bias"} <= kept
    assert decayed | kept == {name for name, _ in model.named_parameters()}


def test_the_table_is_the_recipes_choice() -> None:
    for position, table in (
        ("shared_rpb", SHARED_TABLE),
        ("rpb", "backbone.blocks.0.attn.relative_position_bias_table"),
    ):
        model = Wrapped(models.create("vit_micro_patch8", input_size=16, position=position, **SMALL))
        assert table in split(model, decay_position=True)[0]
        assert table in split(model, decay_position=False)[1]


def test_absolute_positions_are_never_decayed() -> None:
    model = Wrapped(models.create("vit_micro_patch8", input_size=16, position="ape", **SMALL))
    assert "backbone.pos_embed" in split(model)[1]


@pytest.mark.parametrize("decay_position", [True, False])
def test_own_swinv2_by_hand(decay_position: bool) -> None:
    model = Wrapped(models.create("swinv2_micro", input_size=64))
    decayed, kept = split(model, decay_position)
    cpb = {n for n, _ in model.named_parameters() if "cpb_mlp" in n or "logit_scale" in n}
    assert len(cpb) == 6 * 4
    assert cpb <= kept
    blocks = {n for n in decayed if ".blocks." in n}
    assert {n.split(".blocks.0.")[-1] for n in blocks if n.startswith("backbone.layers.0.")} == {
        f"{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert decayed - blocks == {
        "backbone.patch_embed.proj.weight",
        *(f"backbone.layers.{n}.downsample.reduction.weight" for n in (1, 2, 3)),
        "projectors.0.weight",
    }


@pytest.mark.parametrize("name", ["vit_micro_patch8", "swinv2_micro"])
@pytest.mark.parametrize("decay_position", [True, False])
def test_the_rule_agrees_with_what_own_architectures_say(name: str, decay_position: bool) -> None:
    backbone: Any = models.create(name, input_size=64)
    decayed, kept = split(backbone, decay_position)
    assert not backbone.no_weight_decay() & decayed
    choice = backbone.position_parameters() - backbone.no_weight_decay()
    assert choice <= (decayed if decay_position else kept)


@pytest.mark.parametrize(
    ("architecture", "arguments", "kept_of_many_dimensions"),
    [
        ("vit_base_patch16_224", {"img_size": 32, **SMALL}, {"cls_token", "pos_embed"}),
        (
            "deit_base_distilled_patch16_224",
            {"img_size": 32, **SMALL},
            {"cls_token", "pos_embed", "dist_token"},
        ),
        ("vit_base_patch14_reg4_dinov2", {"img_size": 28, **SMALL}, {"cls_token", "pos_embed", "reg_token"}),
        ("swin_base_patch4_window7_224", {"img_size": 32, "window_size": 4, **SWIN}, set()),
        (
            "swinv2_base_window12_192",
            {"img_size": 32, "window_size": 4, **SWIN},
            {
                f"layers.{n}.blocks.0.attn.{m}"
                for n in (0, 1)
                for m in ("logit_scale", "cpb_mlp.0.weight", "cpb_mlp.2.weight")
            },
        ),
        ("resnet18", {"channels": (4, 4, 4, 4), "layers": (1, 1, 1, 1)}, set()),
    ],
)
def test_timm_backbones(architecture: str, arguments: Any, kept_of_many_dimensions: set[str]) -> None:
    model = Wrapped(timm.create_model(architecture, num_classes=0, **arguments))
    _, kept = split(model)
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert {n for n in kept if shapes[n] > 1} == {f"backbone.{n}" for n in kept_of_many_dimensions}
    assert {n for n, dimensions in shapes.items() if dimensions <= 1} <= kept


@pytest.mark.parametrize("architecture", ["swin_base_patch4_window7_224", "beit_base_patch16_224"])
def test_timm_tables_follow_the_recipe_and_not_timm(architecture: str) -> None:
    arguments = {**SWIN, "window_size": 4} if "swin" in architecture else SMALL
    model = timm.create_model(architecture, img_size=32, num_classes=0, **arguments)
    tables = {n for n, _ in model.named_parameters() if n.endswith("relative_position_bias_table")}
    assert tables
    assert tables <= split(model, decay_position=True)[0]
    assert tables <= split(model, decay_position=False)[1]


def test_groups_are_what_an_optimizer_takes() -> None:
    model = Wrapped(models.create("vit_micro_patch8", input_size=16, **SMALL))
    groups = parameter_groups(model, weight_decay=0.05, decay_position=True)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("decay", 0.05),
        ("no_decay", 0.0),
    ]
    named = dict(model.named_parameters())
    for group in groups:
        assert all(named[n] is p for n, p in zip(group["names"], group["params"], strict=True))
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    before = {n: p.detach().clone() for n, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in named.items() if not torch.equal(p, before[n])}
    # Without a gradient decay alone moves a weight, and one that starts at zero stays there.
    assert moved == {n for n in groups[0]["names"] if before[n].any()}


def test_frozen_and_absent_parameters() -> None:
    model = Wrapped(nn.Identity())
    model.projectors[0].weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.05, decay_position=True)
    assert [group["names"] for group in groups] == [["projectors.0.bias"]]


def test_sharded_parameters_are_refused() -> None:
    model = nn.Linear(3, 3)
    model.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="weight is empty: group parameters before an engine shards them"):
        parameter_groups(model, weight_decay=0.05, decay_position=True)
