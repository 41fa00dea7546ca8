"""A teacher at the training loop: the tokens of its map that a run regresses.

They leave here as the network gave them; whitening belongs to the loss, which can do it in passing.

Shape letters: B images, M selected tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fd_scale.errors import RecipeError
from fd_scale.objective.targets import has_class_token, select
from fd_scale.run import recipe as recipes
from fd_scale.teachers.frozen import Teacher


class Guest:
    """A teacher with the recipe's choice of tokens. Raises ``RecipeError`` for a class token it does not
    have."""

    def __init__(self, teacher: Teacher, objective: recipes.Objective) -> None:
        wanted = has_class_token(granularity=objective.granularity, cls=objective.cls)
        if wanted and teacher.num_prefix_tokens == 0:
            raise RecipeError(
                f"objective.cls={objective.cls!r} with objective.granularity={objective.granularity!r} "
                f"regresses the teacher's class token, but {teacher.name} has none: set objective.cls=drop "
                "(whole map) or objective.granularity=gap (mean patch)"
            )
        self.teacher = teacher
        self.objective = objective

    @torch.no_grad()
    def __call__(self, pixels: Mapping[int, Tensor]) -> Tensor:
        """Tokens (B, M, D) of the view at the teacher's size; ``pixels`` are uint8 (B, 3, S, S) by size S."""
        size = self.teacher.input_size
        if size not in pixels:
            held = ", ".join(str(side) for side in sorted(pixels))
            raise ValueError(
                f"teacher {self.teacher.name} takes {size} px, the batch holds {held or 'nothing'}"
            )
        features = self.teacher.features(pixels[size])
        return select(features, granularity=self.objective.granularity, cls=self.objective.cls)
