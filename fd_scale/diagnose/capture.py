"""How do attention maps and tokens come out of a network while it runs, whoever built it?

Maps are handed over one layer at a time and never kept here: twelve layers of a ViT-B hold 22 MB per image.
Three kinds of attention are known: that of ``models``, which takes its operation as an argument; PyTorch's
own module (open_clip), whose map is computed once more from its input; and any module that drops entries
of its map (``attn_drop``: timm, open_clip's other towers), once its fused form is off. All of them give the
map after the softmax, position bias and masks included. When a context ends, the network is as it was.

Shape letters: B images times windows, H heads, N tokens that attend to each other, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.ops import Ops
from models.swinv2 import WindowAttention
from models.vit import Attention

Take = Callable[[str, Tensor], None]
"""Receives the name of a module in the network and what it computed."""

FUSED = ("fused_attn", "use_fsdpa")
"""Switches of timm's and of open_clip's modules; with these off, the map exists."""


@contextmanager
def attention_maps(network: nn.Module, take: Take) -> Iterator[None]:
    """While open, each attention that runs hands ``take`` its map (B, H, N, N), in order of execution.

    The rows of a map sum to 1. It is in float32 at least, but for timm's in a half-precision network, which
    is in the network's own precision. Attention of another kind is passed over.
    """
    with ExitStack() as ended:
        for name, module in network.named_modules():
            tap = _tap(module)
            if tap is not None:
                ended.enter_context(tap(module, partial(take, name)))
        yield


@contextmanager
def block_outputs(network: nn.Module, names: list[str], take: Take) -> Iterator[None]:
    """While open, each named module that runs hands ``take`` its output as tokens (B, N, D).

    A map that a module lays out as (B, height, width, D) comes row by row.
    """

    def hook(name: str, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            take(name, output.flatten(1, 2) if output.ndim == 4 else output)

    handles = [network.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def block_of(network: nn.Module, attention: str) -> str:
    """The name of the block that an attention belongs to: its nearest ancestor that is no list of modules."""
    name = attention.rpartition(".")[0]
    while name and isinstance(network.get_submodule(name), nn.ModuleList | nn.Sequential):
        name = name.rpartition(".")[0]
    return name


def _tap(module: nn.Module) -> Callable[[Any, Callable[[Tensor], None]], Any] | None:
    if isinstance(module, Attention | WindowAttention):
        return _own
    if isinstance(module, nn.MultiheadAttention):
        return _pytorch
    return _dropping if isinstance(getattr(module, "attn_drop", None), nn.Module) else None


@contextmanager
def _own(module: Attention | WindowAttention, take: Callable[[Tensor], None]) -> Iterator[None]:
    """The plain form of the operation, which shows its map. Shifted windows come as further heads
    (``models.swinv2``) and are handed over as further images."""

    def capturing(
        query_BHND: Tensor, key_BHMD: Tensor, value_BHMD: Tensor, bias: Tensor | None, *, scale: float
    ) -> Tensor:
        attention_BHNM = _softmax((query_BHND * scale) @ key_BHMD.transpose(-2, -1), bias)
        take(attention_BHNM.unflatten(1, (-1, module.num_heads)).flatten(0, 1))
        return attention_BHNM.to(value_BHMD.dtype) @ value_BHMD

    given: Ops = module.ops
    module.ops = replace(given, attention=capturing)
    try:
        yield
    finally:
        module.ops = given


@contextmanager
def _pytorch(module: nn.MultiheadAttention, take: Callable[[Tensor], None]) -> Iterator[None]:
    def before(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        tokens, key = positional[:2]
        if tokens is not key or module.in_proj_weight is None:
            return
        tokens_BND = tokens if module.batch_first else tokens.transpose(0, 1)
        projected = nn.functional.linear(tokens_BND, module.in_proj_weight, module.in_proj_bias)
        heads = projected.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_BHND, key_BHND = heads[0] * module.head_dim**-0.5, heads[1]
        take(_softmax(query_BHND @ key_BHND.transpose(-2, -1), keywords.get("attn_mask")))

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _dropping(module: nn.Module, take: Callable[[Tensor], None]) -> Iterator[None]:
    def after(_: nn.Module, __: Any, attention: Tensor) -> None:
        take(attention)

    switches = {name: getattr(module, name) for name in FUSED if hasattr(module, name)}
    for name in switches:
        setattr(module, name, False)
    handle = module.attn_drop.register_forward_hook(after)  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()
        for name, value in switches.items():
            setattr(module, name, value)


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """In float32 at least, as ``models.attention.explicit_attention`` has it."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits if bias is None else logits + bias).softmax(dim=-1)
