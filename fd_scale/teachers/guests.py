"""Teachers at the training loop: the tokens of their maps that a run regresses, and a CLIP's embedding.

They leave here as the network gave them; whitening belongs to the loss, which can do it in passing.

Shape letters: B images, M selected tokens, D channels, E CLIP's joint embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fd_scale.errors import RecipeError
from fd_scale.objective.features import Features
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

    def __call__(self, pixels: Mapping[int, Tensor]) -> Tensor:
        """Tokens (B, M, D) of the view at the teacher's size; ``pixels`` are uint8 (B, 3, S, S) by size S."""
        return self.selected(self.features(pixels))

    def selected(self, features: Features) -> Tensor:
        """Of a whole map, the tokens (B, M, D) that the recipe regresses."""
        return select(features, granularity=self.objective.granularity, cls=self.objective.cls)

    def embedding(self, features: Features) -> Tensor:
        """Of a whole map, CLIP's embedding as a lone token (B, 1, E), float32."""
        if self.teacher.projection is None:
            raise ValueError(f"teacher {self.teacher.name} has no projection")
        return self.teacher.projection(features.tokens_BND[:, 0])[:, None]

    @torch.no_grad()
    def features(self, pixels: Mapping[int, Tensor]) -> Features:
        """The whole map of the view at the teacher's size."""
        size = self.teacher.input_size
        if size not in pixels:
            held = ", ".join(str(side) for side in sorted(pixels))
            raise ValueError(
                f"teacher {self.teacher.name} takes {size} px, the batch holds {held or 'nothing'}"
            )
        return self.teacher.features(pixels[size])


def targets(guests: Sequence[Guest], pixels: Mapping[int, Tensor]) -> list[Tensor]:
    """Tokens (B, M, D) of each teacher, and last, where the recipe wants it, the first one's embedding
    (B, 1, E): one target for each output of the student."""
    first, *others = guests
    features = first.features(pixels)
    found = [first.selected(features), *(guest(pixels) for guest in others)]
    return [*found, first.embedding(features)] if first.objective.embedding_weight else found
