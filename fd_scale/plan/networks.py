"""A recipe's networks without storage: every shape and dtype of them, and none of the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fd_scale.plan.ledger import Ledger
from fd_scale.run.recipe import Recipe
from fd_scale.student import Student, build_student
from fd_scale.teachers import Teacher, load


def without_storage(recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Teacher, Student]:
    """Teacher (in ``dtype``) and student (in float32) of a recipe on the meta device.

    No weights are read. Raises the errors that the run itself would for wrong names, arguments and maps.
    """
    # A teacher shows its map once while it is made, and the ledger knows the shapes of repeated blocks.
    with torch.device("meta"), _quiet("fd_scale"), Ledger():
        spec = recipe.teacher.model_copy(update={"weights": "random"})
        teacher = load(spec, device="meta", dtype=dtype, seed=recipe.seed)
        return teacher, build_student(recipe, [teacher])


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without the announcement of random weights: nothing is loaded here."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
