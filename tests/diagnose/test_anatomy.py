"""Where attention is: grids, prefix tokens and pixels of each family, and what is said where it is not."""

from __future__ import annotations

import pytest

from fd_scale.diagnose.anatomy import MAX_TOKEN_LAYERS, OUTPUT, anatomy, evenly_spaced
from tests.diagnose.tiny import SMALL, SWIN, clip_subject, own_subject, timm_subject


def test_a_vit_with_class_token_and_registers() -> None:
    found = anatomy(timm_subject("vit_small_patch14_reg4_dinov2", **(SMALL | {"patch_size": 8})))
    assert [layer.name for layer in found.attention] == [f"blocks.{n}.attn" for n in range(3)]
    layer = found.attention[0]
    assert (layer.grid, layer.num_prefix_tokens, layer.patch_px, layer.num_heads) == ((4, 4), 5, 8.0, 2)
    assert not found.is_windowed
    assert [tokens.name for tokens in found.tokens] == ["blocks.0", "blocks.1", "blocks.2", OUTPUT]
    assert found.tokens[0].num_prefix_tokens == 5


@pytest.mark.parametrize(
    ("make", "patches_px", "windows"),
    [
        (lambda: timm_subject("swin_tiny_patch4_window7_224", **SWIN), [4, 4, 8, 8], [(4, 4)] * 4),
        (
            lambda: own_subject("swinv2_micro", side=64, window_size=4),
            [4, 8, 8, 16, 16, 32],
            [(4, 4)] * 5 + [(2, 2)],
        ),
    ],
    ids=["timm", "ours"],
)
def test_a_swin_is_windowed_and_its_patches_grow(make, patches_px, windows) -> None:  # type: ignore[no-untyped-def]
    found = anatomy(make())
    assert found.is_windowed
    assert [layer.patch_px for layer in found.attention] == patches_px
    assert [layer.grid for layer in found.attention] == windows
    assert found.tokens[0].grid != found.tokens[-1].grid


def test_an_open_clip_tower() -> None:
    found = anatomy(clip_subject())
    assert [layer.num_prefix_tokens for layer in found.attention] == [1, 1]
    assert [layer.name for layer in found.tokens] == [
        "transformer.resblocks.0",
        "transformer.resblocks.1",
        OUTPUT,
    ]


def test_a_network_without_attention_has_its_final_map_alone() -> None:
    found = anatomy(timm_subject("convnext_atto", side=64))
    assert found.attention == ()
    assert [layer.name for layer in found.tokens] == [OUTPUT]
    assert found.left_out == "ConvNeXt has no attention that is known here"


def test_attention_to_fewer_tokens_is_named_and_left_out() -> None:
    found = anatomy(timm_subject("pvt_v2_b0", side=64))
    assert "stages.0.blocks.0.attn attends from 256 to 4 tokens, not among the same" in found.left_out
    assert all(layer.name.startswith("stages.3") for layer in found.attention)


def test_deep_networks_are_thinned_out_evenly() -> None:
    assert evenly_spaced(list(range(50)), MAX_TOKEN_LAYERS)[::23] == [0, 49]
    assert evenly_spaced(list(range(5)), 3) == [0, 2, 4]
    assert evenly_spaced([1, 2], 3) == [1, 2]
