"""Teachers from timm: CLIP, DINO, DeiT, MAE, DINOv2, BEiT, EsViT, Swin and anything else that it can build.

The map and its layout are those of ``timm_maps``; names and position tables of foreign checkpoints are
converted by timm's own rules for the architecture.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import QuickGELU
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.errors import TeacherError
from fd_scale.run import recipe as recipes
from fd_scale.teachers import weights
from fd_scale.teachers.frozen import Teacher, freeze
from fd_scale.teachers.weights import VISUAL, Checkpoint, Source
from fd_scale.timm_maps import UNNORMED_ON_REQUEST, ArchitectureError

STATISTICS = "pretrained_cfg"
"""timm's own argument that names a tag: for a local file, the tag whose mean and std it was trained with."""

CLIP = "_clip_"
"""In timm's names of CLIP's vision towers."""
FINE_TUNED = "_ft_"
"""In timm's tags of weights whose classifier is one of classes."""

HEADS = ("head.", "head_dist.", "head_dense.", "decoder_", "mask_token")
"""What checkpoints carry beside the network: classifiers, DINO's and EsViT's heads, MAE's decoder."""


def load(spec: recipes.Teacher, *, device: torch.device, dtype: torch.dtype, seed: int) -> Teacher:
    """The teacher of a recipe with ``library="timm"``; see ``fd_scale.teachers.load``."""
    where = weights.source(spec.weights)
    arguments = dict(spec.arguments)
    try:
        tag = _tag(spec.architecture, where, arguments.pop(STATISTICS, None))
        network = _loaded(spec, where, tag, arguments, seed)
        projection_DE = _projection(network, spec.architecture, where, tag, seed)
        network.reset_classifier(0)  # type: ignore[operator]
        feature_point = timm_maps.feature_point(network)
        if not spec.final_norm:
            timm_maps.take_off_final_norm(network)
            feature_point = UNNORMED_ON_REQUEST
    except ArchitectureError as error:
        raise TeacherError(f"{error} (teacher.architecture, teacher.arguments)") from error
    settings: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    return freeze(
        network,
        timm_maps.read,
        device=device,
        dtype=dtype,
        library=spec.library,
        architecture=spec.architecture,
        arguments=arguments,
        weights=where.label,
        feature_point=feature_point,
        input_size=spec.input_size or int(settings["input_size"][-1]),
        mean=settings["mean"],
        std=settings["std"],
        projection_DE=projection_DE,
        drop_path=spec.drop_path,
    )


def _projection(
    network: nn.Module, architecture: str, where: Source, tag: str | None, seed: int
) -> Tensor | None:
    """CLIP's projection of its class token, which timm keeps as the classifier of CLIP's own weights; None
    for other networks and for weights that were fine-tuned."""
    if CLIP not in architecture:
        return None
    if where.path is not None:
        return weights.read(where).tensors.get(f"{VISUAL}proj")
    if where.is_random:
        return _random_projection(network, architecture, seed)
    head = getattr(network, "head", None)
    if tag is None or FINE_TUNED in tag or not isinstance(head, nn.Linear):
        return None
    # Only where logits are the projected class token: pooled by it, and without a bias.
    by_class = getattr(network, "global_pool", None) == "token"
    return head.weight.T if by_class and (head.bias is None or not head.bias.any()) else None


def _random_projection(network: nn.Module, architecture: str, seed: int) -> Tensor | None:
    """For trials, of the width that CLIP's own weights have."""
    widths = [
        int(settings.num_classes)
        for name, settings in get_arch_pretrained_cfgs(architecture).items()
        if FINE_TUNED not in name
    ]
    if not widths:
        return None
    # On the CPU also where the network is only outlined.
    generator = torch.Generator(device="cpu").manual_seed(seed)
    width = int(network.num_features)  # type: ignore[arg-type]
    return torch.randn(width, widths[0], generator=generator, device="cpu") / width**0.5


def load_classifier(spec: recipes.Teacher, *, device: torch.device) -> nn.Module:
    """The same network whole, with the classifier that its weights bring: normalised pixels to logits (B, K),
    float32, frozen. What diagnostics move is this; teachers never have it.

    Raises ``TeacherError`` as ``load`` does, and for weights that bring no classifier.
    """
    where = weights.source(spec.weights)
    arguments = dict(spec.arguments)
    try:
        tag = _tag(spec.architecture, where, arguments.pop(STATISTICS, None))
        num_classes = _num_classes(spec.architecture, where, tag)
        network = _loaded(spec, where, tag, arguments, seed=0, num_classes=num_classes)
    except ArchitectureError as error:
        raise TeacherError(f"{error} (teacher.architecture, teacher.arguments)") from error
    return network.eval().requires_grad_(False).to(device)


def _num_classes(architecture: str, where: Source, tag: str | None) -> int:
    """What the classifier tells apart. Raises ``TeacherError`` for weights without one."""
    found = 0
    if where.path is not None:
        tensors = weights.read(where).tensors
        name = _classifiers(get_pretrained_cfg(architecture).classifier)[0]
        # As the authors of Swin name it, and as timm has it after conversion.
        names = (f"{name}.weight", f"{name.partition('.')[0]}.weight")
        found = next((len(tensors[name]) for name in names if name in tensors), 0)
    elif not where.is_random:
        found = int(get_arch_pretrained_cfgs(architecture)[f"{architecture}.{tag}"].num_classes)
    if found < 2:
        raise TeacherError(
            f"weights {where.label} of {architecture} bring no classifier: a fine-tuned network is needed"
        )
    return found


def _tag(architecture: str, where: Source, asked: Any) -> str | None:
    """The tag whose weights are wanted, or whose mean, std and size a file shares; None for the
    architecture's own.

    Raises ``TeacherError`` where that would be a guess.
    """
    name, _, tag = architecture.partition(".")
    if tag:
        raise TeacherError(
            f"teacher.architecture={architecture!r} holds a tag: give architecture={name!r} and "
            f"weights={tag!r}"
        )
    timm_maps.check_name(architecture)
    published = _published(architecture)
    wanted = asked if where.is_random or where.path is not None else where.text
    if wanted is not None and wanted not in published:
        raise weights.no_such_tag(str(wanted), architecture, list(published))
    if asked not in (None, wanted):
        raise TeacherError(
            f"teacher.arguments.{STATISTICS}={asked!r} contradicts teacher.weights={where.text!r}"
        )
    if where.path is not None and asked is None:
        weights.check_statistics(where, architecture, published, STATISTICS)
    quick = _quick(architecture)
    if quick != architecture and is_model(quick) and wanted in _published(quick):
        raise weights.needs_quickgelu(f"weights {wanted!r}", architecture, quick)
    return wanted


def _published(architecture: str) -> dict[str, weights.Statistics]:
    """(mean, std) of each tag of timm's for this architecture."""
    settings = get_arch_pretrained_cfgs(architecture)
    return {name.partition(".")[2]: (tuple(cfg.mean), tuple(cfg.std)) for name, cfg in settings.items()}


def _loaded(
    spec: recipes.Teacher,
    where: Source,
    tag: str | None,
    arguments: Mapping[str, Any],
    seed: int,
    num_classes: int = 0,
) -> nn.Module:
    """The network with its weights; of a file, with a classifier of ``num_classes`` or none."""
    # Not every family knows the argument, so that it is given only where there is something to drop.
    drop_path = {"drop_path_rate": spec.drop_path} if spec.drop_path > 0 else {}
    build = partial(
        timm_maps.build,
        spec.architecture,
        input_size=spec.input_size,
        arguments=arguments,
        pretrained_cfg=tag,
        **drop_path,
    )
    if where.is_random:
        with weights.drawn_from(seed, spec.architecture):
            return build(num_classes=0)
    if where.path is None:
        try:
            # With its classifier: timm insists on every name only for the published number of classes.
            return build(pretrained=True)
        except ArchitectureError:
            raise
        except Exception as error:  # the hub's clients raise errors that have no base in common
            raise weights.hub_failure(where.text, spec.architecture, error) from error
    network = build(num_classes=num_classes)
    _fill(network, spec.architecture, weights.read(where))
    return network


def _fill(network: nn.Module, architecture: str, checkpoint: Checkpoint) -> None:
    """The weights of a file into the network."""
    if not any(isinstance(module, QuickGELU) for module in network.modules()):
        weights.check_activation(checkpoint, architecture, _quick(architecture))
    tensors = _converted(network, architecture, checkpoint)
    weights.warn_of_resampling(checkpoint.label, checkpoint.tensors, tensors)
    settings: Mapping[str, Any] = network.pretrained_cfg  # type: ignore[assignment]
    heads = (*HEADS, *(f"{name}." for name in _classifiers(settings.get("classifier"))))
    weights.fit(network, tensors, of=checkpoint.label, into=architecture, heads=heads)


def _classifiers(named: str | Sequence[str] | None) -> tuple[str, ...]:
    """The modules that timm calls the classifiers of a network."""
    return (named,) if isinstance(named, str) else tuple(named or ())


def _converted(network: nn.Module, architecture: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under timm's names, by the rules of the file that the architecture is in."""
    tensors = dict(checkpoint.tensors)
    if "blocks.0.ls1.gamma" in network.state_dict():
        # DeiT III; timm applies this rule to that family alone, where the file has no way to see it.
        tensors = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): t for name, t in tensors.items()}
    rules = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rules is None:
        return tensors
    try:
        converted: dict[str, Tensor] = rules(tensors, network)
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise TeacherError(
            f"weights {checkpoint.label} are not of {architecture}: timm's conversion failed on {error} "
            "(teacher.architecture, teacher.arguments)"
        ) from error
    return converted


def _quick(architecture: str) -> str:
    return architecture.replace("_clip_", "_clip_quickgelu_")
