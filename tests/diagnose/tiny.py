"""Networks small enough for a test, as subjects, and a world of one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import models
from fd_scale.diagnose.subjects import Subject
from fd_scale.evaluate.backbone import of_student, of_teacher
from fd_scale.run import recipe as recipes
from fd_scale.run.world import Place, World
from fd_scale.student import Student, map_form
from tests.teachers.tiny import loaded, shaken, spec

ALONE = World(Place(0, 1, 0, "single process"))
"""Without a process group: nothing collective may be asked of it."""
SIDE = 32
VIT: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 2}
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


def timm_subject(
    architecture: str, *, dtype: torch.dtype = torch.float32, side: int = SIDE, **arguments: Any
) -> Subject:
    """A network of timm with every weight moved."""
    teacher = loaded(spec(architecture, input_size=side, arguments=arguments), dtype)
    return _of(teacher)


def clip_subject(**vision: Any) -> Subject:
    """A vision tower of open_clip with every weight moved."""
    settings = {"width": 24, "layers": 2, "head_width": 12, "patch_size": 8, **vision}
    return _of(loaded(spec("ViT-B-16", library="open_clip", input_size=SIDE, arguments=settings)))


def own_subject(architecture: str, *, side: int = SIDE, **arguments: Any) -> Subject:
    """A network of ``models`` with every weight moved, as a student is."""
    torch.manual_seed(0)
    network = shaken(models.create(architecture, input_size=side, **arguments))
    is_vit = architecture.startswith("vit")
    asked = recipes.Student(
        architecture=architecture,
        input_size=side,
        position="shared_rpb" if is_vit else None,
        layer_scale=0.1 if is_vit else None,
    )
    student = Student(network, map_form(network, asked), [], input_size=side, objective=recipes.Objective())
    return Subject(architecture, architecture, of_student(student.eval()), student.backbone)


def pixels(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """uint8 (B, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def attention(batch: int, heads: int, tokens: int, seed: int = 0) -> Tensor:
    """Random maps (B, H, N, N) with a few large entries, rows of sum 1, float32."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, heads, tokens, tokens, generator=generator)).softmax(dim=-1)


def _of(teacher: Any) -> Subject:
    network: nn.Module = shaken(teacher.network)
    return Subject(teacher.name, teacher.name, of_teacher(teacher), network)
