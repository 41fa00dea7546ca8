"""Teachers from open_clip: the vision tower of any of its models, without the text tower.

The map is taken after ``ln_post`` on every token, though CLIP itself applies it to the class token alone, and
before the projection. Towers that open_clip takes from timm are read like timm's networks; the residual
networks of CLIP give their last map, which has no norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPVisionCfg, resize_pos_embed

# The tower alone: a text tower would be loaded for nothing, and some of them downloaded to be built.
from open_clip.model import _build_vision_tower as build_vision_tower
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.errors import TeacherError, near_misses
from fd_scale.objective.features import Features
from fd_scale.run import recipe as recipes
from fd_scale.teachers import weights
from fd_scale.teachers.frozen import Read, Teacher, freeze
from fd_scale.teachers.weights import VISUAL, Checkpoint, Source

STATISTICS = "pretrained"
"""open_clip's own argument that names a tag: for a local file, the tag whose mean and std it was trained
with."""


@dataclass(frozen=True)
class Tower:
    """A vision tower without what comes after its map."""

    network: nn.Module
    read: Read
    heads: tuple[str, ...]
    feature_point: str
    projection_DE: Tensor | None = None
    """From the class token after the norm to the joint embedding, as it was drawn; of towers that pool by
    it."""


def load(spec: recipes.Teacher, *, device: torch.device, dtype: torch.dtype, seed: int) -> Teacher:
    """The teacher of a recipe with ``library="open_clip"``; see ``fd_scale.teachers.load``."""
    known = open_clip.list_models()
    if spec.architecture not in known:
        near = near_misses(spec.architecture, known)
        raise TeacherError(
            f"unknown open_clip architecture {spec.architecture!r}{near} (teacher.architecture)"
        )
    if not spec.final_norm or spec.drop_path > 0:
        raise TeacherError(
            f"teacher.final_norm={spec.final_norm} and teacher.drop_path={spec.drop_path:g} are not for "
            "open_clip: name the same network in timm (teacher.library=timm)"
        )
    where = weights.source(spec.weights)
    arguments = dict(spec.arguments)
    tag = _tag(spec.architecture, where, arguments.pop(STATISTICS, None))
    settings = _settings(spec, arguments)
    if where.is_random:
        with weights.drawn_from(seed, spec.architecture):
            tower = _tower(spec, settings)
    else:
        tower = _tower(spec, settings)
        checkpoint = _checkpoint(spec.architecture, where, exact_gelu=_has_exact_gelu(tower, settings))
        _fill(tower, spec.architecture, checkpoint)
        tower = _with_projection(tower, checkpoint)
    if spec.input_size is not None and isinstance(tower.network, TimmModel):
        tower.network.set_input_size(spec.input_size)
    statistics = _statistics(spec.architecture, tag)
    return freeze(
        tower.network,
        tower.read,
        device=device,
        dtype=dtype,
        library=spec.library,
        architecture=spec.architecture,
        arguments=arguments,
        weights=where.label,
        feature_point=tower.feature_point,
        input_size=spec.input_size or _side(tower.network.image_size),
        mean=statistics[0],
        std=statistics[1],
        projection_DE=tower.projection_DE,
    )


def _tag(architecture: str, where: Source, asked: Any) -> str | None:
    """The tag whose weights are wanted, or whose mean and std a file shares; None where all tags agree."""
    tags = list_pretrained_tags_by_model(architecture)
    wanted = asked if where.is_random or where.path is not None else where.text
    if wanted is not None and not get_pretrained_cfg(architecture, str(wanted)):
        raise weights.no_such_tag(str(wanted), architecture, tags)
    if asked not in (None, wanted):
        raise TeacherError(
            f"teacher.arguments.{STATISTICS}={asked!r} contradicts teacher.weights={where.text!r}"
        )
    if where.path is not None and asked is None:
        weights.check_statistics(
            where, architecture, {tag: _statistics(architecture, tag) for tag in tags}, STATISTICS
        )
    return wanted


def _statistics(architecture: str, tag: str | None) -> weights.Statistics:
    """(mean, std) of a tag, or of the architecture's first."""
    tags = list_pretrained_tags_by_model(architecture)
    settings = get_pretrained_cfg(architecture, tag or tags[0]) if tag or tags else {}
    default = PreprocessCfg()
    return tuple(settings.get("mean", default.mean)), tuple(settings.get("std", default.std))


def _settings(spec: recipes.Teacher, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The model's configuration with the recipe's arguments in it."""
    settings: dict[str, Any] = deepcopy(open_clip.get_model_config(spec.architecture))
    valid = {field.name for field in fields(CLIPVisionCfg)} - {"image_size", "timm_model_pretrained"}
    for name, value in arguments.items():
        if name in ("quick_gelu", "embed_dim"):
            settings[name] = value
        elif name in valid:
            settings["vision_cfg"][name] = value
        else:
            hint = "; teacher.input_size says it" if name == "image_size" else near_misses(name, valid)
            raise TeacherError(
                f"{spec.architecture} takes no argument {name!r}{hint} (teacher.arguments: quick_gelu, "
                f"embed_dim, {', '.join(sorted(valid))})"
            )
    return settings


def _tower(spec: recipes.Teacher, settings: Mapping[str, Any]) -> Tower:
    """The tower, up to its map."""
    vision = dict(settings["vision_cfg"], timm_model_pretrained=False)
    if spec.input_size is not None and "timm_model_name" not in vision:
        vision["image_size"] = spec.input_size
    try:
        network = build_vision_tower(
            settings["embed_dim"], vision, quick_gelu=settings.get("quick_gelu", False)
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        given = dict(spec.arguments) | {"input_size": spec.input_size}
        raise TeacherError(
            f"open_clip cannot build {spec.architecture} with {given}: {error} (teacher.arguments)"
        ) from error
    if isinstance(network, TimmModel):
        return _timm_tower(network)
    if isinstance(network, VisionTransformer):
        return _transformer_tower(network)
    network.attnpool = nn.Identity()
    return Tower(network, _read_residual, ("attnpool.",), timm_maps.UNNORMED)


def _timm_tower(network: TimmModel) -> Tower:
    network.head = nn.Identity()
    network.trunk.reset_classifier(0)
    heads = ("head.", "trunk.head.", "trunk.fc.", "trunk.classifier.")
    return Tower(network, _read_trunk, heads, timm_maps.feature_point(network.trunk))


def _transformer_tower(network: VisionTransformer) -> Tower:
    heads, point = ["proj"], timm_maps.normed_by("ln_post")
    pools_by_class = network.pool_type == "tok" and network.attn_pool is None
    projection_DE = network.proj if pools_by_class else None
    network.proj = None
    if network.attn_pool is not None:
        heads += ["attn_pool.", "attn_pool_contrastive."]
        if network.attn_pool_contrastive is None:
            # CoCa's norm is that of the pooled queries, and of their width; its tokens have none.
            network.ln_post = nn.Identity()
            heads.append("ln_post.")
            point = timm_maps.UNNORMED
        network.attn_pool = network.attn_pool_contrastive = None
    return Tower(network, _read_transformer, tuple(heads), point, projection_DE)


def _with_projection(tower: Tower, checkpoint: Checkpoint) -> Tower:
    """With the projection that the weights bring, if they do."""
    found = checkpoint.tensors.get(f"{VISUAL}proj", checkpoint.tensors.get("proj"))
    return replace(tower, projection_DE=None if tower.projection_DE is None else found)


def _read_transformer(network: nn.Module, pixels_BCHW: Tensor) -> Features:
    """CLIP's class token and patches, all of them after ``ln_post``."""
    last = len(network.transformer.resblocks) - 1  # type: ignore[union-attr, arg-type]
    with _usual_attention():
        found = network.forward_intermediates(  # type: ignore[operator]
            pixels_BCHW,
            indices=[last],
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
    tokens_BND = torch.cat((found["image_intermediates_prefix"][0], found["image_intermediates"][0]), dim=1)
    return Features(tokens_BND, tuple(network.grid_size), num_prefix_tokens=1)  # type: ignore[arg-type]


@contextmanager
def _usual_attention() -> Iterator[None]:
    """Without the path that ``nn.MultiheadAttention`` has for frozen networks, which rounds otherwise and is
    left when weights are sharded: a map must not depend on who holds the weights."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _read_trunk(network: nn.Module, pixels_BCHW: Tensor) -> Features:
    """The map of the timm network inside."""
    return timm_maps.read(network.trunk, pixels_BCHW)  # type: ignore[arg-type]


def _read_residual(network: nn.Module, pixels_BCHW: Tensor) -> Features:
    """The last map before attention pooling."""
    found = network.forward_intermediates(pixels_BCHW, indices=[4], intermediates_only=True)  # type: ignore[operator]
    map_BDHW = found["image_intermediates"][0]
    return Features(map_BDHW.flatten(2).transpose(1, 2), tuple(map_BDHW.shape[2:]), num_prefix_tokens=0)


def _has_exact_gelu(tower: Tower, settings: Mapping[str, Any]) -> bool:
    """Whether the tower is one whose activation differs between CLIPs, and has the exact GELU."""
    return isinstance(tower.network, VisionTransformer) and not settings.get("quick_gelu", False)


def _checkpoint(architecture: str, where: Source, *, exact_gelu: bool) -> Checkpoint:
    """The weights of a file, or of a tag, which open_clip fetches; refused where the activation is the
    other one."""
    if where.path is not None:
        checkpoint = weights.read(where)
        if exact_gelu:
            weights.check_activation(checkpoint, architecture, _quick(architecture))
        return checkpoint
    published = get_pretrained_cfg(architecture, where.text)
    if exact_gelu and published.get("quick_gelu", False):
        raise weights.needs_quickgelu(f"weights {where.text!r}", architecture, _quick(architecture))
    try:
        fetched = download_pretrained(published)
    except Exception as error:  # the hub's clients raise errors that have no base in common
        raise weights.hub_failure(where.text, architecture, error) from error
    return weights.read(weights.source(fetched))


def _fill(tower: Tower, architecture: str, checkpoint: Checkpoint) -> None:
    """The weights of a file, of a whole model or of a tower alone, into the tower."""
    tensors = checkpoint.tensors
    if not any(name.startswith(VISUAL) for name in tensors):
        tensors = {VISUAL + name: tensor for name, tensor in tensors.items()}
    fitted = {name: tensor.float() for name, tensor in tensors.items() if name.startswith(VISUAL)}
    resize_pos_embed(fitted, SimpleNamespace(visual=tower.network))
    weights.warn_of_resampling(checkpoint.label, tensors, fitted)
    bare = {name.removeprefix(VISUAL): tensor for name, tensor in fitted.items()}
    weights.fit(tower.network, bare, of=checkpoint.label, into=architecture, heads=tower.heads)


def _quick(architecture: str) -> str:
    return f"{architecture}-quickgelu"


def _side(image_size: Any) -> int:
    return int(image_size if isinstance(image_size, int) else image_size[0])
