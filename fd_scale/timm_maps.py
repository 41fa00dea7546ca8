"""Any timm network as a map of tokens: how it is built for an input size, and where and how its map lies.

Teachers and students share this, so that one architecture gives one kind of map on either side. Weights,
pixels and what is regressed belong to others.

Shape letters: B images, N tokens, D channels, H and W the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from fd_scale.errors import near_misses
from fd_scale.objective.features import Features

RESERVED: Mapping[str, str] = {
    "img_size": "the recipe's own field input_size says it",
    "pretrained": "the recipe's own field weights says it",
    "checkpoint_path": "the recipe's own field weights says it",
    "num_classes": "a map has no classifier",
    "in_chans": "pixels are RGB",
    "features_only": "the map is the last one",
}
"""Arguments of timm that are not the user's to give, and why."""


UNNORMED = "last map, which has no norm of its own"
"""The record of a map that is taken as it is."""


UNNORMED_ON_REQUEST = "last map before its final norm"
"""The record of a map whose norm was taken off."""


class ArchitectureError(ValueError):
    """A timm architecture that is unknown, cannot be built as asked, or gives no map of tokens."""


@dataclass(frozen=True)
class MapForm:
    """How a network lays out its map, and what a ``Features`` of it will say.

    ``num_prefix_tokens`` counts the tokens before the grid in the network's output; they are kept only when
    the first one is a class token, since registers alone are of no use to anyone.
    """

    layout: str
    grid: tuple[int, int]
    num_prefix_tokens: int
    has_class_token: bool
    width: int


def check_name(architecture: str) -> None:
    """Raise ``ArchitectureError`` for a name that timm does not have."""
    if not timm.is_model(architecture):
        near = near_misses(architecture, timm.list_models())
        raise ArchitectureError(f"unknown timm architecture {architecture!r}{near}")


def takes_img_size(architecture: str) -> bool:
    """Whether timm builds this architecture for one input size."""
    defaults = get_pretrained_cfg(architecture)
    return defaults is not None and defaults.fixed_input_size


def build(
    architecture: str,
    *,
    input_size: int | None,
    arguments: Mapping[str, Any],
    pretrained_cfg: str | None = None,
    **fixed: Any,
) -> nn.Module:
    """The timm network, for square inputs of ``input_size`` pixels (None: its own), with ``arguments`` by
    timm's names.

    ``pretrained_cfg`` is a tag of its weights; ``fixed`` are arguments that fd_scale decides. Raises
    ``ArchitectureError`` for an unknown name and for arguments that it does not take.
    """
    check_name(architecture)
    for name in arguments:
        if name in RESERVED:
            raise ArchitectureError(f"argument {name!r} is not given to {architecture}: {RESERVED[name]}")
    if input_size is not None and takes_img_size(architecture):
        fixed["img_size"] = input_size
    try:
        return timm.create_model(architecture, pretrained_cfg=pretrained_cfg, **fixed, **arguments)
    except (TypeError, ValueError, AssertionError, ZeroDivisionError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in {**fixed, **arguments}.items())
        raise ArchitectureError(f"timm cannot build {architecture} with {given}: {error}") from error


def final_map(network: nn.Module, pixels_BCHW: Tensor) -> Tensor:
    """The network's last map after its final norm, as the network lays it out.

    Some networks normalise only what they have pooled (ConvNeXt, BEiT, ViTs fine-tuned on mean patches).
    That norm is then their final one, and is applied to every token here, as FD does with CLIP's.
    """
    output = network.forward_features(pixels_BCHW)  # type: ignore[operator]
    for norm in _norms_after_pooling(network).values():
        output = norm(output)
    return output


def final_norm(network: nn.Module) -> tuple[str, nn.Module] | None:
    """Name and module of the norm that ``final_map`` ends with; None where the map has none of its own."""
    found: dict[str, Any] = dict(_norms_after_pooling(network)) or {"norm": getattr(network, "norm", None)}
    name, norm = next(iter(found.items()))
    return (name, norm) if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) else None


def feature_point(network: nn.Module) -> str:
    """Where ``final_map`` takes the map, for records."""
    found = final_norm(network)
    return UNNORMED if found is None else normed_by(found[0])


def normed_by(norm: str) -> str:
    """The record of a map that this final norm, by its name in the network, was applied to."""
    return f"last map after {norm} on all tokens"


def take_off_final_norm(network: nn.Module) -> None:
    """Let ``final_map`` give the map before its final norm. Raises ``ArchitectureError`` where there is
    none."""
    names = [*_norms_after_pooling(network)]
    if not names and not isinstance(getattr(network, "norm", None), nn.Identity | None):
        names = ["norm"]
    if not names:
        raise ArchitectureError(f"{type(network).__name__} has no final norm to take off")
    for name in names:
        owner, _, last = name.rpartition(".")
        setattr(network.get_submodule(owner), last, nn.Identity())


def read(network: nn.Module, pixels_BCHW: Tensor) -> Features:
    """Normalised pixels (B, 3, S, S) to the map after the final norm, as tokens (B, N, D)."""
    output = final_map(network, pixels_BCHW)
    return as_features(output, form_of(network, output))


def form_of(network: nn.Module, output: Tensor) -> MapForm:
    """How ``output``, a map of ``network``, is laid out.

    Raises ``ArchitectureError`` for an output that is not a square grid of tokens, with or without prefix
    tokens.
    """
    name = type(network).__name__
    width = int(network.num_features)  # type: ignore[arg-type]
    if output.ndim == 4:
        layout = str(getattr(network, "output_fmt", "NCHW"))
        channels = output.shape[3 if layout == "NHWC" else 1]
        height_width = output.shape[1:3] if layout == "NHWC" else output.shape[2:4]
        if channels != width:
            raise ArchitectureError(
                f"{name} gives a map {tuple(output.shape)} that is not {layout} of {width} channels"
            )
        return MapForm(layout, (height_width[0], height_width[1]), 0, has_class_token=False, width=width)
    if output.ndim != 3 or output.shape[2] != width:
        raise ArchitectureError(f"{name} gives {tuple(output.shape)}, not a map of {width} channels")
    num_prefix_tokens = int(getattr(network, "num_prefix_tokens", 0))
    side = math.isqrt(max(output.shape[1] - num_prefix_tokens, 0))
    if side == 0 or num_prefix_tokens + side * side != output.shape[1]:
        raise ArchitectureError(
            f"{name} gives {output.shape[1]} tokens, of which it calls {num_prefix_tokens} prefix tokens: "
            "the rest is not a square grid"
        )
    has_class_token = num_prefix_tokens > 0 and getattr(network, "cls_token", None) is not None
    return MapForm("tokens", (side, side), num_prefix_tokens, has_class_token, width)


def as_features(output: Tensor, form: MapForm) -> Features:
    """A network's map as tokens (B, N, D), the grid row by row."""
    if form.layout == "NHWC":
        return Features(output.flatten(1, 2), form.grid, 0)
    if form.layout == "NCHW":
        return Features(output.flatten(2).transpose(1, 2), form.grid, 0)
    if form.has_class_token:
        return Features(output, form.grid, form.num_prefix_tokens)
    return Features(output[:, form.num_prefix_tokens :], form.grid, 0)


def _norms_after_pooling(network: nn.Module) -> dict[str, nn.Module]:
    """The norms that the network keeps in its head, by name."""
    found = {
        "fc_norm": getattr(network, "fc_norm", None),
        "head.norm": getattr(getattr(network, "head", None), "norm", None),
    }
    return {
        name: norm
        for name, norm in found.items()
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity)
    }
