"""How fast does each layer learn? Layer-wise learning rate decay by an explicit table of names.

Layer 0 is the stem (patch embedding, class token, absolute positions), layer i + 1 is block i, and the last
one holds the rest: shared position tables, final norm, head. A layer's scale is decay ** (distance from the
last one), so that the head has 1. The rule of FD's, BEiT's and FT-CLIP's code; timm's own grouping puts the
shared position table of one ViT first and of another last, so names decide here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fd_scale.engine.optim import parameter_groups

STEM = ("patch_embed", "cls_token", "reg_token", "dist_token", "pos_embed", "norm_pre", "absolute_pos_embed")
"""First words of names in layer 0."""

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_STAGE_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_STAGE = re.compile(r"layers\.(\d+)\.(\w+)\.")


@dataclass(frozen=True)
class Layers:
    """The blocks of a network: one stage for a ViT, several for a Swin."""

    depths: tuple[int, ...]

    @property
    def last(self) -> int:
        """The number of the last layer, the head's."""
        return sum(self.depths) + 1

    def of(self, name: str) -> int:
        """The layer of a parameter of the network, by its name there.

        A downsampling between stages belongs to the last block before it (FD's and Swin's code), and what a
        stage's blocks share to the last of them.
        """
        if name.split(".")[0] in STEM:
            return 0
        if found := _BLOCK.match(name):
            return int(found[1]) + 1
        if found := _STAGE_BLOCK.match(name):
            return sum(self.depths[: int(found[1])]) + int(found[2]) + 1
        if found := _STAGE.match(name):
            stage = int(found[1])
            return sum(self.depths[:stage] if found[2] == "downsample" else self.depths[: stage + 1])
        return self.last

    def scale(self, layer: int, decay: float) -> float:
        """``decay`` ** (distance from the last layer)."""
        return decay ** (self.last - layer)


def layers_of(names: Iterable[str]) -> Layers:
    """The blocks that a network of these parameter names has."""
    depths: dict[int, int] = {}
    for name in names:
        found = _BLOCK.match(name)
        stage, block = (0, int(found[1])) if found else (0, -1)
        if deep := _STAGE_BLOCK.match(name):
            stage, block = int(deep[1]), int(deep[2])
        depths[stage] = max(depths.get(stage, 0), block + 1)
    return Layers(tuple(depths[stage] for stage in sorted(depths)))


def layer_groups(
    module: nn.Module,
    *,
    backbone: str,
    layers: Layers,
    layer_decay: float,
    weight_decay: float,
    decay_position: bool,
    scaled_floor: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of ``engine.optim``, parted by layer, with the scale of each.

    ``backbone`` begins the names of the network in ``module``; everything else is the head. A group has
    ``lr_scale``, of the peak, and ``floor_scale``, of the first and the last learning rate: the same, or 1
    without ``scaled_floor`` (FD's released code, where early layers then rise in the "decay").
    """
    groups = []
    for group in parameter_groups(module, weight_decay=weight_decay, decay_position=decay_position):
        members = sorted(
            (layers.of(name.removeprefix(backbone)) if name.startswith(backbone) else layers.last, place)
            for place, name in enumerate(group["names"])
        )
        for layer, places in itertools.groupby(members, key=lambda member: member[0]):
            chosen = [place for _, place in places]
            scale = layers.scale(layer, layer_decay)
            groups.append(
                group
                | {
                    "name": f"layer_{layer}_{group['name']}",
                    "params": [group["params"][place] for place in chosen],
                    "names": [group["names"][place] for place in chosen],
                    "lr_scale": scale,
                    "floor_scale": scale if scaled_floor else 1.0,
                }
            )
    return groups


def scales(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The scale of each parameter by its name."""
    return {name: group["lr_scale"] for group in groups for name in group["names"]}
