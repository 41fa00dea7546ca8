"""The moving average of the weights (EMA), sharded as the weights are, always in float32.

It follows the float32 weights that the optimizer updates, never their bf16 copies: with a decay of 0.9998 an
update would vanish in bf16. It is part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fd_scale.engine import fragments as where
from fd_scale.engine.fragments import Fragment


class Average:
    """average <- decay x average + (1 - decay) x weights after every applied step; it begins at the weights
    as they are."""

    def __init__(self, deepspeed: Any, decay: float) -> None:
        self.decay = decay
        self._deepspeed = deepspeed
        self._fragments = where.fragments(deepspeed)
        self.values = {f.name: f.of(f.buffer).clone() for f in self._fragments}
        """This rank's fragments, flat float32, by parameter."""

    @torch.no_grad()
    def update(self, applied: Tensor) -> None:
        """Follow one step, unless it was not ``applied``: a bool that may be known on the device alone."""
        weights = [f.of(f.buffer) for f in self._fragments]
        share = (1 - self.decay) * applied
        if weights:
            kept = [self.values[f.name] for f in self._fragments]
            torch._foreach_lerp_(kept, weights, [share.to(weights[0].device)] * len(weights))

    def fragments(self) -> list[tuple[Fragment, Tensor]]:
        """Every fragment with its average."""
        return [(fragment, self.values[fragment.name]) for fragment in self._fragments]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """With the average in the place of the weights, for a measurement. Collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for fragment, average in self.fragments():
            weights = fragment.of(fragment.buffer)
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
        where.refresh_parameters(self._deepspeed)
