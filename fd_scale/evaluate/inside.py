"""What does a network hold before its final map? Its tokens before the final norm, and maps of finer strides.

Read through whatever the library offers, with nothing trained and nothing added: decoders bring their own
norms and convolutions.

Shape letters: B images, C channels, D channels of a token, H and W a grid, S the side of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.objective.features import Features
from models.swinv2 import SwinV2

STRIDES = (4, 8, 16, 32)
"""Of a pyramid's maps, pixels."""


def norm_of(network: nn.Module) -> nn.Module | None:
    """The final norm of a network of timm, open_clip or ``models``; None for a map without one."""
    own = getattr(network, "ln_post", None)
    if own is not None:
        return None if isinstance(own, nn.Identity) else own
    found = timm_maps.final_norm(trunk_of(network))
    return None if found is None else found[1]


def trunk_of(network: nn.Module) -> nn.Module:
    """The network itself, or the one of timm inside a tower of open_clip."""
    inner = getattr(network, "trunk", None)
    return inner if isinstance(inner, nn.Module) else network


@contextmanager
def noting_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """Inputs of a module's calls, in a list that fills as it is called."""
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def laid_out_as(features: Features, raw: Tensor) -> Features:
    """``raw``, a map as the network lays it out, as tokens in the form of ``features``, its map elsewhere."""
    if raw.ndim == 3:
        return Features(raw[:, -features.tokens_BND.shape[1] :], features.grid, features.num_prefix_tokens)
    if tuple(raw.shape[1:3]) == features.grid:
        return Features(raw.flatten(1, 2), features.grid, 0)
    return Features(raw.flatten(2).transpose(1, 2), features.grid, 0)


def stages(network: nn.Module, values_B3SS: Tensor) -> list[Tensor] | None:
    """The maps (B, C, H, W) of strides 4, 8, 16 and 32 of a network that has them, before any final norm;
    None for one that keeps a single stride."""
    if isinstance(network, SwinV2):
        maps = network.forward_stages(values_B3SS)
        sizes = [stage.map_size for stage in network.layers]
        found = [m.transpose(1, 2).unflatten(2, size) for m, size in zip(maps, sizes, strict=True)]
        return found if len(found) == len(STRIDES) else None
    inner: Any = trunk_of(network)
    if hasattr(inner, "attnpool"):  # CLIP's residual networks: the stem and four stages, of strides 4 to 32
        return list(inner.forward_intermediates(values_B3SS, indices=[1, 2, 3, 4])["image_intermediates"])
    reductions = [info.get("reduction") for info in getattr(inner, "feature_info", None) or []]
    if not set(STRIDES) <= set(reductions) or not hasattr(inner, "forward_intermediates"):
        return None
    last = {reduction: number for number, reduction in enumerate(reductions)}
    indices = [last[stride] for stride in STRIDES]
    found = inner.forward_intermediates(values_B3SS, indices=indices, intermediates_only=True)
    return list(found)


def resampled(features: Features, input_size: int) -> list[Tensor]:
    """The one map of a plain ViT at strides 4, 8, 16 and 32: ViTDet's simple feature pyramid (Li et al.,
    2022, section 3) without what it trains. Finer maps are bilinear, coarser ones the maximum."""
    map_BDHW = features.patches_BND.transpose(1, 2).unflatten(2, features.grid)
    maps = []
    for stride in STRIDES:
        size = (math.ceil(input_size / stride),) * 2
        if size == features.grid:
            maps.append(map_BDHW)
        elif size[0] > features.grid[0]:
            maps.append(F.interpolate(map_BDHW, size, mode="bilinear", align_corners=False))
        else:
            maps.append(F.adaptive_max_pool2d(map_BDHW, size))
    return maps
