"""Which architectures are there, and how is one built?

``CATALOGUE`` is the one owner of widths and depths. Every network takes normalised pixels (B, 3, S, S) to
tokens (B, N, D) after its final norm, prefix tokens first, and says of itself ``embed_dim``, ``grid``,
``num_prefix_tokens``, ``input_size`` and ``patch_size`` (its total stride, pixels). This package imports
torch and timm alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from models import swinv2
from models.errors import ModelError, near_misses
from models.ops import DEFAULT_OPS, Ops
from models.vit import VisionTransformer

__all__ = ["CATALOGUE", "ModelError", "create", "names"]

CATALOGUE: Mapping[str, Callable[..., nn.Module]] = {
    "vit_micro_patch8": partial(VisionTransformer, patch_size=8, embed_dim=128, depth=4, num_heads=4),
    "vit_tiny_patch16": partial(VisionTransformer, patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "vit_small_patch16": partial(VisionTransformer, patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "vit_base_patch32": partial(VisionTransformer, patch_size=32, embed_dim=768, depth=12, num_heads=12),
    "vit_base_patch16": partial(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "vit_base_patch8": partial(VisionTransformer, patch_size=8, embed_dim=768, depth=12, num_heads=12),
    "vit_large_patch16": partial(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16),
    "vit_large_patch14": partial(VisionTransformer, patch_size=14, embed_dim=1024, depth=24, num_heads=16),
    **{name: partial(swinv2.SwinV2, **config) for name, config in swinv2.CONFIGS.items()},
}


def names() -> list[str]:
    """The architectures, in the catalogue's order: by family, then by size."""
    return list(CATALOGUE)


def create(
    name: str, *, input_size: int = 224, drop_path: float = 0.0, ops: Ops = DEFAULT_OPS, **changes: Any
) -> nn.Module:
    """The network ``name`` with random weights from PyTorch's global generator, in training mode.

    ``input_size`` is the side of its square input, pixels; ``drop_path`` the stochastic depth rate of its
    last block; ``ops`` its hot operations. ``changes`` replace the catalogue's arguments or the
    architecture's defaults by name. Raises ``ModelError`` for an unknown name, an unknown argument, or
    arguments that do not fit each other.
    """
    if name not in CATALOGUE:
        raise ModelError(
            f"unknown model {name!r}{near_misses(name, CATALOGUE)} (models: {', '.join(CATALOGUE)})"
        )
    builder = CATALOGUE[name]
    valid = [argument for argument in inspect.signature(builder).parameters if argument != "ops"]
    for argument in changes:
        if argument not in valid:
            raise ModelError(
                f"{name} takes no argument {argument!r}{near_misses(argument, valid)} "
                f"(its arguments: {', '.join(valid)})"
            )
    return builder(input_size=input_size, drop_path=drop_path, ops=ops, **changes)
