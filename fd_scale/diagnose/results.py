"""What did a diagnosis find? Everything that the page shows, before it is drawn.

``session`` fills it in, ``figures`` draw from it, ``summary`` draws conclusions.

Shape letters: B images, h and w a grid, S pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fd_scale.diagnose.anatomy import Anatomy
from fd_scale.diagnose.drift import Drift
from fd_scale.diagnose.landscape import Landscape, Surface
from fd_scale.diagnose.survey import Survey

Role = Literal["before", "after"]
"""The network that the other is set against, and the one that is diagnosed; the latter may stand alone."""


@dataclass(frozen=True, eq=False)
class Side:
    """One network and what was found of it."""

    name: str
    role: Role
    origin: str
    facts: Mapping[str, Any]
    anatomy: Anatomy
    survey: Survey


@dataclass(frozen=True, eq=False)
class Pictures:
    """Single images and what networks make of them; by the name of a side."""

    names: Sequence[str]
    images: NDArray[np.uint8]
    """(B, S, S, 3)."""
    colours: Mapping[str, NDArray[np.float32]]
    """(B, h, w, 3): final patch tokens as colours (``pictures.pca_colours``)."""
    norms: Mapping[str, NDArray[np.float32]]
    """(B, h, w): lengths of the last block's patch tokens, relative to their median."""
    rollouts: Mapping[str, NDArray[np.float32]]
    """(B, h, w): where there is such a thing (``rollout``)."""


@dataclass(frozen=True, eq=False)
class Results:
    """A whole diagnosis."""

    title: str
    sides: Sequence[Side]
    about: Mapping[str, str]
    """Facts for the head of the page: data, images, run."""
    cka: Tensor | None = None
    """float64: layers of the first side by layers of the last (or the one side with itself)."""
    landscapes: Sequence[Landscape] = ()
    surfaces: Sequence[Surface] = ()
    pictures: Pictures | None = None
    drift: Drift | None = None
    training: Sequence[Mapping[str, Any]] = ()
    """Rows of the run's metrics."""
    notes: Sequence[str] = field(default_factory=tuple)
    """What is not shown, and why."""

    @property
    def before(self) -> Side | None:
        """The network that the other is set against."""
        return next((side for side in self.sides if side.role == "before"), None)

    @property
    def after(self) -> Side:
        """The network that is diagnosed."""
        return next(side for side in self.sides if side.role == "after")

    def role_of(self, network: str) -> Role:
        """Of a side, by name."""
        return next((side.role for side in self.sides if side.name == network), "after")
