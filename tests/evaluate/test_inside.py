"""One protocol over every kind of network: tokens, pyramid and pooled features against the libraries' own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pytest
import scipy.ndimage
import torch
from open_clip.model import CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from fd_scale.evaluate.backbone import Backbone, of_export, of_student, of_teacher
from fd_scale.objective.features import Features
from fd_scale.student import build_backbone, build_student
from tests.evaluate.test_backbone import recipe, teacher
from tests.teachers.tiny import CLIP_VISION, VIT, as_upstream, loaded, pixels, saved, shaken, spec

SIDE = 64
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
Own = Callable[[Any, Tensor], tuple[Tensor, Tensor, "list[Tensor] | None"]]
"""Network and normalised pixels to the library's own patches (B, N, D) after and before the final norm, and
its maps of four strides, None for a network of one stride."""


@dataclass(frozen=True)
class Kind:
    """A kind of network, and how its library reads it."""

    backbone: Callable[[Any], Backbone]
    own: Own
    has_class_token: bool


def timm_kind(architecture: str, own: Own, has_class_token: bool, side: int = SIDE, **arguments: Any) -> Kind:
    def made(_: Any) -> Backbone:
        found = loaded(spec(architecture, input_size=side, arguments=arguments))
        shaken(found.network)
        return of_teacher(found)

    return Kind(made, own, has_class_token)


def clip_kind(own: Own, has_class_token: bool = True, **vision: Any) -> Kind:
    def made(_: Any) -> Backbone:
        asked = spec("ViT-B-16", library="open_clip", input_size=SIDE, arguments=vision)
        found = loaded(asked)
        shaken(found.network)
        return of_teacher(found)

    return Kind(made, own, has_class_token)


def of_vit(network: Any, values: Tensor) -> tuple[Tensor, Tensor, None]:
    (before,) = network.forward_intermediates(
        values, indices=1, norm=False, output_fmt="NLC", intermediates_only=True
    )
    prefix = network.num_prefix_tokens
    norm = network.fc_norm if isinstance(network.norm, nn.Identity) else network.norm
    return (
        network.forward_features(values)[:, prefix:] if norm is network.norm else norm(before),
        before,
        None,
    )


def of_stages(network: Any, values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    maps = network.forward_intermediates(values, indices=4, intermediates_only=True)
    last = network.forward_features(values)
    if hasattr(getattr(network, "head", None), "norm"):  # ConvNeXt normalises what it has pooled
        last = network.head.norm(last)
    after = last.flatten(1, 2) if getattr(network, "output_fmt", "") == "NHWC" else last.flatten(2).mT
    return after, maps[-1].flatten(2).mT, maps


def of_clip(network: Any, values: Tensor) -> tuple[Tensor, Tensor, None]:
    found = [
        network.forward_intermediates(
            values, indices=1, normalize_intermediates=normed, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]
        for normed in (True, False)
    ]
    return found[0], found[1], None


def of_clip_resnet(network: Any, values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    maps = network.forward_intermediates(values, indices=4, intermediates_only=True)["image_intermediates"]
    return maps[-1].flatten(2).mT, maps[-1].flatten(2).mT, maps


def of_swinv2(network: Any, values: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    seen: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda *call: seen.append(call[2])) for stage in network.layers]
    after = network(values)
    for hook in hooks:
        hook.remove()
    maps = [m.mT.reshape(len(m), m.shape[2], *s.map_size) for m, s in zip(seen, network.layers, strict=True)]
    return after, seen[-1], maps


def of_our_vit(network: Any, values: Tensor) -> tuple[Tensor, Tensor, None]:
    seen: list[Tensor] = []
    hook = network.blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    after = network(values)
    hook.remove()
    return after[:, 1:], seen[0][:, 1:], None


def a_student(_: Any) -> Backbone:
    return of_student(shaken(build_student(recipe(input_size=64), [teacher(64)])))


def an_export(tmp_path: Any) -> Backbone:
    asked = recipe(input_size=64).student
    network = shaken(build_backbone(asked))
    save_file(network.state_dict(), tmp_path / "a.safetensors", {"student": asked.model_dump_json()})
    return of_export(tmp_path / "a.safetensors")


def our_swin(_: Any) -> Backbone:
    arguments = {"width": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    found = loaded(spec("swinv2_tiny", library="models", input_size=SIDE, arguments=arguments))
    shaken(found.network)
    return of_teacher(found)


KINDS = {
    "timm ViT": timm_kind("vit_tiny_patch16_224", of_vit, True, **VIT),
    "timm ViT of patch 8": timm_kind("vit_tiny_patch16_224", of_vit, True, 40, patch_size=8, **VIT),
    "timm ViT with registers": timm_kind("vit_tiny_patch16_224", of_vit, True, reg_tokens=3, **VIT),
    "timm BEiT": timm_kind("beit_base_patch16_224", of_vit, True, **VIT),
    "timm Swin": timm_kind("swin_tiny_patch4_window7_224", of_stages, False, **SWIN),
    "timm ConvNeXt": timm_kind("test_convnext", of_stages, False),
    "timm ResNet": timm_kind("test_resnet", of_stages, False),
    "CLIP ViT": clip_kind(of_clip, **CLIP_VISION),
    "CLIP ResNet": clip_kind(of_clip_resnet, False, width=8, layers=(1, 1, 1, 1), head_width=16),
    "our SwinV2": Kind(our_swin, of_swinv2, False),
    "student": Kind(a_student, of_our_vit, True),
    "export": Kind(an_export, of_our_vit, True),
}


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_network_is_read_as_its_library_reads_it(name: str, tmp_path: Any) -> None:
    kind = KINDS[name]
    backbone = kind.backbone(tmp_path)
    seen = pixels(backbone.input_size)
    record = backbone.fingerprint
    values = as_upstream(seen, record["mean"], record["std"])
    after, before, maps = kind.own(backbone.network, values)
    # The same float32 operations; pixels are normalised in another order: worst seen 1e-6 of values to 5.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(backbone.tokens(seen).patches_BND, after, **close)
    unnormed = backbone.tokens(seen, normed=False)
    torch.testing.assert_close(unnormed.patches_BND, before, **close)
    assert unnormed.num_prefix_tokens == backbone.tokens(seen).num_prefix_tokens
    expected = by_scipy(unnormed, backbone.input_size) if maps is None else maps
    for ours, theirs, stride in zip(backbone.pyramid(seen), expected, (4, 8, 16, 32), strict=True):
        assert ours.shape[2] == -(-backbone.input_size // stride)
        torch.testing.assert_close(ours, theirs, **close)
    pooled = backbone.pooled(seen)
    assert ("cls" in pooled) is kind.has_class_token
    torch.testing.assert_close(pooled["gap"], after.mean(1), **close)


def by_scipy(features: Features, side: int) -> list[Tensor]:
    """Bilinear maps by SciPy, and maxima over blocks."""
    values = features.patches_BND.mT.unflatten(2, features.grid).numpy()
    found = []
    for stride in (4, 8, 16, 32):
        rows = -(-side // stride)
        if rows >= values.shape[2]:
            factor = (1, 1, rows / values.shape[2], rows / values.shape[3])
            made = scipy.ndimage.zoom(values, factor, order=1, mode="nearest", grid_mode=True)
        else:
            ends = [(i * values.shape[2] // rows, -(-(i + 1) * values.shape[2] // rows)) for i in range(rows)]
            made = np.stack(
                [np.stack([values[:, :, a:b, c:d].max((2, 3)) for c, d in ends], -1) for a, b in ends], -2
            )
        found.append(torch.from_numpy(made))
    return found


@pytest.mark.parametrize("library", ["open_clip", "timm"])
@torch.no_grad()
def test_the_projected_class_token_is_clips_own_embedding(library: str, tmp_path: Any) -> None:
    """From a file of a whole tower, against open_clip's forward pass."""
    vision = CLIPVisionCfg(image_size=SIDE, **CLIP_VISION)
    tower: Any = shaken(open_clip.model._build_vision_tower(10, vision, quick_gelu=True))
    file = saved({f"visual.{k}": v for k, v in tower.state_dict().items()}, tmp_path / "clip.safetensors")
    if library == "open_clip":
        asked = {"embed_dim": 10, "pretrained": "openai", **CLIP_VISION}
        backbone = of_teacher(
            loaded(spec("ViT-B-16-quickgelu", file, library, input_size=SIDE, arguments=asked))
        )
    else:
        more = {"pretrained_cfg": "openai", **VIT}
        name = "vit_base_patch16_clip_quickgelu_224"
        backbone = of_teacher(loaded(spec(name, file, input_size=SIDE, arguments=more)))
    values = as_upstream(pixels(SIDE), backbone.fingerprint["mean"], backbone.fingerprint["std"])
    # Two implementations of one tower in float32: worst seen 8e-7.
    torch.testing.assert_close(backbone.pooled(pixels(SIDE))["projected"], tower(values), rtol=0, atol=1e-5)


def test_networks_that_are_no_clip_project_nothing() -> None:
    assert "projected" not in of_teacher(teacher()).pooled(pixels(24))
