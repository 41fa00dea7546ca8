"""The catalogue: what a name builds, and how a wrong name or argument is answered."""

from __future__ import annotations

import pytest
import torch

import models
from models import ModelError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_micro_patch8", (128, 4, 4, 8)),
        ("vit_tiny_patch16", (192, 12, 3, 16)),
        ("vit_small_patch16", (384, 12, 6, 16)),
        ("vit_base_patch32", (768, 12, 12, 32)),
        ("vit_base_patch16", (768, 12, 12, 16)),
        ("vit_base_patch8", (768, 12, 12, 8)),
        ("vit_large_patch16", (1024, 24, 16, 16)),
        ("vit_large_patch14", (1024, 24, 16, 14)),
    ],
)
def test_a_vit_has_its_published_sizes(name, expected):
    with torch.device("meta"):
        model = models.create(name)
    assert (model.embed_dim, len(model.blocks), model.num_heads, model.patch_size) == expected
    assert model.input_size == 224
    assert model.grid == (224 // expected[3], 224 // expected[3])


@pytest.mark.parametrize("name", ["vit_micro_patch8", "swinv2_micro"])
def test_both_families_keep_the_contract(name):
    model = models.create(name, input_size=64, drop_path=0.1)
    tokens = model(torch.zeros(2, 3, 64, 64))
    assert tokens.shape == (2, model.num_prefix_tokens + model.grid[0] * model.grid[1], model.embed_dim)
    assert model.grid == (64 // model.patch_size, 64 // model.patch_size)
    assert model.input_size == 64
    model.set_grad_checkpointing(True)
    model.set_grad_checkpointing(enable=False)
    parameters = {parameter for parameter, _ in model.named_parameters()}
    assert model.no_weight_decay() <= parameters
    assert model.position_parameters() <= parameters


def test_names_are_the_catalogues():
    assert models.names() == list(models.CATALOGUE)
    assert len(set(models.names())) == len(models.names())


def test_changes_reach_the_network():
    model = models.create(
        "vit_micro_patch8",
        input_size=32,
        drop_path=0.2,
        depth=2,
        embed_dim=60,
        num_heads=5,
        mlp_ratio=2,
        patch_size=16,
        position="ape",
        layer_scale=None,
    )
    assert (model.embed_dim, len(model.blocks), model.num_heads, model.grid) == (60, 2, 5, (2, 2))
    assert model.blocks[0].mlp.fc1.out_features == 120
    assert model.blocks[1].drop_path2.drop_prob == pytest.approx(0.2)
    assert model.blocks[0].gamma_1 is None
    assert model.pos_embed.shape == (1, 5, 60)


def test_a_seed_decides_the_weights():
    def build(seed):
        torch.manual_seed(seed)
        return models.create("vit_micro_patch8", input_size=32, depth=1).state_dict()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_an_unknown_name_is_answered_with_near_misses_and_all_names():
    with pytest.raises(
        ModelError, match=r"unknown model 'vit_bas_patch16'; did you mean vit_base_patch16, .*vit_large"
    ):
        models.create("vit_bas_patch16")
    with pytest.raises(ModelError, match=r"unknown model 'zzz' \(models: vit_micro_patch8, "):
        models.create("zzz")


def test_an_unknown_argument_is_answered_with_the_valid_ones():
    with pytest.raises(
        ModelError, match=r"vit_base_patch16 takes no argument 'dept'; did you mean depth\?"
    ) as caught:
        models.create("vit_base_patch16", dept=3)
    assert "its arguments: patch_size, embed_dim, depth, num_heads, mlp_ratio, position" in str(caught.value)
    assert "ops" not in str(caught.value)


def test_an_impossible_argument_is_a_model_error():
    assert issubclass(ModelError, ValueError)
    with pytest.raises(
        ModelError, match="input_size=225 is not a multiple of patch_size=16: 224 or 240 would be"
    ):
        models.create("vit_base_patch16", input_size=225)
