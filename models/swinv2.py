"""Swin Transformer V2, from tiny to the 3-billion-parameter G.

A pyramid of four stages. Blocks attend within windows, shifted in every second block, by cosine attention
with a log-spaced continuous position bias (CPB), and normalise each branch at its end, before the residual
sum. H and G normalise the residual stream too, after every sixth block of a stage. Nothing is copied to form
windows where one window covers the map: in 46 of G's 50 blocks at 256 pixels.

State-dict names are those of timm's ``swin_transformer_v2``, so weights go there and come back without
renaming; the norms on the stream, which timm lacks there, are ``norm3``, as in its ``swin_transformer_v2_cr``
(whose weights do not fit here: another bias, another merging). ``official_state_dict`` reads Microsoft's
files.

Left to others: pixel normalisation, the projector, pooling, heads, how attention is computed (``Ops``).

Source: "Swin Transformer V2: Scaling Up Capacity and Resolution" (arXiv 2111.09883), "the paper" below, and
the released code where they differ (16 sigmoid and base-2 logarithm in the position bias).
Shapes: B images, L tokens of a map row by row, C channels, W windows of an image, N tokens of a window,
H heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError, near_misses
from models.ops import DEFAULT_OPS, Ops
from models.vit import QkvProduct

Size = tuple[int, int]
"""(height, width)."""

PATCH = 4
MLP_RATIO = 4
CPB_HIDDEN = 512
INIT_STD = 0.02
MAX_LOG_SCALE = math.log(100)
"""Upper clamp of the logarithm of the logit scale (paper, section 3.2: a temperature of 0.01 or more)."""
SHIFT_PENALTY = -100.0
"""Added to the logit of two tokens that only the cyclic shift brought into one window."""
POSITION_BIASES = ("block", "stage")
"""Who owns a CPB MLP: each block, as in the paper, or each stage for all its blocks."""

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "swinv2_micro": {"width": 32, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 4, 8)},
    "swinv2_tiny": {"width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "swinv2_small": {"width": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "swinv2_base": {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "swinv2_large": {"width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
    "swinv2_huge": {
        "width": 352,
        "depths": (2, 2, 18, 2),
        "num_heads": (11, 22, 44, 88),
        "extra_norm_every": 6,
    },
    "swinv2_g": {
        "width": 512,
        "depths": (2, 2, 42, 4),
        "num_heads": (16, 32, 64, 128),
        "extra_norm_every": 6,
    },
}
"""Arguments of ``SwinV2`` by name, from the paper's section 3.4; heads of 32 channels throughout the family.
``swinv2_micro`` is ours, for trials on a CPU."""


def build(name: str, *, input_size: int | Size, drop_path: float = 0.0, **changes: Any) -> SwinV2:
    """The network ``name`` with random weights; ``changes`` replace or join its arguments in ``CONFIGS``."""
    if name not in CONFIGS:
        raise ModelError(
            f"unknown Swin V2 {name!r}{near_misses(name, CONFIGS)} (there are: {', '.join(CONFIGS)})"
        )
    return SwinV2(input_size=input_size, drop_path=drop_path, **{**CONFIGS[name], **changes})


# Geometry: windows, shifts, offsets.


def to_windows(x_BLC: Tensor, map_size: Size, window: Size) -> Tensor:
    """The map cut into windows, (B W, N, C), windows row by row; a view where they span the map's width."""
    (height, width), (rows, columns), channels = map_size, window, x_BLC.shape[-1]
    tiles = x_BLC.reshape(-1, height // rows, rows, width // columns, columns, channels)
    return tiles.transpose(2, 3).reshape(-1, rows * columns, channels)


def from_windows(x_WNC: Tensor, map_size: Size, window: Size) -> Tensor:
    """The inverse of ``to_windows``, (B, L, C)."""
    (height, width), (rows, columns), channels = map_size, window, x_WNC.shape[-1]
    tiles = x_WNC.reshape(-1, height // rows, width // columns, rows, columns, channels)
    return tiles.transpose(2, 3).reshape(-1, height * width, channels)


def roll_map(x_BLC: Tensor, map_size: Size, shift: Size) -> Tensor:
    """The map rolled cyclically by ``shift``, towards the bottom right."""
    return x_BLC.unflatten(1, map_size).roll(shift, dims=(1, 2)).flatten(1, 2)


def shift_regions(map_size: Size, window: Size, shift: Size) -> Tensor:
    """The region of the image that each token of each window comes from after a roll by ``-shift``: uint8
    (W, N).

    Two tokens of a window are neighbours in the image exactly when their regions are equal.
    """

    def labels(size: int, side: int, step: int) -> Tensor:
        place = torch.arange(size)
        return (place >= size - side).to(torch.uint8) + (place >= size - step).to(torch.uint8)

    rows, columns = (labels(*sizes) for sizes in zip(map_size, window, shift, strict=True))
    region_BLC = (3 * rows[:, None] + columns).reshape(1, -1, 1)
    return to_windows(region_BLC, map_size, window).squeeze(2)


def log_offsets(window: Size, pretrained: Size) -> Tensor:
    """Offsets between the tokens of a window, log-spaced: float32 (2 h - 1, 2 w - 1, 2), vertical first.

    An offset is measured in eighths of the largest one in the window that the weights were trained at,
    ``pretrained``, so that an offset seen in training has the same bias in any window; then compressed to
    sign(x) log2(1 + |x|) / 3 (paper, section 3.3, with the constants of the released code).
    """

    def axis(side: int, trained: int) -> Tensor:
        offset = torch.arange(1 - side, side, dtype=torch.float32) / max(trained - 1, 1) * 8
        return offset.sign() * torch.log2(offset.abs() + 1) / 3

    vertical, horizontal = (axis(*sides) for sides in zip(window, pretrained, strict=True))
    return torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij"), dim=-1)


# Modules.


class PositionBias(nn.Sequential):
    """The CPB MLP: from offsets to a bias between 0 and 16 for each head and pair of tokens."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(
            nn.Linear(2, CPB_HIDDEN), nn.ReLU(inplace=True), nn.Linear(CPB_HIDDEN, num_heads, bias=False)
        )

    def forward(self, offsets: Tensor) -> Tensor:
        """(H, N, N), query row and key column, in float32 or better; ``offsets`` from ``log_offsets``."""
        rows, columns = ((size + 1) // 2 for size in offsets.shape[:2])
        table = super().forward(offsets).permute(2, 0, 1)
        table = 16 * table.to(torch.promote_types(table.dtype, torch.float32)).sigmoid()
        # Query (i, j) and key (k, l) have table[i - k + rows - 1, j - l + columns - 1]: a window that slides
        # over the reversed table. Unlike an indexed gather it needs no (N, N) index, and its gradient no
        # atomic additions.
        bias = table.flip(1, 2).unfold(1, rows, 1).unfold(2, columns, 1).flip(1, 2)
        return bias.reshape(-1, rows * columns, rows * columns)


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows (paper, section 3.2)."""

    cpb_mlp: PositionBias | None

    def __init__(
        self, dim: int, num_heads: int, *, num_windows: int, own_bias: bool, sequential: bool, ops: Ops
    ) -> None:
        super().__init__()
        self.num_heads, self.num_windows, self.ops = num_heads, num_windows, ops
        self.sequential = sequential and num_windows > 1
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.cpb_mlp = PositionBias(num_heads) if own_bias else None
        self.qkv = QkvProduct(dim)
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_WNC: Tensor, position: Tensor, regions_WN: Tensor | None) -> Tensor:
        """(B W, N, C) to the same. ``position``: the offsets, or, where the stage owns the CPB MLP, the bias
        (H, N, N) itself. ``regions_WN``: given where the windows are shifted."""
        bias_HNN = position if self.cpb_mlp is None else self.cpb_mlp(position)
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(x_WNC, qkv_bias).unflatten(-1, (3, self.num_heads, -1))
        q, k, v_BWNHD = qkv.unflatten(0, (-1, self.num_windows)).unbind(3)
        scale_H1 = self.logit_scale.squeeze(-1).to(bias_HNN.dtype).clamp(max=MAX_LOG_SCALE).exp()
        q_BWNHD, k_BWNHD = _with_length(q, scale_H1), _with_length(k, torch.ones_like(scale_H1))
        attend = self._one_by_one if self.sequential else self._attend
        return self.proj(attend(q_BWNHD, k_BWNHD, v_BWNHD, bias_HNN, regions_WN).reshape(x_WNC.shape))

    def _attend(
        self, q_BWNHD: Tensor, k_BWNHD: Tensor, v_BWNHD: Tensor, bias_HNN: Tensor, regions_WN: Tensor | None
    ) -> Tensor:
        """All windows at once, (B, W, N, H, D): as further images where they share the bias, as further heads
        where the shift gives each its own, so that no bias grows with B."""
        qkv = (q_BWNHD, k_BWNHD, v_BWNHD)
        if regions_WN is None:
            q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in qkv)
            mixed = self.ops.attention(q, k, v, bias_HNN[None], scale=1.0)
            return mixed.transpose(1, 2).unflatten(0, q_BWNHD.shape[:2])
        apart_WNN = regions_WN[:, :, None] != regions_WN[:, None, :]
        bias = (bias_HNN + SHIFT_PENALTY * apart_WNN[:, None]).flatten(0, 1)
        q, k, v = (x.transpose(2, 3).flatten(1, 2) for x in qkv)
        mixed = self.ops.attention(q, k, v, bias[None], scale=1.0)
        return mixed.unflatten(1, (-1, self.num_heads)).transpose(2, 3)

    def _one_by_one(
        self, q_BWNHD: Tensor, k_BWNHD: Tensor, v_BWNHD: Tensor, bias_HNN: Tensor, regions_WN: Tensor | None
    ) -> Tensor:
        """``_attend``, a window at a time, and once more in the backward pass: logits and penalties of one
        window only are ever held (paper, section 3.5, sequential self-attention)."""
        windows = [x.split(1, dim=1) for x in (q_BWNHD, k_BWNHD, v_BWNHD)]
        regions = [None] * self.num_windows if regions_WN is None else regions_WN.split(1)
        mixed = [
            checkpoint(self._attend, q, k, v, bias_HNN, region, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else self._attend(q, k, v, bias_HNN, region)
            for q, k, v, region in zip(*windows, regions, strict=True)
        ]
        return torch.cat(mixed, dim=1)


def _with_length(x_BWNHD: Tensor, length_H1: Tensor) -> Tensor:
    """``x`` scaled to ``length`` along D. The factor keeps the dtype of ``length``: rounded to bfloat16 it
    would move all logits of a token together, by up to 0.2 at the largest scale."""
    norm = torch.linalg.vector_norm(x_BWNHD, dim=-1, keepdim=True, dtype=length_H1.dtype)
    return (x_BWNHD * (length_H1 / norm.clamp_min(1e-12))).to(x_BWNHD.dtype)


class Block(nn.Module):
    """Attention and MLP, each normalised at its end (paper, section 3.2: residual post-norm); with
    ``extra_norm`` the stream is normalised too."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        map_size: Size,
        window: Size,
        shift: Size,
        drop_path: float,
        extra_norm: bool,
        own_bias: bool,
        sequential: bool,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.map_size, self.window, self.shift = map_size, window, shift
        num_windows = (map_size[0] // window[0]) * (map_size[1] // window[1])
        self.attn = WindowAttention(
            dim, num_heads, num_windows=num_windows, own_bias=own_bias, sequential=sequential, ops=ops
        )
        self.norm1 = nn.LayerNorm(dim)
        self.drop_path1 = DropPath(drop_path)
        self.mlp = Mlp(dim, hidden_features=MLP_RATIO * dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path2 = DropPath(drop_path)
        self.norm3 = nn.LayerNorm(dim) if extra_norm else nn.Identity()

    def forward(self, x_BLC: Tensor, position: Tensor, regions_WN: Tensor) -> Tensor:
        """(B, L, C) to the same. ``position`` as in ``WindowAttention``; ``regions_WN``: of the stage's
        shifted windows."""
        x_BLC = x_BLC + self.drop_path1(self.norm1(self._attention(x_BLC, position, regions_WN)))
        x_BLC = x_BLC + self.drop_path2(self.norm2(self.mlp(x_BLC)))
        return self.norm3(x_BLC)

    def _attention(self, x_BLC: Tensor, position: Tensor, regions_WN: Tensor) -> Tensor:
        if not any(self.shift):
            x_WNC = self.attn(to_windows(x_BLC, self.map_size, self.window), position, None)
            return from_windows(x_WNC, self.map_size, self.window)
        x_BLC = roll_map(x_BLC, self.map_size, (-self.shift[0], -self.shift[1]))
        x_WNC = self.attn(to_windows(x_BLC, self.map_size, self.window), position, regions_WN)
        return roll_map(from_windows(x_WNC, self.map_size, self.window), self.map_size, self.shift)


class PatchMerging(nn.Module):
    """Four neighbours of a map of ``map_size`` become one token of ``out_dim`` channels, normalised last."""

    def __init__(self, dim: int, out_dim: int, *, map_size: Size) -> None:
        super().__init__()
        self.map_size = map_size
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to (B, L / 4, ``out_dim``)."""
        (height, width), (batch, _, channels) = self.map_size, x_BLC.shape
        quads = x_BLC.reshape(batch, height // 2, 2, width // 2, 2, channels)
        # The four neighbours column by column, as the released weights have them.
        quads = quads.permute(0, 1, 3, 4, 2, 5).reshape(batch, -1, 4 * channels)
        return self.norm(self.reduction(quads))


class Stage(nn.Module):
    """The blocks of one map, after the merging that makes it (all stages but the first)."""

    offsets: Tensor
    regions: Tensor
    cpb_mlp: PositionBias | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        in_dim: int,
        map_size: Size,
        window: Size,
        pretrained_window: int,
        drop_paths: Sequence[float],
        extra_norm_every: int,
        position_bias: str,
        sequential: bool,
        ops: Ops,
    ) -> None:
        super().__init__()
        # Along a side that one window covers there is nothing to shift to.
        rows, columns = (
            0 if side == size else side // 2 for side, size in zip(window, map_size, strict=True)
        )
        self.map_size, self.window, self.shift = map_size, window, (rows, columns)
        self.pretrained = (pretrained_window, pretrained_window) if pretrained_window else window
        self.checkpointed: frozenset[int] = frozenset()
        finer = (2 * map_size[0], 2 * map_size[1])
        self.downsample = nn.Identity() if in_dim == dim else PatchMerging(in_dim, dim, map_size=finer)
        self.cpb_mlp = PositionBias(num_heads) if position_bias == "stage" else None
        self.blocks = nn.ModuleList(
            Block(
                dim,
                num_heads,
                map_size=map_size,
                window=window,
                shift=self.shift if index % 2 else (0, 0),
                drop_path=drop_path,
                extra_norm=extra_norm_every > 0 and (index + 1) % extra_norm_every == 0,
                own_bias=position_bias == "block",
                sequential=sequential,
                ops=ops,
            )
            for index, drop_path in enumerate(drop_paths)
        )
        self.register_buffer("offsets", log_offsets(window, self.pretrained), persistent=False)
        self.register_buffer("regions", shift_regions(map_size, window, self.shift), persistent=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) of this stage's map, from the map of the stage before."""
        x_BLC = self.downsample(x_BLC)
        # A shared bias is computed once, by its owner, and handed on as an argument: sharded parameters
        # (ZeRO) are then seen once, whatever is recomputed.
        position = self.offsets if self.cpb_mlp is None else self.cpb_mlp(self.offsets)
        for index, block in enumerate(self.blocks):
            if index in self.checkpointed and torch.is_grad_enabled():
                x_BLC = checkpoint(block, x_BLC, position, self.regions, use_reentrant=False)
            else:
                x_BLC = block(x_BLC, position, self.regions)
        return x_BLC

    def reset_buffers(self) -> None:
        """Give the buffers, which no state dict holds, their values."""
        self.offsets.copy_(log_offsets(self.window, self.pretrained))
        self.regions.copy_(shift_regions(self.map_size, self.window, self.shift))


class SwinV2(nn.Module):
    """Swin Transformer V2: normalised pixels (B, 3, height, width) to tokens (B, N, D) after the final norm.

    ``input_size``: side of the square input, pixels, or (height, width); multiples of ``patch_size``, the
        total stride.
    ``width``: channels of the first stage, doubled by each later one. ``depths``, ``num_heads``: per stage.
    ``window_size``: side of the windows, or (height, width), in tokens; a map that is not larger is one
        window and is not shifted. None: the map of the third stage, as in the papers (192 pixels: 12,
        256: 16, 384: 24).
    ``pretrained_window_sizes``: per stage, the window side that the weights were trained at, which carries
        their position bias over to other windows; 0: this network's own.
    ``extra_norm_every``: a norm on the residual stream after each so many blocks of a stage; 0: none.
    ``position_bias``: who owns a CPB MLP, "block" or "stage".
    ``residual_norm_weight``: initial weight of the norms that end the branches. 0 makes every block the
        identity at first (official code); the released FD code has 1e-5.
    ``sequential_stages``: stages, from 0, whose windows attend one at a time: the same results in less
        memory, for high resolution (the paper: the first two of G at 1536 pixels).
    ``drop_path``: stochastic depth rate of the last block, linear over depth from 0. ``ops``: hot operations.

    Raises ``ModelError`` for arguments that do not fit each other.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        *,
        input_size: int | Size,
        width: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int | Size | None = None,
        pretrained_window_sizes: Sequence[int] = (0, 0, 0, 0),
        extra_norm_every: int = 0,
        position_bias: str = "block",
        residual_norm_weight: float = 0.0,
        sequential_stages: Collection[int] = (),
        drop_path: float = 0.0,
        ops: Ops = DEFAULT_OPS,
    ) -> None:
        super().__init__()
        _check_stages(depths, num_heads, width, pretrained_window_sizes)
        _check_stage_numbers("sequential_stages", sequential_stages, len(depths))
        _check_choices(position_bias, extra_norm_every, drop_path)
        maps = _maps(input_size, num_stages=len(depths))
        windows = _windows(window_size, maps)
        widths = [width * 2**stage for stage in range(len(depths))]
        self.input_size, self.residual_norm_weight = input_size, residual_norm_weight
        self.image: Size = (PATCH * maps[0][0], PATCH * maps[0][1])
        self.patch_size, self.grid, self.embed_dim = self.image[0] // maps[-1][0], maps[-1], widths[-1]

        self.patch_embed = PatchEmbed(self.image, PATCH, embed_dim=width, norm_layer=nn.LayerNorm)
        rates = iter(drop_path * block / max(sum(depths) - 1, 1) for block in range(sum(depths)))
        self.layers = nn.ModuleList(
            Stage(
                widths[stage],
                num_heads[stage],
                in_dim=widths[max(stage - 1, 0)],
                map_size=maps[stage],
                window=windows[stage],
                pretrained_window=pretrained_window_sizes[stage],
                drop_paths=[next(rates) for _ in range(depth)],
                extra_norm_every=extra_norm_every,
                position_bias=position_bias,
                sequential=stage in sequential_stages,
                ops=ops,
            )
            for stage, depth in enumerate(depths)
        )
        self.norm = nn.LayerNorm(self.embed_dim)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew and fill all buffers; call it after ``to_empty`` of a network built on the
        meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, WindowAttention):
                nn.init.constant_(module.logit_scale, math.log(10))
                nn.init.zeros_(module.q_bias)
                nn.init.zeros_(module.v_bias)
            elif isinstance(module, Stage):
                module.reset_buffers()
        for module in self.modules():
            if isinstance(module, Block):
                nn.init.constant_(module.norm1.weight, self.residual_norm_weight)
                nn.init.constant_(module.norm2.weight, self.residual_norm_weight)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, N, ``embed_dim``): the last map, row by row, after the final norm."""
        return self.norm(self.forward_stages(pixels_BCHW)[-1])

    def forward_stages(self, pixels_BCHW: Tensor) -> tuple[Tensor, ...]:
        """The map of each stage, (B, L, C), before the final norm; each half as high, half as wide and twice
        as deep as the one before."""
        if pixels_BCHW.shape[1:] != (3, *self.image):
            raise ModelError(
                f"pixels of shape {tuple(pixels_BCHW.shape)} are not (B, 3, {self.image[0]}, "
                f"{self.image[1]}): resize them, or build the network with another input_size"
            )
        x_BLC = self.patch_embed(pixels_BCHW)
        maps = []
        for stage in self.layers:
            x_BLC = stage(x_BLC)
            maps.append(x_BLC)
        return tuple(maps)

    def set_grad_checkpointing(
        self, enable: bool = True, *, every: int = 1, stages: Collection[int] | None = None
    ) -> None:
        """Recompute blocks in the backward pass instead of keeping what they computed (non-reentrant).

        ``every``: only the first of each so many blocks of a stage. ``stages``: only these, counted from 0.
        """
        if every < 1:
            raise ModelError(f"every={every} must be 1 or more blocks")
        _check_stage_numbers("stages", stages or (), len(self.layers))
        all_stages = [module for module in self.layers if isinstance(module, Stage)]
        for number, stage in enumerate(all_stages):
            chosen = enable and (stages is None or number in stages)
            stage.checkpointed = frozenset(range(0, len(stage.blocks), every) if chosen else ())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the released code does not decay: CPB MLPs and logit scales. (Biases
        and norms are the optimizer's rule.)"""
        scales = {name for name, _ in self.named_parameters() if name.endswith("logit_scale")}
        return scales | self.position_parameters()

    def position_parameters(self) -> set[str]:
        """Names of the parameters of the relative positions: the CPB MLPs."""
        return {name for name, _ in self.named_parameters() if ".cpb_mlp." in name}


# Arguments.


def _maps(input_size: int | Size, num_stages: int) -> list[Size]:
    """The map of each stage, in tokens."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    stride = PATCH << (num_stages - 1)
    for side in (height, width):
        if side < stride or side % stride:
            near = sorted({max(side // stride, 1) * stride, (max(side, 0) // stride + 1) * stride})
            raise ModelError(
                f"input_size={input_size}: {side} is not a multiple of the total stride, {stride} pixels; "
                f"try {' or '.join(map(str, near))}"
            )
    return [(height // (PATCH << stage), width // (PATCH << stage)) for stage in range(num_stages)]


def _windows(window_size: int | Size | None, maps: Sequence[Size]) -> list[Size]:
    """The window of each stage: ``window_size``, or the map where that is not larger."""
    if window_size is None:
        window_size = maps[min(2, len(maps) - 1)]
    rows, columns = (window_size, window_size) if isinstance(window_size, int) else window_size
    if min(rows, columns) < 1:
        raise ModelError(f"window_size={window_size} must be 1 token or more")
    windows = [(min(rows, height), min(columns, width)) for height, width in maps]
    for map_size, window in zip(maps, windows, strict=True):
        if map_size[0] % window[0] or map_size[1] % window[1]:
            sides = [size for map_size in maps for size in map_size]
            fits = [n for n in range(1, max(sides) + 1) if all(size <= n or size % n == 0 for size in sides)]
            raise ModelError(
                f"window_size={window_size} does not tile the {map_size[0]}x{map_size[1]} map of a stage; "
                f"this input_size takes {', '.join(map(str, fits))}"
            )
    return windows


def _check_stages(
    depths: Sequence[int], num_heads: Sequence[int], width: int, pretrained_window_sizes: Sequence[int]
) -> None:
    if not depths or min(depths) < 1:
        raise ModelError(f"depths={tuple(depths)}: there must be stages, and each needs a block")
    per_stage = {"num_heads": num_heads, "pretrained_window_sizes": pretrained_window_sizes}
    for name, values in per_stage.items():
        if len(values) != len(depths):
            raise ModelError(f"{name}={tuple(values)} must have one value per stage: depths={tuple(depths)}")
    for stage, heads in enumerate(num_heads):
        if heads < 1 or (width << stage) % heads:
            raise ModelError(
                f"num_heads={tuple(num_heads)}: {heads} does not divide {width << stage} channels"
            )
    if min(pretrained_window_sizes) < 0:
        raise ModelError(
            f"pretrained_window_sizes={tuple(pretrained_window_sizes)} must be window sides, or 0 for its own"
        )


def _check_stage_numbers(name: str, stages: Collection[int], num_stages: int) -> None:
    if any(stage not in range(num_stages) for stage in stages):
        raise ModelError(f"{name}={tuple(stages)}: the stages are 0 to {num_stages - 1}")


def _check_choices(position_bias: str, extra_norm_every: int, drop_path: float) -> None:
    if position_bias not in POSITION_BIASES:
        raise ModelError(f"position_bias={position_bias!r} must be one of {', '.join(POSITION_BIASES)}")
    if extra_norm_every < 0:
        raise ModelError(f"extra_norm_every={extra_norm_every} must be a number of blocks, or 0 for none")
    if not 0 <= drop_path < 1:
        raise ModelError(f"drop_path={drop_path} must be at least 0 and below 1")


# Weights from elsewhere.


def official_state_dict(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a state dict of Microsoft's Swin V2, or of timm's, under this module's names.

    ``state``: the content of the file; the weights may lie under "model". Left out are the classifier and the
    tables that are computed here. Microsoft merges patches at the end of a stage, timm and this module at the
    start of the next.
    """
    state = state.get("model", state)
    later = 1 if "layers.0.downsample.reduction.weight" in state else 0
    weights = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "head" or parts[-1] in (
            "relative_position_index",
            "relative_coords_table",
            "attn_mask",
        ):
            continue
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) + later)
        weights[".".join(parts)] = value
    return weights


def unshare_position_bias(state: Mapping[str, Tensor], depths: Sequence[int]) -> dict[str, Tensor]:
    """A state dict of ``position_bias="stage"`` as one of "block": each block gets its stage's CPB MLP."""
    weights = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "cpb_mlp":
            stage, owned = int(parts[1]), ".".join(parts[2:])
            for block in range(depths[stage]):
                weights[f"layers.{stage}.blocks.{block}.attn.{owned}"] = value.clone()
        else:
            weights[name] = value
    return weights
