"""The ways a user can be wrong, each with one class; the command line turns them into one message and exit
status 2.

A message says what is wrong, the value, what would be right, and which file or flag to edit. Faults of our
own are ordinary exceptions and keep their traceback (exit status 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user can put right. Never raised for a fault of the program."""


class RecipeError(UserError):
    """A recipe that cannot be run: unknown key, wrong type, impossible pair."""


class ScaleError(UserError):
    """A ds_configs file, or a batch that does not divide over these processes."""


class ShardError(UserError):
    """Shards, an index or a folder of images that cannot be used."""


class TeacherError(UserError):
    """A teacher that cannot be built, or weights that do not fit it."""


class PlanError(UserError):
    """A cluster that cannot be planned for: an unknown GPU, a batch script without what is asked of it."""


class RunError(UserError):
    """A run directory or a checkpoint that cannot be used."""


def near_misses(name: str, valid: Iterable[str], limit: int = 3) -> str:
    """The valid names closest to ``name`` as ``'; did you mean a, b?'``, or an empty string when none is
    close."""
    close = difflib.get_close_matches(name, sorted(valid), n=limit, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
