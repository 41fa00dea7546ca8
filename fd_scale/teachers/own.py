"""Teachers whose architecture is one of ``models``, such as SwinV2-G, which no other library has.

They are trained on ImageNet's mean and std, and there is no hub of them: weights are a local file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import models
from fd_scale.errors import TeacherError
from fd_scale.objective.features import Features
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD
from fd_scale.run import recipe as recipes
from fd_scale.teachers import weights
from fd_scale.teachers.frozen import Teacher, freeze
from fd_scale.timm_maps import UNNORMED_ON_REQUEST, normed_by
from models.swinv2 import SwinV2, official_state_dict

HEADS = ("head.",)
DEFAULT_SIZE = 224
FINAL_NORM = "norm"
"""Its name in every architecture of ``models``."""


def load(spec: recipes.Teacher, *, device: torch.device, dtype: torch.dtype, seed: int) -> Teacher:
    """The teacher of a recipe with ``library="models"``; see ``fd_scale.teachers.load``."""
    where = weights.source(spec.weights)
    if not where.is_random and where.path is None:
        raise TeacherError(
            f"teacher.weights={spec.weights!r} is neither a local file nor 'random', and architectures of "
            "models have no hub"
        )
    if where.is_random:
        with weights.drawn_from(seed, spec.architecture):
            network = _build(spec)
    else:
        network = _build(spec)
        checkpoint = weights.read(where)
        tensors = checkpoint.tensors
        if isinstance(network, SwinV2):
            tensors = official_state_dict(tensors)
        weights.fit(network, tensors, of=checkpoint.label, into=spec.architecture, heads=HEADS)
    feature_point = normed_by(FINAL_NORM)
    if not spec.final_norm:
        setattr(network, FINAL_NORM, nn.Identity())
        feature_point = UNNORMED_ON_REQUEST
    return freeze(
        network,
        read,
        device=device,
        dtype=dtype,
        library=spec.library,
        architecture=spec.architecture,
        arguments=spec.arguments,
        weights=where.label,
        feature_point=feature_point,
        input_size=spec.input_size or DEFAULT_SIZE,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        drop_path=spec.drop_path,
    )


def read(network: nn.Module, pixels_BCHW: Tensor) -> Features:
    """The network's own tokens."""
    return Features(network(pixels_BCHW), network.grid, network.num_prefix_tokens)  # type: ignore[arg-type]


def _build(spec: recipes.Teacher) -> nn.Module:
    arguments: dict[str, Any] = dict(spec.arguments)
    try:
        return models.create(
            spec.architecture,
            input_size=spec.input_size or DEFAULT_SIZE,
            drop_path=spec.drop_path,
            **arguments,
        )
    except models.ModelError as error:
        raise TeacherError(f"{error} (teacher.architecture, teacher.arguments)") from error
