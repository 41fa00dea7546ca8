"""The ViT student of feature distillation: a pre-norm ViT whose blocks share one table of relative positions.

State-dict names are those of timm's ``Beit``, so weights go there and come back without renaming;
``export_hint`` says with which arguments. It differs from timm's in what is handed in (``Ops``), in the
papers' initialisation, and in one rule: a tensor that many blocks use, the shared position bias, is computed
once by its owner and passed to them as an argument, so that activation checkpointing and sharded parameters
(ZeRO) see its parameter used exactly once.

Left to others: pixel normalisation, the projector, pooling, heads, resizing a position table to another grid.

Sources: FD paper (arXiv 2205.14141), section 3, and its released code for what the paper leaves out.
Shapes: B batch, C colours, N tokens (class token first, then patches row by row), D width, H heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError, near_misses
from models.ops import DEFAULT_OPS, Ops, gather_bias, relative_position_index, relative_position_rows

POSITIONS = ("shared_rpb", "rpb", "ape")
"""One relative table for all blocks (the papers' best), one per block, or an absolute table at the input."""

NORM_EPS = 1e-6
INIT_STD = 0.02
"""Before the cut at one std, which leaves 0.0108."""
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


class SharedPositionBias(nn.Module):
    """The one relative position table, which starts at zero, and its gather."""

    relative_position_index: Tensor

    def __init__(self, grid: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(relative_position_rows(grid), num_heads))
        self.register_buffer("relative_position_index", relative_position_index(grid), persistent=False)

    def forward(self) -> Tensor:
        """(1, H, N, N), to be added to the scaled logits."""
        return gather_bias(self.relative_position_bias_table, self.relative_position_index)


class QkvProduct(nn.Linear):
    """Query, key and value in one product, whose bias is an argument because the key has none.

    The weight is read in this module's own forward, which is where ZeRO-3 gathers it.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width, bias=False)

    def forward(self, tokens_BND: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        """(B, N, 3 D)."""
        return F.linear(tokens_BND, self.weight, bias)


class Attention(nn.Module):
    """Self-attention with a bias for q and v, and a position table of its own where ``grid`` is given."""

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor | None

    def __init__(self, width: int, num_heads: int, *, grid: tuple[int, int] | None, ops: Ops) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.ops = ops
        self.qkv = QkvProduct(width)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)
        table = index = None
        if grid is not None:
            table = nn.Parameter(torch.zeros(relative_position_rows(grid), num_heads))
            index = relative_position_index(grid)
        self.register_parameter("relative_position_bias_table", table)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, tokens_BND: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D); ``bias`` is the shared position bias (1, H, N, N), if there is one."""
        batch, num_tokens, width = tokens_BND.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = self.qkv(tokens_BND, qkv_bias).view(batch, num_tokens, 3, self.num_heads, -1)
        query_BHND, key_BHND, value_BHND = qkv.permute(2, 0, 3, 1, 4)
        if self.relative_position_bias_table is not None and self.relative_position_index is not None:
            bias = gather_bias(self.relative_position_bias_table, self.relative_position_index)
        mixed_BHND = self.ops.attention(query_BHND, key_BHND, value_BHND, bias, scale=self.scale)
        return self.proj(mixed_BHND.transpose(1, 2).reshape(batch, num_tokens, width))


class Block(nn.Module):
    """Attention and MLP, each normalised before, scaled per channel and dropped per sample after."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        grid: tuple[int, int] | None,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, grid=grid, ops=ops)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden_features=int(width * mlp_ratio))
        self.drop_path2 = DropPath(drop_path)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((width,), float(layer_scale)))
            self.register_parameter(name, gamma)

    def forward(self, tokens_BND: Tensor, bias: Tensor | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        attended = self.attn(self.norm1(tokens_BND), bias)
        tokens_BND = tokens_BND + self.drop_path1(_scaled(attended, self.gamma_1))
        return tokens_BND + self.drop_path2(_scaled(self.mlp(self.norm2(tokens_BND)), self.gamma_2))


def _scaled(branch_BND: Tensor, gamma: Tensor | None) -> Tensor:
    return branch_BND if gamma is None else gamma * branch_BND


class VisionTransformer(nn.Module):
    """Normalised pixels (B, 3, S, S) to tokens (B, N, D) after the final norm, the class token first.

    ``layer_scale`` is the initial value of the per-channel scale of each branch (0.1 in the released code),
    or None for no scale; ``drop_path`` is the rate of the last block, linear from 0 over depth. Raises
    ``ModelError`` for arguments that do not fit each other.
    """

    pos_embed: nn.Parameter | None

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        position: str = "shared_rpb",
        layer_scale: float | None = 0.1,
        drop_path: float = 0.0,
        input_size: int = 224,
        ops: Ops = DEFAULT_OPS,
    ) -> None:
        super().__init__()
        _check_sizes(
            input_size=input_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
        )
        _check_rates(layer_scale=layer_scale, drop_path=drop_path)
        if not (_is_number(mlp_ratio) and int(embed_dim * mlp_ratio) >= 1):
            raise ModelError(
                f"mlp_ratio={mlp_ratio!r} must give the MLP of embed_dim={embed_dim} a width of 1 or more"
            )
        if position not in POSITIONS:
            raise ModelError(
                f"position={position!r} is unknown{near_misses(str(position), POSITIONS)} "
                f"(positions: {', '.join(POSITIONS)})"
            )
        self.embed_dim = embed_dim
        self.input_size = input_size
        self.patch_size = patch_size
        self.grid = (input_size // patch_size, input_size // patch_size)
        self.num_prefix_tokens = 1
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.layer_scale = layer_scale
        self.position = position
        self.checkpointed: frozenset[int] = frozenset()

        self.patch_embed = PatchEmbed(img_size=input_size, patch_size=patch_size, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_tokens = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        absolute = nn.Parameter(torch.zeros(1, num_tokens, embed_dim)) if position == "ape" else None
        self.register_parameter("pos_embed", absolute)
        self.rel_pos_bias = SharedPositionBias(self.grid, num_heads) if position == "shared_rpb" else None
        blocks = [
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                drop_path=rate,
                grid=self.grid if position == "rpb" else None,
                ops=ops,
            )
            for rate in calculate_drop_path_rates(drop_path, depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self._initialise(blocks)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, N, D) after the final norm, on all tokens. Raises ``ModelError`` for another input size."""
        if pixels_BCHW.shape[-2:] != (self.input_size, self.input_size):
            raise ModelError(
                f"pixels of shape {tuple(pixels_BCHW.shape)} reached a ViT built with "
                f"input_size={self.input_size}: resize them, or build it for that size"
            )
        patches_BND = self.patch_embed(pixels_BCHW)
        tokens_BND = torch.cat((self.cls_token.expand(len(patches_BND), -1, -1), patches_BND), dim=1)
        if self.pos_embed is not None:
            tokens_BND = tokens_BND + self.pos_embed
        bias = self.rel_pos_bias() if self.rel_pos_bias is not None else None
        for index, block in enumerate(self.blocks):
            if index in self.checkpointed and torch.is_grad_enabled():
                # The re-entrant form would fire ZeRO's gradient hook of the shared table once per block.
                tokens_BND = checkpoint(block, tokens_BND, bias, use_reentrant=False)
            else:
                tokens_BND = block(tokens_BND, bias)
        return self.norm(tokens_BND)

    def set_grad_checkpointing(self, enable: bool = True, *, every: int = 1) -> None:
        """Recompute blocks in the backward pass, with the same random drops, instead of storing them.

        ``every``: only the first of each so many blocks.
        """
        if every < 1:
            raise ModelError(f"every={every} must be 1 or more blocks")
        self.checkpointed = frozenset(range(0, len(self.blocks), every) if enable else ())

    def position_parameters(self) -> set[str]:
        """Names of the relative position tables, whose decay is a choice: FD decays them, FT-CLIP not."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def no_weight_decay(self) -> set[str]:
        """Names of all that is never decayed: biases, norms, scales, the class token, absolute positions.

        The whole set, by what a parameter is: its number of dimensions would change under sharding.
        """
        products = {
            f"{name}.weight" for name, m in self.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
        }
        return {name for name, _ in self.named_parameters()} - products - self.position_parameters()

    def _initialise(self, blocks: list[Block]) -> None:
        """As released: a normal of std 0.02 cut at one std, branch outputs divided by sqrt(2 layer)."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _truncated_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _truncated_normal_(self.cls_token)
        if self.pos_embed is not None:
            _truncated_normal_(self.pos_embed)
        with torch.no_grad():
            for layer, block in enumerate(blocks, start=1):
                block.attn.proj.weight.div_(math.sqrt(2 * layer))
                block.mlp.fc2.weight.div_(math.sqrt(2 * layer))


def _truncated_normal_(weight: Tensor) -> None:
    trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)


def _check_sizes(*, input_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int) -> None:
    given = {
        "input_size": input_size,
        "patch_size": patch_size,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_heads": num_heads,
    }
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise ModelError(f"{name}={value!r} must be a whole number, 1 or more")
    if input_size % patch_size:
        below, above = input_size // patch_size * patch_size, -(-input_size // patch_size) * patch_size
        fits = f"{below} or {above}" if below else f"{above}"
        raise ModelError(
            f"input_size={input_size} is not a multiple of patch_size={patch_size}: {fits} would be"
        )
    if embed_dim % num_heads:
        fits = ", ".join(str(n) for n in range(1, embed_dim + 1) if embed_dim % n == 0)
        raise ModelError(f"num_heads={num_heads} does not divide embed_dim={embed_dim}; these do: {fits}")


def _check_rates(*, layer_scale: float | None, drop_path: float) -> None:
    if layer_scale is not None and not (_is_number(layer_scale) and layer_scale > 0):
        raise ModelError(f"layer_scale={layer_scale!r} must be a number above 0, or None for no LayerScale")
    if not (_is_number(drop_path) and 0 <= drop_path < 1):
        raise ModelError(f"drop_path={drop_path!r} must be a rate of at least 0 and below 1")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def unshare(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a ``shared_rpb`` ViT as those of an ``rpb`` one: a copy of the table for every block.

    What the released code does between distilling and fine-tuning; the network computes the same. Raises
    ``ModelError`` where there is no shared table.
    """
    if SHARED_TABLE not in state_dict:
        raise ModelError(f"these weights hold no {SHARED_TABLE!r}, so there is nothing to un-share")
    blocks = {found[1] for name in state_dict if (found := re.match(r"blocks\.(\d+)\.", name))}
    weights = {name: value for name, value in state_dict.items() if name != SHARED_TABLE}
    for block in sorted(blocks, key=int):
        weights[f"blocks.{block}.attn.relative_position_bias_table"] = state_dict[SHARED_TABLE].clone()
    return weights


def export_hint(model: VisionTransformer) -> dict[str, Any]:
    """How timm builds the network that takes this state dict, every name matched.

    ``timm.create_model(hint["architecture"], checkpoint_path=file, **hint["arguments"])``; called, it returns
    the same tokens as ``model``. The architecture is timm's one BEiT entry for all sizes, since the arguments
    carry every size.
    """
    return {
        "architecture": "beit_base_patch16_224",
        "arguments": {
            "img_size": model.input_size,
            "patch_size": model.patch_size,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": model.num_heads,
            "mlp_ratio": model.mlp_ratio,
            # timm drops an argument that is None and would fall back to its own scale; zero means none to it.
            "init_values": model.layer_scale or 0.0,
            "use_abs_pos_emb": model.position == "ape",
            "use_rel_pos_bias": model.position == "rpb",
            "use_shared_rel_pos_bias": model.position == "shared_rpb",
            "num_classes": 0,
            "global_pool": "",
        },
    }
