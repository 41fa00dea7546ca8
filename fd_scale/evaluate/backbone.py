"""The one thing that every evaluation sees: a frozen network that turns uint8 pixels into features.

Teachers, students in the middle of a run and exported files all come to this; what is done with the features
is the business of the tasks. A backbone brings its own mean, std and input size.

Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.evaluate.inside import laid_out_as, norm_of, noting_input, resampled, stages
from fd_scale.evaluate.naming import EMA
from fd_scale.export import choose, embedder_tensors, embedding_file, load_student, student_tensors
from fd_scale.objective.features import Features
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from fd_scale.run import recipe as recipes
from fd_scale.run.folder import RunFolder
from fd_scale.student import Student, build_backbone, map_form
from fd_scale.teachers import Teacher
from fd_scale.teachers.fingerprint import fingerprint
from fd_scale.timm_maps import MapForm

CLS = "cls"
"""Pooling by the class token."""
GAP = "gap"
"""Pooling by the mean patch; class token and registers have no part in it."""
PROJECTED = "projected"
"""Pooling by the class token, projected to CLIP's joint embedding."""


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network to be evaluated; made by ``of_teacher`` and the other functions below."""

    name: str
    input_size: int
    """Side of the square input, pixels."""
    device: torch.device
    fingerprint: dict[str, Any]
    """What decides its features, as JSON: architecture, preprocessing, feature point, SHA-256 of weights."""
    values: Callable[[Tensor], Tensor]
    """uint8 pixels on ``device`` to normalised ones."""
    read: Callable[[Tensor], Features]
    """Normalised pixels to the map after the final norm."""
    network: nn.Module
    """What runs in it."""
    project: Callable[[Tensor], Tensor] | None = None
    """The class token, or the mean patch where there is none, (B, D) to CLIP's joint embedding (B, E), where
    the network has such a head."""

    @torch.no_grad()
    def tokens(self, pixels: Tensor, *, normed: bool = True) -> Features:
        """The map after the final norm, or before it, of uint8 pixels (B, 3, S, S) from any device; the same
        for a network without a final norm.

        Raises ``ValueError`` for pixels of another size.
        """
        values = self._entering(pixels)
        norm = None if normed else norm_of(self.network)
        with _evaluating(self.network):
            if norm is None:
                return self.read(values)
            with noting_input(norm) as seen:
                features = self.read(values)
        return laid_out_as(features, seen[-1])

    @torch.no_grad()
    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Four maps (B, C, H, W) of strides 4, 8, 16 and 32 pixels, none of them normed: a hierarchical
        network's stages, or the one map of a plain ViT resampled (``inside.resampled``).

        Raises ``ValueError`` for pixels of another size.
        """
        with _evaluating(self.network):
            found = stages(self.network, self._entering(pixels))
        return found or resampled(self.tokens(pixels, normed=False), self.input_size)

    @torch.no_grad()
    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        """One vector per image (B, D) by kind: ``cls`` where there is a class token, ``gap``, and
        ``projected`` where the class token has a projection to CLIP's joint embedding."""
        found = pool(self.tokens(pixels))
        if self.project is not None:
            found[PROJECTED] = self.project(found.get(CLS, found[GAP]))
        return found

    def _entering(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.input_size, self.input_size):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} reached {self.name}, which takes "
                f"{self.input_size} x {self.input_size}"
            )
        return self.values(pixels.to(self.device))


def pool(features: Features) -> dict[str, Tensor]:
    """``cls``, the class token, where the map has one, and ``gap``, the mean patch; (B, D) each."""
    pooled = {CLS: features.tokens_BND[:, 0]} if features.num_prefix_tokens else {}
    return pooled | {GAP: features.patches_BND.mean(dim=1)}


def of_teacher(teacher: Teacher, device: torch.device | str = "cpu") -> Backbone:
    """A teacher, as the student sees it, on the device that it was loaded to."""
    return Backbone(
        teacher.name,
        teacher.input_size,
        torch.device(device),
        teacher.fingerprint,
        values=lambda pixels: normalise(pixels, teacher.mean, teacher.std, teacher.dtype),
        read=lambda values: teacher.read(teacher.network, values),
        network=teacher.network,
        project=teacher.projection,
    )


def of_student(student: Student, *, name: str = "student") -> Backbone:
    """The backbone of a student, without its projectors, as it is now; also in the middle of its training.

    It stays on its device, in its dtype, and in the mode (training or not) that it is in. The fingerprint is
    of its present weights; parameters that are sharded must be gathered.
    """
    return of_network(
        student.backbone,
        student.form,
        name=name,
        input_size=student.input_size,
        architecture=type(student.backbone).__name__,
        project=student.embedder,
    )


def of_export(weights: Path, *, name: str | None = None, device: torch.device | str = "cpu") -> Backbone:
    """The student in a file of ``fd-scale export``. Raises ``RunError`` for a file that is none."""
    network = load_student(weights).to(device)
    with safe_open(weights, framework="pt") as file:
        spec = recipes.Student.model_validate_json(file.metadata()["student"])
    beside = embedding_file(weights)
    return of_network(
        network,
        map_form(network, spec),
        name=name or weights.stem,
        input_size=spec.input_size,
        architecture=spec.architecture,
        project=_embedder(load_file(beside) if beside.is_file() else {}, device),
    )


def of_run(
    run: Path, *, step: int | None = None, average: bool = False, device: torch.device | str = "cpu"
) -> Backbone:
    """The student of a run's checkpoint (the newest, or of ``step``), read straight from its fragments; with
    ``average`` the moving average of its weights.

    Raises ``RunError`` as ``export`` does.
    """
    folder = RunFolder.at(run)
    spec = folder.read_recipe().student
    checkpoint = choose(folder, step)
    network = build_backbone(spec)
    network.load_state_dict(student_tensors(checkpoint, average=average), strict=True)
    network.to(device)
    return of_network(
        network,
        map_form(network, spec),
        name=f"{folder.path.resolve().name}{EMA * average}@{checkpoint.step}",
        input_size=spec.input_size,
        architecture=spec.architecture,
        project=_embedder(embedder_tensors(checkpoint, average=average), device),
    )


def _embedder(tensors: Mapping[str, Tensor], device: torch.device | str) -> nn.Linear | None:
    """The head to CLIP's embedding, or None where there is none."""
    if not tensors:
        return None
    width, channels = tensors["weight"].shape
    head = nn.Linear(channels, width).requires_grad_(False)
    head.load_state_dict(dict(tensors))
    return head.to(device)


def of_network(
    network: nn.Module,
    form: MapForm,
    *,
    name: str,
    input_size: int,
    architecture: str,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    project: nn.Module | None = None,
    **facts: Any,
) -> Backbone:
    """A network whose own call gives its map, as students are; ``facts`` go into its fingerprint."""
    parameter = next(network.parameters())
    record = fingerprint(
        network.state_dict(),
        architecture=architecture,
        feature_point="last map after its norm",
        input_size=input_size,
        mean=mean,
        std=std,
        **facts,
    )
    return Backbone(
        name,
        input_size,
        parameter.device,
        record,
        values=lambda pixels: normalise(pixels, mean, std, parameter.dtype),
        read=lambda values: timm_maps.as_features(network(values), form),
        network=network,
        project=project,
    )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropped paths, and afterwards in the mode that it was in."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
