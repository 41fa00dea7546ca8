"""From a word on the command line (``naming.py``) to a frozen network.

Libraries load as they do for teachers: by their own mean, std and input size, with the same refusals.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fd_scale.evaluate import tuned
from fd_scale.evaluate.backbone import Backbone, of_export, of_run, of_teacher
from fd_scale.evaluate.naming import (
    ExportedFile,
    LabelledRun,
    LibraryNetwork,
    label,
    meaning,
    refuse_unused,
)
from fd_scale.teachers import load


def open_source(
    text: str, *, step: int | None = None, input_size: int | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """The backbone that ``text`` means, on its device, in float32.

    ``step`` chooses a run's checkpoint, ``input_size`` (pixels) is for networks of libraries. Raises
    ``SourceError`` for a word that names none, and the errors of runs and teachers.
    """
    found = meaning(text, input_size=input_size)
    refuse_unused(text, found, step=step, input_size=input_size)
    if isinstance(found, LibraryNetwork):
        taught = load(found.spec, device=device, dtype=torch.float32, seed=found.seed)
        return replace(of_teacher(taught, device), name=label(text))
    if isinstance(found, ExportedFile):
        return of_export(found.path, device=device)
    if isinstance(found, LabelledRun):
        return tuned.load(found, step=step).backbone(device)
    return of_run(found.folder.path, step=step, average=found.average, device=device)
