"""Swin V2 against timm's, against one block written token by token in float64, and against itself where two
paths must agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm
from torch.utils._python_dispatch import TorchDispatchMode

from models import swinv2
from models.attention import explicit_attention, fused_attention
from models.errors import ModelError
from models.ops import Ops

SMALL: dict[str, Any] = {"width": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights with which every part matters: no zero bias or norm, position biases from 1 to 15, logit scales
    on both sides of the clamp."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("logit_scale"):
                parameter.uniform_(0, 6, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.normal_(1, 0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5, generator=generator)
            elif "cpb_mlp.2" in name:
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)


def pixels(batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def small(seed: int = 0, **changes: Any) -> swinv2.SwinV2:
    arguments: dict[str, Any] = {"input_size": 64, "window_size": 4, **SMALL, **changes}
    model = swinv2.SwinV2(**arguments).eval()
    randomise(model, seed)
    return model


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Relative to the norm of ``reference``; absolute where that is zero."""
    norm = reference.double().norm()
    return ((value.double() - reference.double()).norm() / (norm if norm > 0 else 1)).item()


# timm.

GEOMETRIES = [
    pytest.param((64, 64), 4, (0, 0, 0, 0), id="window4"),
    pytest.param((64, 64), 8, (0, 0, 0, 0), id="window8"),
    pytest.param((96, 96), 3, (0, 0, 0, 0), id="odd-window"),
    pytest.param((96, 96), 6, (12, 12, 12, 6), id="transferred-position-bias"),
    pytest.param((32, 32), 1, (0, 0, 0, 0), id="window-of-one-token"),
    pytest.param((64, 128), 4, (0, 0, 0, 0), id="rectangle-shifted-along-one-side"),
    pytest.param((96, 64), (6, 4), (6, 6, 6, 3), id="rectangular-window"),
]


def timm_and_ours(
    size: tuple[int, int], window: int | tuple[int, int], pretrained: tuple[int, ...], dtype: torch.dtype
) -> tuple[nn.Module, swinv2.SwinV2]:
    shared: dict[str, Any] = {
        "depths": SMALL["depths"],
        "num_heads": SMALL["num_heads"],
        "window_size": window,
        "pretrained_window_sizes": pretrained,
    }
    theirs = SwinTransformerV2(img_size=size, embed_dim=SMALL["width"], num_classes=0, **shared).eval()
    randomise(theirs)
    ours = swinv2.SwinV2(input_size=size, width=SMALL["width"], **shared).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


# Outputs reach 5 and differ by the order of sums alone: worst seen 5e-6 and 1e-14. The maps of the stages,
# not normalised, reach 11: worst seen 3e-5 and 7e-14, and timm's float32 is as far from its own float64.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "map_tolerance"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-12, 1e-12)]
)
@pytest.mark.parametrize(("size", "window", "pretrained"), GEOMETRIES)
def test_every_stage_equals_timm(
    size: tuple[int, int],
    window: int | tuple[int, int],
    pretrained: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    map_tolerance: float,
) -> None:
    theirs, ours = timm_and_ours(size, window, pretrained, dtype)
    image = pixels(3, size, dtype)
    with torch.no_grad():
        final_BHWC, maps = theirs.forward_features(image), theirs.forward_intermediates(image)[1]
        torch.testing.assert_close(ours(image), final_BHWC.flatten(1, 2), rtol=tolerance, atol=tolerance)
        for ours_BLC, theirs_BCHW in zip(ours.forward_stages(image), maps, strict=True):
            expected = theirs_BCHW.flatten(2).transpose(1, 2)
            torch.testing.assert_close(ours_BLC, expected, rtol=0, atol=map_tolerance)


def test_every_gradient_equals_timm() -> None:
    theirs, ours = timm_and_ours((64, 128), 4, (6, 6, 6, 3), torch.float64)
    image = pixels(1, (64, 128), torch.float64)
    weight = torch.randn(1, 8, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (theirs.forward_features(image).flatten(1, 2) * weight).sum().backward()
    (ours(image) * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        # Worst seen 2e-13.
        assert relative_error(parameter.grad, expected[name]) < 1e-10, name


def test_the_real_tiny_equals_timm() -> None:
    theirs = timm.create_model("swinv2_tiny_window16_256", num_classes=0).eval()
    randomise(theirs)
    ours = swinv2.build("swinv2_tiny", input_size=256).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = pixels(1, (256, 256))
    with torch.no_grad():
        expected = theirs.forward_features(image).flatten(1, 2)
        # Outputs reach 6; worst seen 6e-6.
        torch.testing.assert_close(ours(image), expected, rtol=1e-5, atol=1e-5)


def as_microsoft(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """timm's state dict as Microsoft's files hold it: merging ends a stage, tables are saved, flat head."""
    official = {}
    for name, value in state.items():
        if ".downsample." in name:
            _, stage, rest = name.split(".", 2)
            name = f"layers.{int(stage) - 1}.{rest}"
        official[name.replace("head.fc.", "head.")] = value
    for table in ("attn.relative_coords_table", "attn.relative_position_index", "attn_mask"):
        official[f"layers.0.blocks.1.{table}"] = torch.zeros(1)
    return {"model": official}


@pytest.mark.parametrize(
    ("name", "variant", "changes"),
    [
        ("swinv2_tiny", "swinv2_tiny_window8_256", {"window_size": 8}),
        ("swinv2_base", "swinv2_base_window12to24_192to384", {}),
        ("swinv2_large", "swinv2_large_window12_192", {}),
    ],
)
def test_official_weights_load_with_every_key_matched(
    name: str, variant: str, changes: dict[str, Any]
) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(variant)
        ours = swinv2.build(name, input_size=theirs.patch_embed.img_size[0], **changes)
    state: Any = theirs.state_dict()
    for file in (state, as_microsoft(state)):
        weights = swinv2.official_state_dict(file)
        assert set(weights) == {key for key in state if not key.startswith("head.")}
        assert all(weights[key] is state[key] for key in weights)
        assert not any(ours.load_state_dict(weights, strict=True, assign=True))
    assert [stage.window for stage in ours.layers] == [stage.blocks[0].window_size for stage in theirs.layers]


def test_undecayed_parameters_and_drop_path_are_timm_s() -> None:
    with torch.device("meta"):
        theirs = SwinTransformerV2(img_size=64, window_size=4, depths=(1, 2, 3, 1), drop_path_rate=0.3)
        ours = swinv2.build("swinv2_tiny", input_size=64, depths=(1, 2, 3, 1), drop_path=0.3)
    assert ours.no_weight_decay() == theirs.no_weight_decay()
    assert ours.position_parameters() == {name for name in ours.no_weight_decay() if "cpb_mlp" in name}
    rates = [block.drop_path2.drop_prob for stage in ours.layers for block in stage.blocks]
    expected = [
        getattr(block.drop_path2, "drop_prob", 0.0) for stage in theirs.layers for block in stage.blocks
    ]
    assert rates == pytest.approx(expected, abs=1e-7)  # timm's come from float32


# One block, token by token.


def slow_bias(
    attention: nn.Module, head: int, offset: tuple[int, int], pretrained: tuple[int, int]
) -> Tensor:
    first, _, second = attention.cpb_mlp
    spaced = []
    for distance, side in zip(offset, pretrained, strict=True):
        scaled = 8 * distance / max(side - 1, 1)
        spaced.append(math.copysign(math.log2(1 + abs(scaled)) / math.log2(8), scaled))
    hidden = first.weight @ torch.tensor(spaced, dtype=torch.float64) + first.bias
    return 16 / (1 + torch.exp(-(second.weight[head] @ hidden.clamp(min=0))))


def slow_attention(block: swinv2.Block, image: Tensor, pretrained: tuple[int, int]) -> Tensor:
    """One image (height, width, C), window by window, head by head, query by query, key by key."""
    (height, width), (rows, columns), (down, right) = block.map_size, block.window, block.shift
    attention, channels = block.attn, image.shape[-1]
    query_w, key_w, value_w = attention.qkv.weight.split(channels)
    per_head = channels // attention.num_heads
    out: dict[tuple[int, int], Tensor] = {}
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            cells = [(i, j) for i in range(rows) for j in range(columns)]
            places = [((top + i + down) % height, (left + j + right) % width) for i, j in cells]
            for cell, place in zip(cells, places, strict=True):
                mixed = []
                for head in range(attention.num_heads):
                    part = slice(head * per_head, (head + 1) * per_head)
                    query = (query_w @ image[place] + attention.q_bias)[part]
                    logits, values = [], []
                    for other_cell, other in zip(cells, places, strict=True):
                        key = (key_w @ image[other])[part]
                        cosine = query @ key / (query.norm() * key.norm())
                        scale = attention.logit_scale[head, 0, 0].clamp(max=math.log(100)).exp()
                        offset = (cell[0] - other_cell[0], cell[1] - other_cell[1])
                        logit = cosine * scale + slow_bias(attention, head, offset, pretrained)
                        # Brought together by the cyclic shift alone: a window or more apart in the image.
                        if abs(place[0] - other[0]) >= rows or abs(place[1] - other[1]) >= columns:
                            logit = logit - 100
                        logits.append(logit)
                        values.append((value_w @ image[other] + attention.v_bias)[part])
                    mixed.append(torch.stack(logits).softmax(0) @ torch.stack(values))
                out[place] = attention.proj.weight @ torch.cat(mixed) + attention.proj.bias
    return torch.stack([torch.stack([out[y, x] for x in range(width)]) for y in range(height)])


def slow_block(block: swinv2.Block, x_BLC: Tensor, pretrained: tuple[int, int]) -> Tensor:
    def norm(x: Tensor, by: nn.LayerNorm) -> Tensor:
        return layer_norm(x, x.shape[-1:], by.weight, by.bias, 1e-5)

    x = x_BLC.unflatten(1, block.map_size)
    x = x + norm(torch.stack([slow_attention(block, image, pretrained) for image in x]), block.norm1)
    mlp = block.mlp
    hidden = gelu(x @ mlp.fc1.weight.T + mlp.fc1.bias)
    x = x + norm(hidden @ mlp.fc2.weight.T + mlp.fc2.bias, block.norm2)
    return norm(x, block.norm3).flatten(1, 2)


@pytest.mark.parametrize(
    ("map_size", "window", "shift", "pretrained"),
    [
        pytest.param((4, 6), (2, 3), (0, 0), (2, 3), id="windows"),
        pytest.param((4, 6), (2, 3), (1, 1), (2, 3), id="shifted"),
        pytest.param((3, 6), (3, 2), (0, 1), (5, 5), id="shifted-along-one-side"),
        pytest.param((3, 2), (3, 2), (0, 0), (2, 1), id="whole-map"),
    ],
)
def test_block_and_its_gradients_equal_the_slow_reference(
    map_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], pretrained: tuple[int, int]
) -> None:
    def build(sequential: bool, form: Callable[..., Tensor]) -> swinv2.Block:
        block = swinv2.Block(
            6,
            2,
            map_size=map_size,
            window=window,
            shift=shift,
            drop_path=0.0,
            extra_norm=True,
            own_bias=True,
            sequential=sequential,
            ops=Ops(attention=form),
        )
        randomise(block)
        with torch.no_grad():
            block.attn.logit_scale.copy_(torch.tensor([3.0, 5.0]).view(2, 1, 1))  # the clamp is ln 100 = 4.6
        return block.double()

    # The offsets in float64; ``log_offsets`` itself, in float32, has a test of its own.
    vertical, horizontal = (
        [math.copysign(math.log2(1 + abs(8 * d / max(p - 1, 1))) / 3, d) for d in range(1 - w, w)]
        for w, p in zip(window, pretrained, strict=True)
    )
    offsets = torch.tensor([[(y, x) for x in horizontal] for y in vertical], dtype=torch.float64)
    regions = swinv2.shift_regions(map_size, window, shift)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, map_size[0] * map_size[1], 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    x.requires_grad_()

    def gradients(block: swinv2.Block, value: Tensor) -> dict[str, Tensor]:
        inputs = {"x": x, **dict(block.named_parameters())}
        found = torch.autograd.grad((value * weight).sum(), list(inputs.values()))
        return dict(zip(inputs, found, strict=True))

    slow = build(False, explicit_attention)
    expected = slow_block(slow, x, pretrained)
    expected_gradients = gradients(slow, expected)
    below, above = expected_gradients["attn.logit_scale"].flatten().tolist()
    assert abs(below) > 1e-3
    assert above == 0
    for sequential in (False, True):
        for form in (explicit_attention, fused_attention):
            block = build(sequential, form)
            value = block(x, offsets, regions)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)  # worst seen 2e-14
            for name, gradient in gradients(block, value).items():
                # Worst seen 8e-12, of gradients up to 470.
                torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-11, atol=1e-11)


# Geometry.


@pytest.mark.parametrize(
    ("map_size", "window"),
    [((4, 6), (2, 3)), ((6, 6), (3, 3)), ((5, 7), (1, 7)), ((5, 3), (5, 3)), ((1, 1), (1, 1))],
)
def test_windows_are_rows_of_neighbours_and_go_back(
    map_size: tuple[int, int], window: tuple[int, int]
) -> None:
    (height, width), (rows, columns) = map_size, window
    x_BLC = torch.arange(2 * height * width * 3).view(2, height * width, 3)
    windows = swinv2.to_windows(x_BLC, map_size, window)
    grid = x_BLC.view(2, height, width, 3)
    expected = [
        grid[image, top : top + rows, left : left + columns].reshape(-1, 3)
        for image in range(2)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    assert torch.equal(windows, torch.stack(expected))
    assert torch.equal(swinv2.from_windows(windows, map_size, window), x_BLC)


@pytest.mark.parametrize(
    ("map_size", "window", "shift"),
    [((8, 8), (4, 4), (2, 2)), ((6, 9), (3, 3), (1, 1)), ((4, 8), (4, 4), (0, 2)), ((12, 6), (2, 3), (1, 1))],
)
def test_shift_regions_keep_apart_what_the_roll_brings_together(
    map_size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> None:
    (height, width), (rows, columns) = map_size, window
    place = torch.arange(height * width).view(1, -1, 1)
    rolled = swinv2.roll_map(place, map_size, (-shift[0], -shift[1]))
    place_WN = swinv2.to_windows(rolled, map_size, window).squeeze(2)
    y, x = place_WN // width, place_WN % width
    near = ((y[:, :, None] - y[:, None, :]).abs() < rows) & ((x[:, :, None] - x[:, None, :]).abs() < columns)
    regions = swinv2.shift_regions(map_size, window, shift)
    assert torch.equal(regions[:, :, None] == regions[:, None, :], near)
    assert torch.equal(swinv2.roll_map(rolled, map_size, shift), place)


class Seen(TorchDispatchMode):
    """What was run: the operators, and the sizes of all square matrices of a given side."""

    def __init__(self, side: int = 0) -> None:
        super().__init__()
        self.side, self.operators, self.squares = side, [], []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operators.append(function.overloadpacket.__name__)
        if isinstance(out, Tensor) and out.shape[-2:] == (self.side, self.side):
            self.squares.append(out.numel())
        return out


def test_a_window_that_is_the_whole_map_moves_nothing() -> None:
    x_BLC = torch.randn(2, 35, 3)
    windows = swinv2.to_windows(x_BLC, (5, 7), (5, 7))
    assert windows.data_ptr() == x_BLC.data_ptr()
    assert swinv2.from_windows(windows, (5, 7), (5, 7)).data_ptr() == x_BLC.data_ptr()

    stage = small(input_size=32, window_size=8).layers[0]
    block, x_BLC = stage.blocks[1], torch.randn(2, 64, 16)
    with torch.no_grad(), Seen() as around:
        block._attention(x_BLC, stage.offsets, stage.regions)
    with torch.no_grad(), Seen() as inside:
        block.attn(x_BLC, stage.offsets, None)
    for operator in ("clone", "copy_", "_to_copy", "index_select", "roll"):
        assert around.operators.count(operator) == inside.operators.count(operator), operator


def test_one_window_equals_the_same_map_as_windows_of_a_larger_one() -> None:
    """The path without copies against the general one: two maps side by side are a map of two windows."""
    block = small(input_size=32, window_size=8).layers[0].blocks[0]
    general = small(input_size=(32, 64), window_size=8).layers[0].blocks[0]
    offsets, regions = swinv2.log_offsets((8, 8), (8, 8)), torch.zeros(2, 64, dtype=torch.uint8)
    left, right = torch.randn(2, 3, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wide = general(torch.cat((left, right), dim=2).flatten(1, 2), offsets, regions).view(3, 8, 16, 16)
        for side, expected in ((left, wide[:, :, :8]), (right, wide[:, :, 8:])):
            # Same sums, another batch; worst seen 0.
            torch.testing.assert_close(
                block(side.flatten(1, 2), offsets, regions[:1]), expected.flatten(1, 2), rtol=0, atol=1e-6
            )


def test_offsets_are_log_spaced_by_the_trained_window() -> None:
    offsets = swinv2.log_offsets((3, 2), (5, 2))
    vertical = [math.copysign(math.log2(1 + 8 * abs(d) / 4) / 3, d) for d in (-2, -1, 0, 1, 2)]
    horizontal = [-math.log2(9) / 3, 0.0, math.log2(9) / 3]
    expected = torch.tensor([[(y, x) for x in horizontal] for y in vertical])
    torch.testing.assert_close(offsets, expected, rtol=1e-6, atol=1e-7)  # float32


def test_position_bias_carries_over_to_a_larger_window() -> None:
    """Weights trained at window 6, used at window (8, 7): pairs of equal offset keep their bias."""
    bias = swinv2.PositionBias(3)
    randomise(bias)
    trained = bias(swinv2.log_offsets((6, 6), (6, 6))).view(3, 6, 6, 6, 6)
    larger = bias(swinv2.log_offsets((8, 7), (6, 6))).view(3, 8, 7, 8, 7)
    # The same entries of the table, from another matrix product; worst seen 1e-6 of 8.
    torch.testing.assert_close(larger[:, 1:7, 1:, 1:7, 1:], trained, rtol=0, atol=1e-5)
    assert trained.min() > 0
    assert trained.max() < 16
    assert trained.std() > 0.5  # there is a bias to carry over


# Sizes.

BASE_COUNTS = {
    "swinv2_tiny": 27_578_154,
    "swinv2_small": 48_959_418,
    "swinv2_base": 86_893_816,
    "swinv2_large": 195_202_932,
}


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "expected"), BASE_COUNTS.items())
def test_parameter_counts(name: str, expected: int) -> None:
    with torch.device("meta"):
        assert count(swinv2.build(name, input_size=256)) == expected


def test_g_has_its_three_billion() -> None:
    with torch.device("meta"):
        model = swinv2.build("swinv2_g", input_size=256)
        shared = swinv2.build("swinv2_g", input_size=256, position_bias="stage")
        plain = swinv2.build("swinv2_g", input_size=256, extra_norm_every=0)
    assert (count(model), count(shared), count(plain)) == (2_997_843_680, 2_996_208_352, 2_997_815_008)
    assert (model.embed_dim, model.grid, model.patch_size, model.input_size) == (4096, (8, 8), 32, 256)
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert sum(block.attn.num_windows == 1 for block in blocks) == 46
    assert not any(name for name, _ in shared.named_parameters() if "attn.cpb_mlp" in name)


@pytest.mark.parametrize(
    ("name", "expected"), [("swinv2_g", (5, 11, 17, 23, 29, 35, 41)), ("swinv2_huge", (5, 11, 17))]
)
def test_the_extra_norm_follows_every_sixth_block_of_a_stage(name: str, expected: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = swinv2.build(name, input_size=192)
    norms = {key.rsplit(".", 1)[0] for key in model.state_dict() if "norm3" in key}
    assert norms == {f"layers.2.blocks.{index}.norm3" for index in expected}


def test_the_extra_norm_is_on_the_stream() -> None:
    model = small(extra_norm_every=2)
    for stage in model.layers:
        nn.init.ones_(stage.blocks[1].norm3.weight)
        nn.init.zeros_(stage.blocks[1].norm3.bias)
    with torch.no_grad():
        for x_BLC in model.forward_stages(pixels(1, (64, 64))):
            assert x_BLC.mean(-1).abs().max() < 1e-5
            assert (x_BLC.var(-1, correction=0) - 1).abs().max() < 1e-3  # eps 1e-5 in the norm


@pytest.mark.parametrize(("input_size", "window"), [(192, 12), (224, 14), (256, 16), (384, 24)])
def test_windows_follow_the_map(input_size: int, window: int) -> None:
    with torch.device("meta"):
        model = swinv2.build("swinv2_tiny", input_size=input_size)
    assert [stage.window for stage in model.layers] == [(window, window)] * 3 + [(window // 2,) * 2]
    shifts = [[block.shift for block in stage.blocks] for stage in model.layers]
    half = (window // 2, window // 2)
    assert shifts[0] == shifts[1] == [(0, 0), half]
    assert {shift for stage in shifts[2:] for shift in stage} == {(0, 0)}


def test_the_micro_model_runs_at_its_smallest_and_says_what_it_is() -> None:
    model = swinv2.build("swinv2_micro", input_size=32).eval()
    tokens = model(pixels(1, (32, 32)))
    assert tokens.shape == (1, 1, 256)
    assert (model.embed_dim, model.grid, model.num_prefix_tokens) == (256, (1, 1), 0)
    assert (model.input_size, model.patch_size) == (32, 32)
    assert (
        len(list(model.buffers())) == 8
    )  # offsets and regions of each stage: nothing per block, nothing per batch


# Two ways to the same result.


@contextmanager
def block_calls(model: nn.Module) -> Iterator[list[str]]:
    calls: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if isinstance(module, swinv2.Block)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def train_once(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    tokens = model(image)
    tokens.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return tokens.detach(), gradients


@pytest.mark.parametrize("position_bias", ["block", "stage"])
def test_checkpointing_changes_nothing_but_what_is_recomputed(position_bias: str) -> None:
    model = small(
        depths=(1, 2, 3, 1), drop_path=0.5, position_bias=position_bias, sequential_stages=(0,)
    ).train()
    image = pixels(3, (64, 64))
    expected = train_once(model, image)
    choices: list[tuple[dict[str, Any], list[str]]] = [
        ({}, ["0.0", "1.0", "1.1", "2.0", "2.1", "2.2", "3.0"]),
        ({"every": 2}, ["0.0", "1.0", "2.0", "2.2", "3.0"]),
        ({"stages": (0, 2)}, ["0.0", "2.0", "2.1", "2.2"]),
        ({"stages": (2,), "every": 3}, ["2.0"]),
        ({"stages": ()}, []),
        ({"enable": False}, []),
    ]
    for choice, recomputed in choices:
        model.set_grad_checkpointing(**choice)
        with block_calls(model) as calls:
            tokens, gradients = train_once(model, image)
        again = sorted(
            name.removeprefix("layers.").replace("blocks.", "") for name in calls if calls.count(name) > 1
        )
        assert again == sorted(2 * recomputed)
        assert torch.equal(tokens, expected[0])
        assert all(torch.equal(gradients[name], expected[1][name]) for name in gradients)


def test_windows_one_by_one_equal_all_at_once_in_less_memory() -> None:
    geometry: dict[str, Any] = {"input_size": 96, "window_size": 6}  # windows: 16, 4, 1, 1
    image = pixels(3, (96, 96))
    largest, results = [], []
    for stages in ((), (0, 1)):
        model = small(**geometry, sequential_stages=stages)
        with Seen(side=36) as seen:
            results.append(train_once(model, image))
        largest.append(max(seen.squares))
        with torch.no_grad():
            # The same products in another batch; worst seen 0.
            torch.testing.assert_close(model(image), results[0][0], rtol=0, atol=1e-5)
    # Logits: images x heads x windows of the first stage; then of the third, which has one window anyway.
    assert largest == [3 * 1 * 16 * 36**2, 3 * 4 * 1 * 36**2]
    for name, gradient in results[1][1].items():
        assert relative_error(gradient, results[0][1][name]) < 5e-4, name  # worst seen 3e-5


def test_windows_one_by_one_keep_no_logits_for_the_backward_pass() -> None:
    def kept(model: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tokens = model(pixels(1, (128, 128)))
        del tokens
        return sum(sizes.values())

    changes: dict[str, Any] = {"input_size": 128, "window_size": 16, "depths": (2, 1, 1, 1)}
    spared = kept(small(**changes)) - kept(small(**changes, sequential_stages=(0,)))
    # In each of the two blocks, (256 x 256) float32: the probabilities of 4 windows go, the bias stays.
    assert spared == pytest.approx(2 * (4 - 1) * 256 * 256 * 4, rel=0.01)


def test_a_shared_position_bias_equals_its_copies() -> None:
    shared = small(position_bias="stage")
    per_block = small(seed=1)
    weights = swinv2.unshare_position_bias(shared.state_dict(), SMALL["depths"])
    per_block.load_state_dict(weights, strict=True)
    image = pixels(2, (64, 64))
    tokens, gradients = train_once(shared, image)
    copied_tokens, copied_gradients = train_once(per_block, image)
    with torch.no_grad():
        assert torch.equal(shared(image), per_block(image))
    assert torch.equal(tokens, copied_tokens)
    for stage in range(4):
        copies = [
            copied_gradients[f"layers.{stage}.blocks.{block}.attn.cpb_mlp.0.weight"] for block in range(2)
        ]
        # One sum of gradients before the MLP instead of after it; worst seen 3e-7.
        assert relative_error(gradients[f"layers.{stage}.cpb_mlp.0.weight"], sum(copies)) < 1e-5


def test_blocks_compile_whole() -> None:
    model = small(input_size=32, window_size=2, depths=(2,), num_heads=(2,), pretrained_window_sizes=(0,))
    stage, x = model.layers[0], torch.randn(2, 64, 16)
    shifted = stage.blocks[1]
    compiled = torch.compile(shifted, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, stage.offsets, stage.regions), shifted(x, stage.offsets, stage.regions))


# Precision.


@pytest.mark.parametrize("form", [explicit_attention, fused_attention])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close_to_float64(autocast: bool, form: Callable[..., Tensor]) -> None:
    model = small(ops=Ops(attention=form)).bfloat16()
    theirs = SwinTransformerV2(
        img_size=64,
        window_size=4,
        embed_dim=16,
        num_classes=0,
        depths=SMALL["depths"],
        num_heads=SMALL["num_heads"],
    ).eval()
    theirs.load_state_dict(model.state_dict())
    image = pixels(2, (64, 64)).bfloat16()
    exact = small().double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference = exact(image.double())
        theirs_error = relative_error(theirs.bfloat16().forward_features(image).flatten(1, 2), reference)
        if autocast:
            with torch.autocast("cpu", torch.bfloat16):
                value = model.float()(image.float())
        else:
            value = model(image)
        assert value.dtype == torch.bfloat16
        error = relative_error(value, reference)
    # Eight blocks of bfloat16 activations, 8 bits of significand each; worst seen 7e-3, timm's 9e-3.
    assert error < 2e-2
    assert error < 1.5 * theirs_error


def test_cosine_lengths_are_exact_where_bfloat16_would_round_them() -> None:
    """At the largest logit scale, 100, the attended values against float64; a factor rounded to bfloat16
    triples their error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 1, 64, 2, 32, generator=generator).bfloat16() for _ in range(3))
    k = k + q
    length = torch.full((2, 1), 100.0)

    def attended(dtype: torch.dtype) -> Tensor:
        long, unit = (
            swinv2._with_length(x.to(dtype), by.to(torch.promote_types(dtype, torch.float32))).squeeze(1)
            for x, by in ((q, length), (k, torch.ones_like(length)))
        )
        heads = (x.transpose(1, 2) for x in (long, unit, v.to(dtype).squeeze(1)))
        return fused_attention(*heads, torch.zeros(1, 2, 64, 64, dtype=dtype), scale=1.0)

    assert (
        relative_error(attended(torch.bfloat16), attended(torch.float64)) < 2e-3
    )  # seen 9e-4, and 3e-3 rounded


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 7, 8, 12, 14, 16])
def test_cuda_is_as_close_to_float64_as_the_cpu(window: int, dtype: torch.dtype) -> None:
    """Forward and backward, shifted and not, at the token counts (49, 64, 144, 196, 256) where fused kernels
    have failed."""
    size = (32 * window, 32 * window)

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = small(input_size=size, window_size=window, depths=(1, 2, 1, 1)).to(device, dtype)
        tokens = model(pixels(2, size).to(device, dtype))
        weight = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))
        (tokens * weight.to(device, dtype)).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return tokens.detach().cpu(), torch.cat([gradient.flatten().cpu() for gradient in gradients])

    exact, plain, found = run("cpu", torch.float64), run("cpu", dtype), run("cuda", dtype)
    for reference, same_dtype, value in zip(exact, plain, found, strict=True):
        assert value.isfinite().all()
        # Another kernel, another order of sums: twice the error of the plain form, or next to none.
        assert relative_error(value, reference) < 2 * relative_error(same_dtype, reference) + 1e-5


# First values.


@pytest.mark.parametrize("weight", [0.0, 1e-5])
def test_blocks_start_as_the_identity_or_nearly(weight: float) -> None:
    torch.manual_seed(0)
    model = swinv2.build("swinv2_micro", input_size=64, residual_norm_weight=weight).eval()
    stage, x = model.layers[1], torch.randn(2, 64, 64)
    with torch.no_grad():
        moved = (stage.blocks[1](x, stage.offsets, stage.regions) - x).abs().max().item()
    # Two branches of unit variance times the weight; the largest of 8192 normal numbers is below 6.
    assert moved == 0 if weight == 0 else 0 < moved < 12 * weight


def test_first_values_are_the_papers() -> None:
    torch.manual_seed(0)
    model = swinv2.build("swinv2_micro", input_size=64)
    constants = {
        "logit_scale": math.log(10),
        "bias": 0.0,
        "norm1.weight": 0.0,
        "norm2.weight": 0.0,
        "norm.weight": 1.0,
    }
    for name, parameter in model.named_parameters():
        constant = next((value for end, value in constants.items() if name.endswith(end)), None)
        if name.startswith("patch_embed.proj"):  # PyTorch's own, as in the official code
            assert 0 < parameter.abs().max() < 48**-0.5 + 1e-6
        elif constant is not None:
            assert torch.all(parameter == constant), name
        elif parameter.numel() > 10_000:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
            assert parameter.abs().max() < 0.12, name


def test_a_model_from_the_meta_device_can_be_given_its_values() -> None:
    torch.manual_seed(0)
    expected = swinv2.build("swinv2_micro", input_size=64)
    with torch.device("meta"):
        model = swinv2.build("swinv2_micro", input_size=64)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 255)
    model.init_weights()
    for name, tensor in (*expected.named_parameters(), *expected.named_buffers()):
        found = model.get_parameter(name) if isinstance(tensor, nn.Parameter) else model.get_buffer(name)
        assert found.isfinite().all(), name
        if isinstance(tensor, nn.Parameter):
            spread, expected_spread = (x.detach().std(correction=0).item() for x in (found, tensor))
            assert spread == pytest.approx(expected_spread, rel=0.3), name
        else:
            assert torch.equal(found, tensor), name


# Wrong input.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"input_size": 230},
            r"input_size=230: 230 is not a multiple of the total stride, 32 pixels; try 224 or 256",
        ),
        ({"input_size": (64, 20)}, r"input_size=\(64, 20\): 20 .* try 32$"),
        ({"input_size": 0}, r"input_size=0: .* try 32$"),
        (
            {"input_size": 224, "window_size": 16},
            r"window_size=16 does not tile the 56x56 .* takes 1, 7, 14, 28, 56",
        ),
        ({"window_size": 0}, r"window_size=0 must be 1 token or more"),
        (
            {"num_heads": (1, 2, 4)},
            r"num_heads=\(1, 2, 4\) must have one value per stage: depths=\(2, 2, 2, 2\)",
        ),
        ({"num_heads": (3, 2, 4, 8)}, r"num_heads=.*: 3 does not divide 16 channels"),
        ({"depths": ()}, r"depths=\(\): there must be stages"),
        ({"depths": (2, 0, 2, 2)}, r"depths=.* each needs a block"),
        (
            {"pretrained_window_sizes": (6, 6)},
            r"pretrained_window_sizes=\(6, 6\) must have one value per stage",
        ),
        ({"pretrained_window_sizes": (6, 6, 6, -1)}, r"pretrained_window_sizes=.* or 0 for its own"),
        ({"position_bias": "shared"}, r"position_bias='shared' must be one of block, stage"),
        ({"sequential_stages": (4,)}, r"sequential_stages=\(4,\): the stages are 0 to 3"),
        ({"extra_norm_every": -1}, r"extra_norm_every=-1 must be a number of blocks, or 0"),
        ({"drop_path": 1.0}, r"drop_path=1.0 must be at least 0 and below 1"),
    ],
)
def test_impossible_arguments_say_what_would_be_right(changes: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        swinv2.SwinV2(**{"input_size": 64, **SMALL, **changes})


def test_unknown_names_and_wrong_pixels_are_refused() -> None:
    with pytest.raises(ModelError, match=r"unknown Swin V2 'swinv2_G'; did you mean swinv2_g.*swinv2_large"):
        swinv2.build("swinv2_G", input_size=256)
    model = small()
    with pytest.raises(ModelError, match=r"pixels of shape \(1, 3, 64, 32\) are not \(B, 3, 64, 64\)"):
        model(pixels(1, (64, 32)))
    with pytest.raises(ModelError, match=r"every=0 must be 1 or more blocks"):
        model.set_grad_checkpointing(every=0)
    with pytest.raises(ModelError, match=r"stages=\(0, 7\): the stages are 0 to 3"):
        model.set_grad_checkpointing(stages=(0, 7))
