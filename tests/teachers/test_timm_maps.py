"""Each family of timm's as a teacher, its weights from a file, against timm's own forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.teachers.tiny import VIT, as_upstream, loaded, pixels, saved, shaken, spec

CLIP_MEAN, IMAGENET_MEAN, HALF = 0.48145466, 0.485, 0.5


@dataclass(frozen=True)
class Family:
    """An architecture, and what its map must be."""

    architecture: str
    side: int
    grid: int
    prefix: int
    mean: float
    arguments: dict[str, Any] = field(default_factory=lambda: dict(VIT))
    tag: str | None = None


FAMILIES = {
    "clip": Family("vit_base_patch16_clip_quickgelu_224", 32, 2, 1, CLIP_MEAN),
    "dino": Family("vit_base_patch16_224", 48, 3, 1, IMAGENET_MEAN, tag="dino"),
    "mae": Family("vit_base_patch16_224", 32, 2, 1, IMAGENET_MEAN, tag="mae"),
    "deit": Family("deit_base_patch16_224", 32, 2, 1, IMAGENET_MEAN),
    "deit distilled": Family("deit_base_distilled_patch16_224", 32, 2, 2, IMAGENET_MEAN),
    "deit3": Family("deit3_base_patch16_224", 32, 2, 1, IMAGENET_MEAN),
    "dinov2": Family("vit_base_patch14_dinov2", 42, 3, 1, IMAGENET_MEAN),
    "dinov2 registers": Family("vit_base_patch14_reg4_dinov2", 42, 3, 5, IMAGENET_MEAN),
    "beit": Family("beit_base_patch16_224", 32, 2, 1, HALF),
    "eva02": Family("eva02_base_patch14_224", 28, 2, 1, CLIP_MEAN),
    "siglip": Family("vit_base_patch16_siglip_224", 32, 2, 0, HALF),
    "registers without class token": Family("vit_medium_patch16_reg4_gap_256", 32, 2, 0, HALF),
    "relative positions": Family("vit_relpos_base_patch16_224", 32, 2, 0, HALF),
    "swin": Family(
        "swin_base_patch4_window7_224",
        64,
        2,
        0,
        IMAGENET_MEAN,
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4},
    ),
    "swinv2": Family(
        "swinv2_base_window12_192",
        64,
        2,
        0,
        IMAGENET_MEAN,
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4},
    ),
    "swinv2 cr": Family(
        "swinv2_cr_tiny_224",
        64,
        2,
        0,
        IMAGENET_MEAN,
        {"embed_dim": 8, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 2},
    ),
    "resnet": Family(
        "resnet18", 64, 2, 0, IMAGENET_MEAN, {"channels": (4, 8, 12, 16), "layers": (1, 1, 1, 1)}
    ),
    "convnext": Family(
        "convnext_tiny", 64, 2, 0, IMAGENET_MEAN, {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16)}
    ),
}


def upstream(family: Family) -> Any:
    """The network as timm builds it, classifier and pooling included, with weights that nothing leaves at 0
    or 1."""
    torch.manual_seed(0)
    size = {"img_size": family.side} if family.architecture[:3] not in ("res", "con") else {}
    return shaken(timm.create_model(family.architecture, **size, **family.arguments))


def teacher_of(family: Family, network: nn.Module, folder: Path) -> Any:
    path = saved(network.state_dict(), folder / "weights.safetensors")
    arguments = dict(family.arguments) | ({"pretrained_cfg": family.tag} if family.tag else {})
    return loaded(spec(family.architecture, path, input_size=family.side, arguments=arguments))


def own_last_map(network: Any, values: Tensor) -> Tensor:
    """timm's tokens before any norm that sits in the head, the prefix first, by its other forward pass."""
    settings: dict[str, Any] = {"indices": 1, "norm": True, "intermediates_only": True}
    if getattr(network, "num_prefix_tokens", 0) > 0:
        grid, prefix = network.forward_intermediates(
            values, output_fmt="NLC", return_prefix_tokens=True, **settings
        )[-1]
        return torch.cat((prefix, grid), dim=1)
    maps = network.forward_intermediates(values, output_fmt="NCHW", **settings)[-1]
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_map_is_upstreams(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    network = upstream(family)
    teacher = teacher_of(family, network, tmp_path)
    values = pixels(family.side)
    features = teacher.features(values)

    seen = as_upstream(values, teacher.mean, teacher.std)
    expected = own_last_map(network, seen)
    if isinstance(getattr(network, "fc_norm", None), nn.LayerNorm):
        expected = network.fc_norm(expected)
    if name == "convnext":
        expected = nn.functional.layer_norm(
            expected, expected.shape[-1:], *network.head.norm.parameters(), 1e-6
        )
    if name == "registers without class token":
        expected = expected[:, 4:]
    # Two ways to the same operations: 0 seen on tokens of size 1 to 6, with room for another attention
    # kernel.
    assert torch.allclose(features.tokens_BND, expected, rtol=0, atol=3e-5)
    assert (teacher.grid, features.grid) == ((family.grid,) * 2,) * 2
    assert (teacher.num_prefix_tokens, features.num_prefix_tokens) == (family.prefix,) * 2
    assert teacher.width == expected.shape[2]
    assert teacher.input_size == family.side
    assert teacher.mean[0] == family.mean


MEAN_THEN_NORM = ("beit", "eva02", "convnext", "relative positions", "registers without class token")
"""Families whose norm follows the mean, so that the two do not commute."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in (*MEAN_THEN_NORM, "siglip")])
@torch.no_grad()
def test_pooling_the_map_gives_upstreams_logits(name: str, tmp_path: Path) -> None:
    """From the map on, the upstream head must come to what upstream's whole forward pass does."""
    family = FAMILIES[name]
    network = upstream(family)
    teacher = teacher_of(family, network, tmp_path)
    values = pixels(family.side)
    tokens_BND = teacher.features(values).tokens_BND
    logits = network(as_upstream(values, teacher.mean, teacher.std))
    if name == "deit distilled":
        got = (network.head(tokens_BND[:, 0]) + network.head_dist(tokens_BND[:, 1])) / 2
    elif family.prefix:
        got = network.head(tokens_BND[:, 0])
    else:
        classifier = network.fc if name == "resnet" else network.head.fc
        got = classifier(tokens_BND.mean(dim=1))
    assert torch.allclose(got, logits, rtol=0, atol=3e-5)


@torch.no_grad()
def test_tokens_of_a_grid_are_row_by_row(tmp_path: Path) -> None:
    """A change in the top right corner must change the second token of the first row, in every layout."""
    for name in ("resnet", "swin", "clip"):
        family = FAMILIES[name]
        teacher = teacher_of(family, upstream(family), tmp_path)
        values = pixels(family.side)
        changed = values.clone()
        changed[:, :, : family.side // 8, -family.side // 8 :] = 0
        difference = teacher.features(values).patches_BND - teacher.features(changed).patches_BND
        assert difference.norm(dim=-1).argmax(dim=1).tolist() == [1, 1], name


def test_bfloat16_teacher_is_near_float32(tmp_path: Path) -> None:
    family = FAMILIES["clip"]
    network = upstream(family)
    path = saved(network.state_dict(), tmp_path / "weights.safetensors")
    asked = spec(family.architecture, path, input_size=family.side, arguments=family.arguments)
    exact, rounded = loaded(asked), loaded(asked, dtype=torch.bfloat16)
    values = pixels(family.side)
    tokens_BND = rounded.features(values).tokens_BND
    assert tokens_BND.dtype == torch.bfloat16
    # Eight bits of mantissa through two blocks: 0.02 seen on tokens of size 1 to 4.
    assert torch.allclose(tokens_BND.float(), exact.features(values).tokens_BND, rtol=0, atol=0.15)
    assert rounded.fingerprint == exact.fingerprint
