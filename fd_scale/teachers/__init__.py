"""The frozen networks whose feature maps are regressed: one protocol, whatever library they come from.

``load`` gives a teacher, ``Guest`` the tokens of it that a run regresses, ``difference`` says whether two
runs had the same one. Each library has a file of its own, imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import torch

from fd_scale.run import recipe as recipes
from fd_scale.teachers.fingerprint import difference
from fd_scale.teachers.frozen import Teacher
from fd_scale.teachers.guests import Guest, targets

__all__ = ["Guest", "Teacher", "difference", "load", "targets"]

LIBRARIES: Mapping[str, str] = {
    "timm": "fd_scale.teachers.timm",
    "open_clip": "fd_scale.teachers.open_clip",
    "models": "fd_scale.teachers.own",
}


def load(spec: recipes.Teacher, *, device: torch.device | str, dtype: torch.dtype, seed: int) -> Teacher:
    """The teacher of a recipe on its device, frozen, in ``dtype``.

    ``seed`` decides random weights alone. Raises ``TeacherError`` for an unknown architecture or tag, for
    weights that cannot be had or do not fit, and for arguments that the architecture does not take.
    """
    module = import_module(LIBRARIES[spec.library])
    teacher: Teacher = module.load(spec, device=torch.device(device), dtype=dtype, seed=seed)
    return teacher
