"""Student tokens to the teacher's width, and to the teacher's grid where the two differ.

Which tokens are compared, and how, is not decided here.

Shapes: B batch, N student tokens, P prefix tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError, near_misses

RESAMPLES = ("exact", "bilinear", "bicubic")

Consume = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Student tokens (B, N, in_width), weight (out_width, in_width) and bias (out_width,) to whatever is made of
them."""


class Product(nn.Linear):
    """A linear map, whose factors can be handed to a consumer that never holds the product whole.

    They are read in this module's own forward, which is where ZeRO-3 gathers them.
    """

    def forward(self, tokens_BND: Tensor, consume: Consume | None = None) -> Tensor:
        """(B, N, out_width), or what ``consume`` makes of tokens, weight and bias."""
        if consume is None:
            return super().forward(tokens_BND)
        return consume(tokens_BND, self.weight, self.bias)


class Projector(nn.Module):
    """The 1x1 convolution of FD (paper, section 3) with PyTorch's initialisation, then the grid's resampling.

    ``from_grid`` and ``to_grid`` are (height, width) in patches. ``exact`` takes equal grids alone; the
    others resample unequal ones. Prefix tokens (class, registers) are projected and otherwise left as they
    are. Raises ``ModelError`` for an unknown ``resample`` and for unequal grids under ``exact``.
    """

    def __init__(
        self,
        in_width: int,
        out_width: int,
        *,
        from_grid: tuple[int, int],
        to_grid: tuple[int, int],
        num_prefix_tokens: int,
        resample: str,
    ) -> None:
        super().__init__()
        if resample not in RESAMPLES:
            raise ModelError(
                f"resample={resample!r} is unknown{near_misses(str(resample), RESAMPLES)} "
                f"(ways: {', '.join(RESAMPLES)})"
            )
        self.from_grid, self.to_grid = tuple(from_grid), tuple(to_grid)
        if resample == "exact" and self.from_grid != self.to_grid:
            raise ModelError(
                f"resample='exact' needs equal grids, but the student's is {_by(self.from_grid)} and the "
                f"teacher's {_by(self.to_grid)}: choose 'bilinear' or 'bicubic', or other sizes"
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.resample = resample
        self.linear = Product(in_width, out_width)

    def forward(self, tokens_BND: Tensor, consume: Consume | None = None) -> Tensor:
        """(B, P + h w, in_width) on ``from_grid`` to (B, P + h w, out_width) on ``to_grid``, in one dtype.

        With ``consume``, what it makes of the factors of that map: of student tokens on ``to_grid``, since a
        linear map commutes with resampling, and of the weights.
        """
        if consume is not None:
            return self.linear(self._on_the_teachers_grid(tokens_BND), consume=consume)
        return self._on_the_teachers_grid(self.linear(tokens_BND))

    def _on_the_teachers_grid(self, tokens_BND: Tensor) -> Tensor:
        if self.from_grid == self.to_grid:
            return tokens_BND
        prefix_BPD = tokens_BND[:, : self.num_prefix_tokens]
        patches_BND = tokens_BND[:, self.num_prefix_tokens :]
        return torch.cat(
            (prefix_BPD, resample_patches(patches_BND, self.from_grid, self.to_grid, self.resample)), dim=1
        )


def resample_patches(
    patches_BND: Tensor, from_grid: tuple[int, ...], to_grid: tuple[int, ...], mode: str
) -> Tensor:
    """A patch map (B, h w, D) on another grid, in the same dtype, computed in float32 at least.

    Patches are areas (corners are not aligned); antialiased when a side shrinks.
    """
    map_BDHW = patches_BND.unflatten(1, from_grid).permute(0, 3, 1, 2)
    map_BDHW = map_BDHW.to(torch.promote_types(map_BDHW.dtype, torch.float32))
    shrinks = any(new < old for new, old in zip(to_grid, from_grid, strict=True))
    map_BDHW = F.interpolate(map_BDHW, size=to_grid, mode=mode, align_corners=False, antialias=shrinks)
    return map_BDHW.flatten(2).transpose(1, 2).to(patches_BND.dtype)


def _by(grid: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in grid)
