"""The one thing that every evaluation sees: a frozen network that turns uint8 pixels into features.

Teachers, students in the middle of a run and exported files all come to this; what is done with the features
is the business of the tasks. A backbone brings its own mean, std and input size.

Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.evaluate.naming import EMA
from fd_scale.export import choose, load_student, student_tensors
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


@dataclass(frozen=True, eq=False)
class Backbone:
    """A network to be evaluated; made by ``of_teacher`` and the other functions below."""

    name: str
    input_size: int
    """Side of the square input, pixels."""
    device: torch.device
    fingerprint: dict[str, Any]
    """What decides its features, as JSON: architecture, preprocessing, feature point, SHA-256 of weights."""
    read: Callable[[Tensor], Features]
    """uint8 pixels on ``device`` to the map after the final norm."""
    network: nn.Module
    """What runs in it."""

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Features:
        """The map after the final norm of uint8 pixels (B, 3, S, S) from any device.

        Raises ``ValueError`` for pixels of another size.
        """
        if pixels.shape[-2:] != (self.input_size, self.input_size):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} reached {self.name}, which takes "
                f"{self.input_size} x {self.input_size}"
            )
        return self.read(pixels.to(self.device))

    def pooled(self, pixels: Tensor) -> dict[str, Tensor]:
        """One vector per image (B, D) by kind: ``cls`` where there is a class token, and ``gap``."""
        return pool(self.tokens(pixels))


def pool(features: Features) -> dict[str, Tensor]:
    """``cls``, the class token, where the map has one, and ``gap``, the mean patch; (B, D) each."""
    pooled = {CLS: features.tokens_BND[:, 0]} if features.num_prefix_tokens else {}
    return pooled | {GAP: features.patches_BND.mean(dim=1)}


def of_teacher(teacher: Teacher, device: torch.device | str = "cpu") -> Backbone:
    """A teacher, as the student sees it, on the device that it was loaded to."""
    record = teacher.fingerprint
    return Backbone(
        teacher.name, teacher.input_size, torch.device(device), record, teacher.features, teacher.network
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
    )


def of_export(weights: Path, *, name: str | None = None, device: torch.device | str = "cpu") -> Backbone:
    """The student in a file of ``fd-scale export``. Raises ``RunError`` for a file that is none."""
    network = load_student(weights).to(device)
    with safe_open(weights, framework="pt") as file:
        spec = recipes.Student.model_validate_json(file.metadata()["student"])
    return of_network(
        network,
        map_form(network, spec),
        name=name or weights.stem,
        input_size=spec.input_size,
        architecture=spec.architecture,
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
    )


def of_network(
    network: nn.Module,
    form: MapForm,
    *,
    name: str,
    input_size: int,
    architecture: str,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    **facts: Any,
) -> Backbone:
    """A network whose own call gives its map, as students are; ``facts`` go into its fingerprint."""
    parameter = next(network.parameters())

    def read(pixels: Tensor) -> Features:
        with _evaluating(network):
            output = network(normalise(pixels, mean, std, parameter.dtype))
        return timm_maps.as_features(output, form)

    record = fingerprint(
        network.state_dict(),
        architecture=architecture,
        feature_point="last map after its norm",
        input_size=input_size,
        mean=mean,
        std=std,
        **facts,
    )
    return Backbone(name, input_size, parameter.device, record, read, network)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Without dropped paths, and afterwards in the mode that it was in."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
