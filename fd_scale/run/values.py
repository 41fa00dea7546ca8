"""The plain values of a recipe: how they are read from a file, and how one of them is changed by a word.

What they mean and whether they are right is the business of ``recipe.py``.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from fd_scale.errors import RecipeError, near_misses


def read_values(path: Path) -> dict[str, Any]:
    """The plain values of a recipe file, not yet checked; raises ``RecipeError`` for a file that has none."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"recipe file {path} does not exist") from None
    except OSError as error:
        raise RecipeError(f"recipe file {path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"recipe file {path} holds {type(values).__name__}, expected an object")
    return values


def literal(text: str) -> Any:
    """The value of a word: JSON or a Python literal, or the text itself."""
    if text in ("null", "true", "false"):
        return json.loads(text)
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError):
        return text
    return value


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key that exists; ``arguments`` dictionaries alone take new names. Raises
    ``RecipeError``."""
    *parents, leaf = key.split(".")
    place: Any = values
    for depth, part in enumerate([*parents, leaf]):
        free = parents[-1:] == ["arguments"] and depth == len(parents)
        if not isinstance(place, dict) or (part not in place and not free):
            known = place if isinstance(place, dict) else {}
            prefix = ".".join(parents[:depth])
            names = ", ".join(f"{prefix}.{n}" if prefix else n for n in known) or "none, it is a plain value"
            raise RecipeError(
                f"unknown recipe field {key!r}{near_misses(part, known)} (fields here: {names})"
            )
        if depth < len(parents):
            place = place[part]
    place[leaf] = value
