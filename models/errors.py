"""What ``models`` answers when it is asked for something impossible.

Apart from the catalogue, so that the architectures which the catalogue imports may raise it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelError(ValueError):
    """An unknown architecture, or arguments that no network can have; the message says what fits."""


def near_misses(name: str, valid: Iterable[str]) -> str:
    """The valid names closest to ``name`` as ``'; did you mean a, b?'``; empty when none is close."""
    close = difflib.get_close_matches(name, sorted(valid), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
