"""The ViT against timm's ``Beit`` with the same weights; what timm lacks against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from models import ModelError
from models.vit import POSITIONS, VisionTransformer, export_hint, unshare

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 2.5, "input_size": 40}
"""A 5 x 5 grid: odd, and neither width a power of two."""
ONE_PATCH = {"patch_size": 14, "embed_dim": 10, "depth": 1, "num_heads": 1, "input_size": 14}


def vit(position: str = "shared_rpb", *, sizes: dict = SMALL, seed: int = 0, **changes) -> VisionTransformer:
    """A small ViT whose every parameter is random: tables that start at zero would hide mistakes."""
    torch.manual_seed(seed)
    model = VisionTransformer(position=position, **{**sizes, **changes})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.startswith("norm") or ".norm" in name else 0.0
            parameter.normal_(centre, 0.3)
    return model


def pixels(model: VisionTransformer, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, model.input_size, model.input_size, generator=generator)


def timm_twin(model: VisionTransformer) -> nn.Module:
    hint = export_hint(model)
    twin = timm.create_model(hint["architecture"], **hint["arguments"])
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin


def loss_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, a loss that depends on every token in its own way, and all gradients."""
    model.zero_grad()
    tokens = model(images)
    weight = torch.linspace(-1, 1, tokens[0].numel(), dtype=tokens.dtype).view_as(tokens[0]).sin()
    loss = (tokens * weight).square().mean()
    loss.backward()
    return tokens.detach(), loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


# The same network as timm's.


@pytest.mark.parametrize("layer_scale", [0.1, None])
@pytest.mark.parametrize("sizes", [SMALL, ONE_PATCH], ids=["small", "one_patch"])
@pytest.mark.parametrize("position", POSITIONS)
def test_tokens_and_gradients_are_timms(position, sizes, layer_scale):
    model = vit(position, sizes=sizes, layer_scale=layer_scale)
    for dtype, tolerance in (
        (torch.float64, 1e-13),  # The same sums in another order, of values up to 6.6. Seen: 3.7e-15.
        (torch.float32, 1e-5),  # The same. Seen: 2.3e-6.
    ):
        ours = loss_and_gradients(model.to(dtype), pixels(model).to(dtype))
        theirs = loss_and_gradients(timm_twin(model).to(dtype), pixels(model).to(dtype))
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("position", POSITIONS)
def test_tokens_are_timms_to_1e_5_as_initialised(position):
    torch.manual_seed(0)
    model = models.create("vit_micro_patch8", input_size=64, position=position).eval()
    images = pixels(model)
    with torch.no_grad():
        # Normalised tokens are of size 1; float32 through 4 blocks. Seen: 3.6e-7.
        torch.testing.assert_close(model(images), timm_twin(model)(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("vit_micro_patch8", {"input_size": 64}), ("vit_small_patch16", {"depth": 2, "input_size": 112})],
)
@pytest.mark.parametrize("layer_scale", [0.1, None])
@pytest.mark.parametrize("position", POSITIONS)
def test_timm_loads_our_file_by_the_hint(position, layer_scale, name, changes, tmp_path):
    model = models.create(name, position=position, layer_scale=layer_scale, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    save_file(model.state_dict(), tmp_path / "student.safetensors")
    hint = export_hint(model)
    loaded = timm.create_model(
        hint["architecture"], checkpoint_path=str(tmp_path / "student.safetensors"), **hint["arguments"]
    ).eval()
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        # Tokens of up to 4.6 in float32. Seen: 1.9e-6.
        torch.testing.assert_close(loaded(pixels(model)), model(pixels(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_state_dict_goes_round_strictly(position):
    model, other = vit(position), vit(position, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(pixels(model)), other(pixels(other)))


@pytest.mark.parametrize(("have", "want"), list(itertools.permutations(POSITIONS, 2)))
def test_weights_of_another_position_are_refused(have, want):
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        vit(want).load_state_dict(vit(have).state_dict())


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        ("vit_base_patch16", "shared_rpb", 85_665_360),
        ("vit_large_patch14", "shared_rpb", 302_955_584),
        # A table of 732 rows and 12 heads for each of the other 11 blocks.
        ("vit_base_patch16", "rpb", 85_665_360 + 11 * 732 * 12),
        ("vit_base_patch16", "ape", 85_665_360 - 732 * 12 + 197 * 768),
    ],
)
def test_parameters_are_as_many_as_published(name, position, expected):
    with torch.device("meta"):
        model = models.create(name, position=position)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", ["vit_micro_patch8", "vit_base_patch32", "vit_large_patch14"])
def test_sizes_of_the_catalogue_have_timms_names_and_shapes(name):
    with torch.device("meta"):
        model = models.create(name)
        hint = export_hint(model)
        twin = timm.create_model(hint["architecture"], **hint["arguments"])
    assert [(key, value.shape) for key, value in model.state_dict().items()] == [
        (key, value.shape) for key, value in twin.state_dict().items()
    ]


# Initialisation.


def test_initial_weights_have_the_released_codes_statistics():
    torch.manual_seed(0)
    model = models.create("vit_tiny_patch16", position="ape")
    # The standard deviation of a standard normal cut at one: sqrt(1 - 2 phi(1) / (2 Phi(1) - 1)) = 0.5396.
    density, mass = math.exp(-0.5) / math.sqrt(2 * math.pi), math.erf(math.sqrt(0.5))
    std = 0.02 * math.sqrt(1 - 2 * density / mass)
    assert std == pytest.approx(0.01078, abs=2e-5)
    weights = dict(model.named_parameters())
    drawn = dict.fromkeys(("patch_embed.proj.weight", "cls_token", "pos_embed"), 1.0)
    for layer in range(1, 13):
        prefix = f"blocks.{layer - 1}"
        drawn |= {f"{prefix}.attn.qkv.weight": 1.0, f"{prefix}.mlp.fc1.weight": 1.0}
        shrunk = 1 / math.sqrt(2 * layer)
        drawn |= {f"{prefix}.attn.proj.weight": shrunk, f"{prefix}.mlp.fc2.weight": shrunk}
    for name, factor in drawn.items():
        weight = weights.pop(name).detach() / factor
        # The std of n such values varies by 0.485 / sqrt(n) of itself (kurtosis 1.94); five of it. Seen: 2.5.
        assert weight.std().item() == pytest.approx(std, rel=5 * 0.485 / math.sqrt(weight.numel())), name
        assert weight.abs().max() <= 0.02 * (1 + 1e-6), name
        assert weight.abs().max() > 0.018, name
    for name, parameter in weights.items():
        constant = 0.1 if "gamma" in name else 1.0 if name.endswith("weight") else 0.0
        assert (parameter == constant).all(), name


@pytest.mark.parametrize("position", ["shared_rpb", "rpb"])
def test_tables_start_at_zero(position):
    torch.manual_seed(0)
    model = VisionTransformer(position=position, **SMALL)
    tables = [dict(model.named_parameters())[name] for name in model.position_parameters()]
    assert len(tables) == (1 if position == "shared_rpb" else 3)
    assert all(table.shape == (84, 3) and not table.any() for table in tables)


def test_layer_scale_is_the_given_value_or_absent():
    assert (VisionTransformer(layer_scale=0.25, **SMALL).blocks[1].gamma_2 == 0.25).all()
    assert not any("gamma" in name for name in VisionTransformer(layer_scale=None, **SMALL).state_dict())


# Un-sharing, precision, parameter names.


def test_unshared_tables_compute_the_same_and_are_independent():
    model = vit("shared_rpb")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    unshared = vit("rpb", seed=1)
    weights = unshare(model.state_dict())
    unshared.load_state_dict(weights, strict=True)
    # The same operations on the same numbers.
    assert torch.equal(unshared(pixels(model)), model(pixels(model)))
    weights["blocks.0.attn.relative_position_bias_table"].add_(1)
    assert not torch.equal(
        weights["blocks.0.attn.relative_position_bias_table"],
        weights["blocks.1.attn.relative_position_bias_table"],
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("position", ["rpb", "ape"])
def test_there_must_be_a_table_to_unshare(position):
    with pytest.raises(ModelError, match=r"hold no 'rel_pos_bias\.relative_position_bias_table'"):
        unshare(vit(position).state_dict())


@pytest.mark.parametrize("position", POSITIONS)
def test_bfloat16_stays_near_float64(position):
    model = vit(position).eval()
    images = pixels(model)
    exact = model.double()(images.double())
    half = model.bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    # Root mean square; tokens of 1.5 after 3 blocks of 8-bit roundings, weights included. Seen: 0.011.
    assert (half.double() - exact).square().mean().sqrt() < 0.03


@pytest.mark.parametrize("position", POSITIONS)
def test_parameters_without_decay_are_the_papers(position):
    model = vit(position)
    decayed = set(dict(model.named_parameters())) - model.no_weight_decay() - model.position_parameters()
    kinds = {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in decayed}
    assert kinds == {
        "patch_embed.proj.weight",
        "attn.qkv.weight",
        "attn.proj.weight",
        "mlp.fc1.weight",
        "mlp.fc2.weight",
    }
    assert ("pos_embed" in model.no_weight_decay()) == (position == "ape")
    assert {"cls_token", "norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"} <= model.no_weight_decay()
    tables = {
        "shared_rpb": {"rel_pos_bias.relative_position_bias_table"},
        "rpb": {f"blocks.{block}.attn.relative_position_bias_table" for block in range(3)},
        "ape": set(),
    }
    assert model.position_parameters() == tables[position]


def test_a_model_says_what_it_is():
    model = VisionTransformer(**SMALL)
    assert (model.embed_dim, model.grid, model.num_prefix_tokens) == (48, (5, 5), 1)
    assert (model.input_size, model.patch_size) == (40, 8)
    assert model(torch.zeros(2, 3, 40, 40)).shape == (2, 26, 48)


# Impossible arguments.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 100}, r"input_size=100 is not a multiple of patch_size=8: 96 or 104 would be"),
        ({"input_size": 4}, r"input_size=4 is not a multiple of patch_size=8: 8 would be"),
        (
            {"num_heads": 5},
            r"num_heads=5 does not divide embed_dim=48; these do: 1, 2, 3, 4, 6, 8, 12, 16, 24, 48",
        ),
        ({"drop_path": 1.0}, r"drop_path=1\.0 must be a rate of at least 0 and below 1"),
        ({"drop_path": -0.1}, r"drop_path=-0\.1 must"),
        ({"drop_path": float("nan")}, r"drop_path=nan must"),
        ({"layer_scale": 0.0}, r"layer_scale=0\.0 must be a number above 0, or None"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio=0\.01 must give the MLP of embed_dim=48 a width of 1 or more"),
        ({"mlp_ratio": "4"}, r"mlp_ratio='4' must"),
        ({"depth": 0}, r"depth=0 must be a whole number, 1 or more"),
        ({"depth": 2.0}, r"depth=2\.0 must be a whole number"),
        ({"patch_size": True}, r"patch_size=True must be a whole number"),
        ({"position": "shared"}, r"position='shared' is unknown; did you mean shared_rpb\? \(positions: "),
        ({"position": None}, r"position=None is unknown \(positions: shared_rpb, rpb, ape\)"),
    ],
)
def test_impossible_arguments_are_refused(changes, message):
    with pytest.raises(ModelError, match=message):
        VisionTransformer(**{**SMALL, **changes})


def test_another_input_size_is_refused():
    with pytest.raises(
        ModelError, match=r"\(1, 3, 48, 40\) reached a ViT built with input_size=40: resize them"
    ):
        VisionTransformer(**SMALL)(torch.zeros(1, 3, 48, 40))
