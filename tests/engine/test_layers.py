"""Layer-wise learning rates: every parameter's scale against a table written by hand."""

import pytest
import timm
import torch
from torch import nn

import models
from fd_scale.engine.layers import Layers, layer_groups, layers_of, scales


class Classifier(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)


def found(network: nn.Module, decay: float, **options: bool) -> dict[str, float]:
    module = Classifier(network)
    layers = layers_of(name for name, _ in network.named_parameters())
    groups = layer_groups(
        module,
        backbone="network.",
        layers=layers,
        layer_decay=decay,
        weight_decay=0.05,
        decay_position=True,
        **options,
    )
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in module.parameters()}
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))
    return scales(groups)


def vit(position: str) -> nn.Module:
    return models.create(
        "vit_micro_patch8", input_size=16, embed_dim=4, num_heads=1, depth=3, position=position
    )


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        # Three blocks: layers 0 to 4, so the stem has 0.5 ** 4.
        ("shared_rpb", {"rel_pos_bias.relative_position_bias_table": 1.0}),
        ("rpb", {"blocks.1.attn.relative_position_bias_table": 0.5**2}),
        ("ape", {"pos_embed": 0.5**4}),
    ],
)
def test_a_vit_has_the_scales_of_the_papers(position, expected):
    got = found(vit(position), 0.5)
    by_hand = {
        "cls_token": 0.5**4,
        "patch_embed.proj.weight": 0.5**4,
        "patch_embed.proj.bias": 0.5**4,
        "blocks.0.attn.qkv.weight": 0.5**3,
        "blocks.0.gamma_1": 0.5**3,
        "blocks.1.norm1.bias": 0.5**2,
        "blocks.2.mlp.fc2.weight": 0.5,
        "norm.weight": 1.0,
        **expected,
    }
    for name, value in by_hand.items():
        assert got[f"network.{name}"] == pytest.approx(value, rel=1e-15), name
    assert {got[name] for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")} == {1.0}


def test_fd_base_has_the_scales_that_twelve_blocks_give():
    layers = Layers((12,))
    assert layers.last == 13
    # FD's B recipe: d ** (L + 1 - i).
    assert layers.scale(0, 0.65) == pytest.approx(0.65**13)
    assert layers.scale(layers.of("blocks.11.norm2.weight"), 0.65) == pytest.approx(0.65)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model(
            "swinv2_tiny_window8_256",
            img_size=64,
            embed_dim=8,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=4,
        ),
        lambda: models.create(
            "swinv2_tiny",
            input_size=64,
            width=32,
            depths=(1, 2),
            num_heads=(1, 2),
            window_size=4,
            pretrained_window_sizes=(0, 0),
        ),
    ],
    ids=["timm", "models"],
)
def test_stages_of_a_swin_are_counted_through(make):
    got = found(make(), 0.5)
    named = {
        "patch_embed.proj.weight": 0.5**4,
        "layers.0.blocks.0.mlp.fc1.weight": 0.5**3,
        "layers.1.downsample.reduction.weight": 0.5**3,
        "layers.1.blocks.0.mlp.fc1.weight": 0.5**2,
        "layers.1.blocks.1.mlp.fc1.weight": 0.5,
        "norm.weight": 1.0,
    }
    for name, value in named.items():
        assert got[f"network.{name}"] == value, name


def test_decay_and_floor_are_kept_apart_from_the_scale():
    module = Classifier(vit("rpb"))
    options = {"backbone": "network.", "layers": Layers((3,)), "layer_decay": 0.5, "weight_decay": 0.05}
    groups = layer_groups(module, **options, decay_position=False)
    decays = {name: g["weight_decay"] for g in groups for name in g["names"]}
    assert decays["network.blocks.0.attn.qkv.weight"] == 0.05
    assert decays["network.blocks.0.attn.relative_position_bias_table"] == 0.0
    assert decays["head.bias"] == 0.0
    assert all(g["floor_scale"] == g["lr_scale"] for g in groups)
    released = layer_groups(module, **options, decay_position=False, scaled_floor=False)
    assert {g["floor_scale"] for g in released} == {1.0}


def test_frozen_parameters_are_in_no_group():
    module = Classifier(vit("ape"))
    module.network.patch_embed.requires_grad_(False)
    groups = layer_groups(
        module, backbone="network.", layers=Layers((3,)), layer_decay=0.9, weight_decay=0, decay_position=True
    )
    assert not any("patch_embed" in name for g in groups for name in g["names"])
    assert isinstance(groups[0]["params"][0], torch.nn.Parameter)
