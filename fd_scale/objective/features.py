"""The noun that teachers and students both speak: a map of tokens with its grid.

Shape letters: B images, N tokens (prefix tokens first, then the grid row by row from the top left), D width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """A feature map as tokens.

    ``tokens_BND`` has ``num_prefix_tokens + height * width`` tokens; the prefix holds the class token first
    (when there is one) and register tokens after it. ``grid`` is ``(height, width)`` in patches.
    """

    tokens_BND: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int

    def __post_init__(self) -> None:
        expected = self.num_prefix_tokens + self.grid[0] * self.grid[1]
        if self.tokens_BND.ndim != 3 or self.tokens_BND.shape[1] != expected:
            raise ValueError(
                f"tokens of shape {tuple(self.tokens_BND.shape)} are not (B, {expected}, D): "
                f"{self.num_prefix_tokens} prefix tokens + a {self.grid[0]}x{self.grid[1]} grid"
            )

    @property
    def patches_BND(self) -> Tensor:
        """The grid alone, (B, height * width, D); a view."""
        return self.tokens_BND[:, self.num_prefix_tokens :]
