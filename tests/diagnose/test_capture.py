"""What is captured of each family is softmax(Q K^T + bias), computed once more by hand in float64.

By hand: from the input of the attention and its weights, with position biases and shifts looked up pair by
pair. What the network does with its map is checked too: the map times V is what comes out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.diagnose.capture import attention_maps, block_of, block_outputs
from fd_scale.diagnose.subjects import Subject
from tests.diagnose.tiny import SIDE, SMALL, SWIN, clip_subject, own_subject, pixels, timm_subject

# float32 networks against float64 by hand; logits reach 10. Worst error seen: 8e-7.
CLOSE = {"rtol": 0, "atol": 5e-6}


def captured(subject: Subject, values: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Maps by attention, what went into each, and the final tokens."""
    maps: dict[str, list[Tensor]] = {}
    inputs: dict[str, Tensor] = {}
    with attention_maps(subject.network, lambda name, found: maps.setdefault(name, []).append(found.clone())):
        names = [name for name, module in subject.network.named_modules() if is_attention(module)]
        handles = [
            subject.network.get_submodule(name).register_forward_pre_hook(
                lambda _, given, name=name: inputs.__setitem__(name, given[0].double())
            )
            for name in names
        ]
        final = subject.backbone.tokens(values).tokens_BND
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in maps.items()}, inputs, final


def is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__ and any(True for _ in module.parameters())


def split(tokens: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> list[Tensor]:
    """Query, key and value (B, H, N, D) in float64."""
    product = F.linear(tokens, weight.double(), None if bias is None else bias.double())
    batch, count, _ = product.shape
    return list(product.view(batch, count, 3, heads, -1).permute(2, 0, 3, 1, 4))


def dot_product(module: Any, tokens: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Of modules with ``qkv`` and a bias in one of three ways."""
    joined = module.qkv.bias
    if joined is None and getattr(module, "q_bias", None) is not None:
        joined = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
    query, key, _ = split(tokens, module.qkv.weight, joined, module.num_heads)
    return (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1]) + bias).softmax(dim=-1)


def table_bias(table: Tensor, grid: tuple[int, int], class_token: bool) -> Tensor:
    """(H, N, N) of a table whose last three rows are class -> patch, patch -> class, class -> class."""
    height, width = grid
    first = int(class_token)
    count = first + height * width
    bias = torch.zeros(table.shape[1], count, count, dtype=torch.float64)
    for query in range(count):
        for key in range(count):
            q, k = query - first, key - first
            if q < 0 or k < 0:
                row = len(table) + (-3 if q < 0 and k >= 0 else -2 if q >= 0 else -1)
            else:
                down, right = q // width - k // width, q % width - k % width
                row = (down + height - 1) * (2 * width - 1) + right + width - 1
            bias[:, query, key] = table[row].double()
    return bias


PLAIN = {
    "timm ViT (DINO, MAE)": lambda: timm_subject("vit_tiny_patch16_224", **SMALL),
    "timm DeiT": lambda: timm_subject("deit_tiny_patch16_224", **SMALL),
    "timm DeiT, distilled": lambda: timm_subject("deit_tiny_distilled_patch16_224", **SMALL),
    "timm CLIP": lambda: timm_subject("vit_base_patch16_clip_quickgelu_224", **SMALL),
    "ours, absolute positions": lambda: own_subject("vit_micro_patch8", position="ape"),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
@torch.no_grad()
def test_vits_without_a_bias(make: Callable[[], Subject]) -> None:
    subject = make()
    maps, inputs, _ = captured(subject, pixels(3))
    assert len(maps) == len(list(subject.network.blocks))  # type: ignore[arg-type]
    for name, found in maps.items():
        expected = dot_product(subject.network.get_submodule(name), inputs[name])
        torch.testing.assert_close(found.double(), expected, **CLOSE)


@torch.no_grad()
def test_open_clip_tower() -> None:
    subject = clip_subject()
    maps, inputs, _ = captured(subject, pixels(2))
    assert list(maps) == ["transformer.resblocks.0.attn", "transformer.resblocks.1.attn"]
    for name, found in maps.items():
        module = subject.network.get_submodule(name)
        query, key, _ = split(inputs[name], module.in_proj_weight, module.in_proj_bias, module.num_heads)
        expected = (query @ key.transpose(-2, -1) / math.sqrt(12)).softmax(dim=-1)
        torch.testing.assert_close(found.double(), expected, **CLOSE)


BIASED = {
    "BEiT": (lambda: timm_subject("beit_base_patch16_224", **SMALL), "own"),
    "ours, a table per block": (lambda: own_subject("vit_micro_patch8", position="rpb"), "own"),
    "ours, one shared table": (lambda: own_subject("vit_micro_patch8"), "shared"),
    "BEiT, one shared table": (
        lambda: timm_subject(
            "beit_base_patch16_224", **SMALL, use_shared_rel_pos_bias=True, use_rel_pos_bias=False
        ),
        "shared",
    ),
}


@pytest.mark.parametrize(("make", "owner"), BIASED.values(), ids=BIASED)
@torch.no_grad()
def test_vits_with_relative_positions(make: Callable[[], Subject], owner: str) -> None:
    subject = make()
    maps, inputs, _ = captured(subject, pixels(2))
    side = SIDE // 8
    assert maps
    for name, found in maps.items():
        module = subject.network.get_submodule(name)
        owning = module if owner == "own" else subject.network.rel_pos_bias
        bias = table_bias(owning.relative_position_bias_table, (side, side), class_token=True)
        torch.testing.assert_close(found.double(), dot_product(module, inputs[name], bias), **CLOSE)


@torch.no_grad()
def test_swin_inside_shifted_windows() -> None:
    subject = timm_subject("swin_tiny_patch4_window7_224", **SWIN)
    maps, inputs, _ = captured(subject, pixels(2))
    assert len(maps) == 4
    for name, found in maps.items():
        module = subject.network.get_submodule(name)
        block: Any = subject.network.get_submodule(block_of(subject.network, name))
        bias = table_bias(module.relative_position_bias_table, module.window_size, class_token=False)
        mask = window_penalty(block.input_resolution, block.window_size, block.shift_size, len(found))
        torch.testing.assert_close(found.double(), dot_product(module, inputs[name], bias + mask), **CLOSE)


def window_penalty(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], count: int
) -> Tensor:
    """(windows of all images, 1, N, N): -100 between tokens that only the shift brought together."""
    (height, width), (rows, columns) = size, window
    origin = [[(y + shift[0], x + shift[1]) for x in range(width)] for y in range(height)]
    penalties = []
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            inside = [origin[top + y][left + x] for y in range(rows) for x in range(columns)]
            # A token that wrapped around the edge comes from the other end of the image.
            sides = [(y >= height, x >= width) for y, x in inside]
            penalties.append([[0.0 if one == other else -100.0 for other in sides] for one in sides])
    found = torch.tensor(penalties, dtype=torch.float64)[:, None]
    return found.repeat(count // len(found), 1, 1, 1)


SWINS_V2 = {
    "timm": (lambda: timm_subject("swinv2_tiny_window8_256", **SWIN), 4),
    "ours": (lambda: own_subject("swinv2_micro", side=64, window_size=4), 6),
    "ours, window by window": (
        lambda: own_subject("swinv2_micro", side=64, window_size=4, sequential_stages=(0, 1)),
        6,
    ),
}


@pytest.mark.parametrize(("make", "count"), SWINS_V2.values(), ids=SWINS_V2)
@torch.no_grad()
def test_swin_v2_has_cosines_and_a_computed_bias(make: Callable[[], Subject], count: int) -> None:
    subject = make()
    values = pixels(2, subject.backbone.input_size)
    maps, inputs, _ = captured(subject, values)
    assert len(maps) == count
    for name, found in maps.items():
        module: Any = subject.network.get_submodule(name)
        block: Any = subject.network.get_submodule(block_of(subject.network, name))
        size = getattr(block, "input_resolution", None) or block.map_size
        window = getattr(block, "window_size", None) or block.window
        shift = getattr(block, "shift_size", None) or getattr(block, "shift", (0, 0))
        bias = torch.cat((module.q_bias, torch.zeros_like(module.q_bias), module.v_bias))
        query, key, _ = split(inputs[name], module.qkv.weight, bias, module.num_heads)
        scale = module.logit_scale.double().clamp(max=math.log(100)).exp()
        logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1) * scale
        mask = window_penalty(size, window, shift, len(logits))
        expected = (logits + cpb_bias(module, window) + mask).softmax(dim=-1)
        if getattr(module, "sequential", False):
            # Windows came one at a time, each with all images: by window, then by image.
            windows = len(expected) // len(values)
            expected = expected.unflatten(0, (len(values), windows)).transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(found.double(), expected, **CLOSE)


def cpb_bias(module: Any, window: tuple[int, int]) -> Tensor:
    """16 sigmoid of the CPB MLP at the log-spaced offset of each pair, (H, N, N)."""
    mlp = nn.Sequential(*list(module.cpb_mlp)).double()
    places = [(y, x) for y in range(window[0]) for x in range(window[1])]
    sides = torch.tensor([window[0] - 1, window[1] - 1], dtype=torch.float64)
    rows = []
    for one in places:
        offsets = torch.tensor([[one[0] - o[0], one[1] - o[1]] for o in places], dtype=torch.float64)
        scaled = offsets / sides * 8
        rows.append(16 * mlp(scaled.sign() * (scaled.abs() + 1).log2() / 3).sigmoid())
    bias = torch.stack(rows).permute(2, 0, 1)
    mlp.float()
    return bias


EVERY = {
    **PLAIN,
    "BEiT": BIASED["BEiT"][0],
    "ours": BIASED["ours, one shared table"][0],
    "open_clip": clip_subject,
    "Swin": lambda: timm_subject("swin_tiny_patch4_window7_224", **SWIN),
    "SwinV2": SWINS_V2["timm"][0],
    "our SwinV2": SWINS_V2["ours"][0],
    "SwinV2-CR": lambda: timm_subject("swinv2_cr_tiny_224", side=64, **(SWIN | {"window_size": 4})),
    "EVA-02": lambda: timm_subject("eva02_tiny_patch14_224", **SMALL),
    "timm, relative": lambda: timm_subject("vit_relpos_small_patch16_224", **SMALL),
}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_network_is_as_it_was_and_gives_what_it_gave(make: Callable[[], Subject]) -> None:
    subject = make()
    values = pixels(2, subject.backbone.input_size)
    before = {name: dict(module.__dict__) for name, module in subject.network.named_modules()}
    plain = subject.backbone.tokens(values).tokens_BND
    maps, _, seen = captured(subject, values)
    # Written-out attention against the network's own form of it; worst difference seen 4e-6 of values near 3.
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)
    assert maps
    for found in maps.values():
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:3]), rtol=0, atol=1e-5)
    for name, module in subject.network.named_modules():
        now = dict(module.__dict__)
        assert not now["_forward_hooks"]
        assert not now["_forward_pre_hooks"]
        same = {key: now[key] for key in now if not isinstance(now[key], dict)}
        assert same == {key: before[name][key] for key in same}
    torch.testing.assert_close(subject.backbone.tokens(values).tokens_BND, plain, rtol=0, atol=0)


def test_half_precision_maps_come_in_float32_where_they_are_ours() -> None:
    subject = clip_subject()
    subject.network.bfloat16()
    values = torch.randn(2, 17, 24, dtype=torch.bfloat16)
    maps = []
    with attention_maps(subject.network, lambda _, found: maps.append(found)):
        subject.network.transformer(values)  # type: ignore[operator]
    assert {found.dtype for found in maps} == {torch.float32}
    # bfloat16 of timm is handed over as it is; sums are float32 (``anatomy.patches``).
    half = timm_subject("vit_tiny_patch16_224", dtype=torch.bfloat16, **SMALL)
    maps, _, _ = captured(half, pixels(2))
    exact, _, _ = captured(timm_subject("vit_tiny_patch16_224", **SMALL), pixels(2))
    for name, found in maps.items():
        # Two networks whose weights differ by rounding to 8 bits.
        torch.testing.assert_close(found.float(), exact[name], rtol=0, atol=0.05)


def test_outputs_of_blocks_are_tokens_whatever_their_layout() -> None:
    swin = timm_subject("swin_tiny_patch4_window7_224", **SWIN)
    found = {}
    names = ["layers.0.blocks.1", "layers.1.blocks.0"]
    with block_outputs(swin.network, names, lambda name, tokens: found.setdefault(name, tokens.shape)):
        swin.backbone.tokens(pixels(3))
    assert found == {names[0]: (3, 64, 8), names[1]: (3, 16, 16)}


def test_block_of_a_parallel_attention() -> None:
    subject = timm_subject("vit_small_patch16_18x2_224", **SMALL)
    assert block_of(subject.network, "blocks.1.attns.0.attn") == "blocks.1"
    maps, _, _ = captured(subject, pixels(1))
    assert "blocks.1.attns.0.attn" in maps
