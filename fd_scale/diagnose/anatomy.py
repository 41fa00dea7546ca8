"""Where in a network is attention, between which tokens, and which tokens come out of its blocks?

Read off one grey image. What cannot be placed on a grid is named and left out, so that distances are in
pixels of the image or not given at all.

Shape letters: B images times windows, H heads, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from fd_scale.diagnose.capture import attention_maps, block_of, block_outputs
from fd_scale.diagnose.subjects import Subject

T = TypeVar("T")

OUTPUT = "output"
"""The name of the final map, after its norm, among the layers of tokens."""
MAX_TOKEN_LAYERS = 24
"""Blocks whose tokens are looked at, evenly spaced; their covariances are held at once."""
MAX_PREFIX_TOKENS = 32
"""More tokens beyond the final grid are no class token and registers, but another grid."""
MAP_SIZES = ("map_size", "input_resolution", "feat_size")
WINDOWS = ("window", "window_size")
"""What blocks with windows call the size of their map and of their windows: ``models``, timm's Swins."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention: the tokens that attend to each other, prefix tokens first, then a grid row by row."""

    name: str
    num_heads: int
    grid: tuple[int, int]
    """(height, width) in tokens: of the whole map, or of one window."""
    num_prefix_tokens: int
    patch_px: float
    """Side of a token in the input image, pixels."""
    is_windowed: bool

    @property
    def num_patches(self) -> int:
        """Tokens of the grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class TokenLayer:
    """The tokens (B, N, D) after a block: prefix tokens first, then a grid row by row."""

    name: str
    grid: tuple[int, int]
    num_prefix_tokens: int


@dataclass(frozen=True)
class Anatomy:
    """The layers of a network that can be looked at, in order of execution."""

    attention: tuple[AttentionLayer, ...]
    tokens: tuple[TokenLayer, ...]
    """Of blocks, and the final map as the last."""
    left_out: str
    """Attention that cannot be looked at, and why; empty where there is none such."""

    @property
    def is_windowed(self) -> bool:
        """Whether some attention is inside windows, so that distances are bounded by them."""
        return any(layer.is_windowed for layer in self.attention)


def anatomy(subject: Subject) -> Anatomy:
    """Look at a network with one grey image."""
    network = subject.network
    seen: dict[str, torch.Size] = {}
    outputs: dict[str, torch.Size] = {}
    size = subject.backbone.input_size
    grey = torch.full((1, 3, size, size), 128, dtype=torch.uint8)
    with attention_maps(network, partial(_note, seen)):
        subject.backbone.tokens(grey)
    blocks = list(dict.fromkeys(block_of(network, name) for name in seen))
    with block_outputs(network, blocks, partial(_note, outputs)):
        final = subject.backbone.tokens(grey)
    attention: list[AttentionLayer] = []
    faults: list[str] = []
    for name, shape in seen.items():
        try:
            attention.append(_attention_layer(network, name, shape, final.grid, size))
        except _UnplacedError as error:
            faults.append(str(error))
    placed = [_token_layer(network, name, shape, final.grid) for name, shape in outputs.items()]
    tokens = [layer for layer in placed if layer is not None]
    if not seen:
        faults.append(f"{type(network).__name__} has no attention that is known here")
    return Anatomy(
        attention=tuple(attention),
        tokens=(
            *evenly_spaced(tokens, MAX_TOKEN_LAYERS),
            TokenLayer(OUTPUT, final.grid, final.num_prefix_tokens),
        ),
        left_out="; ".join(faults),
    )


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` (2 or more) of the items, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def patches(tensor: Tensor, layer: AttentionLayer) -> Tensor:
    """Of maps (B, H, N, N) the part between patches, in float32 at least; prefix tokens are left out."""
    first = layer.num_prefix_tokens
    return tensor[..., first:, first:].to(torch.promote_types(tensor.dtype, torch.float32))


def _note(shapes: dict[str, torch.Size], name: str, tensor: Tensor) -> None:
    shapes.setdefault(name, tensor.shape)


class _UnplacedError(ValueError):
    """An attention between tokens that are not a known grid."""


def _attention_layer(
    network: nn.Module, name: str, shape: torch.Size, grid: tuple[int, int], size: int
) -> AttentionLayer:
    _, num_heads, num_queries, num_keys = shape
    if num_queries != num_keys:
        raise _UnplacedError(f"{name} attends from {num_queries} to {num_keys} tokens, not among the same")
    block = network.get_submodule(block_of(network, name))
    map_size = _size_of(block, MAP_SIZES)
    if map_size is not None:
        window = _size_of(block, WINDOWS)
        if window is None or window[0] * window[1] != num_queries:
            raise _UnplacedError(f"{name} attends among {num_queries} tokens, not a window of {window}")
        return AttentionLayer(name, num_heads, window, 0, size / map_size[0], is_windowed=True)
    num_prefix_tokens = num_queries - grid[0] * grid[1]
    if not 0 <= num_prefix_tokens <= MAX_PREFIX_TOKENS:
        raise _UnplacedError(
            f"{name} attends among {num_queries} tokens, which are not the final map's {grid[0]} x {grid[1]}"
        )
    return AttentionLayer(name, num_heads, grid, num_prefix_tokens, size / grid[0], is_windowed=False)


def _token_layer(
    network: nn.Module, name: str, shape: torch.Size, grid: tuple[int, int]
) -> TokenLayer | None:
    map_size = _size_of(network.get_submodule(name), MAP_SIZES) or grid
    num_prefix_tokens = shape[1] - map_size[0] * map_size[1]
    if not 0 <= num_prefix_tokens <= MAX_PREFIX_TOKENS:
        return None
    return TokenLayer(name, map_size, num_prefix_tokens)


def _size_of(block: nn.Module, names: Sequence[str]) -> tuple[int, int] | None:
    for name in names:
        value = getattr(block, name, None)
        if isinstance(value, int):
            return value, value
        if isinstance(value, Sequence) and len(value) == 2:
            return int(value[0]), int(value[1])
    return None
