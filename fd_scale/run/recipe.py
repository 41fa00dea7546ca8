"""What is asked of a run: the science, and a few habits that are not science.

A recipe is a frozen value. It is written in Python (``recipes.py``), recorded as JSON, and changed for a
trial with ``--set section.field=value``. Everything is checked here, before anything is loaded. Its parts are
in ``sections.py``; how the run fits a machine is the business of ``scale.py``, names and paths of a run
directory that of ``folder.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, PositiveInt, ValidationError, model_validator

from fd_scale.errors import RecipeError, near_misses
from fd_scale.run.sections import (
    Data,
    Habits,
    Objective,
    Optim,
    Schedule,
    Section,
    Student,
    Teacher,
    View,
)
from fd_scale.run.values import assign, literal, read_values

MAX_STREAMS = 1024
"""Most streams that the order of the data is cut into, hence most processes that can share a run."""


class RunRecipe(Section):
    """What is asked of any run, whatever it learns: order of the data, optimizer, schedule, habits."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    notes: str = ""
    """Where the numbers come from, and what was decided where sources disagree."""
    view: View = View()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    data: Data = Data()
    global_batch: PositiveInt = 2048
    """Images per optimizer step, over all processes."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    scale: str
    """A file of ``ds_configs`` (name or path): how the run fits the hardware. Not part of the fingerprint."""
    run: Habits = Habits()

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        for name in ("min_lr", "warmup_lr"):
            if getattr(self.schedule, name) > self.optim.lr:
                raise ValueError(
                    f"schedule.{name}={getattr(self.schedule, name)} must not exceed optim.lr={self.optim.lr}"
                )
        if self.schedule.images < self.global_batch:
            raise ValueError(
                f"schedule.images={self.schedule.images:,} is below one global_batch={self.global_batch:,}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_images={self.schedule.warmup_images:,} fills all {self.steps} steps "
                f"of global_batch={self.global_batch:,}: lower it, or raise schedule.images="
                f"{self.schedule.images:,}"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps: the images to see, in whole global batches, rounded up."""
        return -(-self.schedule.images // self.global_batch)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.schedule.warmup_images / self.global_batch)

    def science(self, *, defaults: bool = True) -> dict[str, Any]:
        """What shapes the result, as plain JSON values; without ``defaults``, only what differs from them.

        Of the data it is not where they lie, nor how much damage is borne, so that a run that stopped on
        either can go on with another answer.
        """
        aside = {"shards", "on_change", "max_bad_fraction", "max_bad_shards"}
        exclude: dict[str, Any] = {"notes": True, "scale": True, "run": True, "data": aside}
        values = self.model_dump(mode="json", exclude=exclude, exclude_defaults=not defaults)
        if "sources" in values.get("data", {}):
            values["data"]["sources"] = list(self.data.sources.values())
        return {name: value for name, value in values.items() if value != {}}  # {}: a section at its defaults

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of the science, whatever the machine. Fields at their defaults do not count, so
        that one which a later version adds renames no run; a recorded recipe holds them all."""
        canonical = json.dumps(self.science(defaults=False), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """Name of the run directory."""
        return f"{self.name}-{self.fingerprint}"

    def to_json(self) -> str:
        """The record form, indented, one trailing newline."""
        return self.model_dump_json(indent=2) + "\n"


class Recipe(RunRecipe):
    """One distillation, whole."""

    student: Student
    teacher: Teacher
    objective: Objective = Objective()

    @model_validator(mode="after")
    def _family(self) -> Self:
        """Position and LayerScale belong to the ViTs of ``models`` and to no other family."""
        student = self.student
        if student.architecture.startswith("vit_"):
            if student.position is None:
                raise ValueError(
                    f"student.position=null leaves {student.architecture!r} without positions: "
                    "choose shared_rpb, rpb or ape"
                )
            return self
        if student.position is not None:
            raise ValueError(
                f"student.position={student.position!r} is for the ViTs of models (vit_*); "
                f"{student.architecture!r} brings its own: set student.position=null"
            )
        if student.layer_scale is not None:
            raise ValueError(
                f"student.layer_scale={student.layer_scale} is for the ViTs of models (vit_*), not for "
                f"{student.architecture!r}: set student.layer_scale=null, and give the architecture's own "
                "argument in student.arguments"
            )
        return self


R = TypeVar("R", bound=RunRecipe)


def streams_of(global_batch: int) -> int:
    """The largest divisor of the global batch up to ``MAX_STREAMS``: so many streams has the data's order."""
    return next(size for size in range(min(global_batch, MAX_STREAMS), 0, -1) if global_batch % size == 0)


def build(values: Mapping[str, Any]) -> Recipe:
    """A checked recipe of a distillation from nested plain values; errors as of ``checked``."""
    return checked(Recipe, values)


def checked(kind: type[R], values: Mapping[str, Any]) -> R:
    """A checked recipe of a kind from nested plain values; a ``RecipeError`` names field and remedy."""
    try:
        # JSON mode: lists become tuples, while every other type stays strict.
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(_explain(kind, error)) from None
    except TypeError as error:
        raise RecipeError(f"recipe: {error}") from None


def load(path: Path) -> Recipe:
    """The recipe of a distillation recorded in a JSON file."""
    return build(read_values(path))


def derive(recipe: R, **changes: Any) -> R:
    """A recipe like ``recipe`` with dotted fields changed: ``derive(r, **{"optim.lr": 1e-3})``."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        assign(values, key, value)
    return checked(type(recipe), values)


def apply_overrides(recipe: R, assignments: Iterable[str]) -> R:
    """``--set`` assignments ``section.field=value`` in order; values are JSON or Python literals, or text."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {assignment!r} is not of the form section.field=value")
        changes[key.strip()] = literal(text.strip())
    return derive(recipe, **changes)


def _explain(kind: type[RunRecipe], error: ValidationError) -> str:
    lines: dict[str, str] = {}
    for issue in error.errors():
        location = issue["loc"]
        given = "" if isinstance(issue["input"], dict) else f" = {issue['input']!r}"
        if "arguments" in location[:-2]:
            # One value, refused by every alternative of Scalar: pydantic reports each, the whole value first.
            where = ".".join(str(part) for part in location[: location.index("arguments") + 2])
            expected = "expected a number, text, true, false, null or a list of integers"
            lines.setdefault(where, f"recipe field {where}{given}: {expected}")
            continue
        where = ".".join(str(part) for part in location)
        if issue["type"] == "extra_forbidden":
            valid = _fields_at(kind, location[:-1])
            guess = near_misses(str(location[-1]), valid)
            lines[where] = f"unknown recipe field {where!r}{guess} (fields here: {', '.join(valid)})"
            continue
        message = issue["msg"].removeprefix("Value error, ")
        lines[where] = f"recipe{' field ' + where if where else ''}{given}: {message}"
    return "\n".join(lines.values())


def _fields_at(kind: type[RunRecipe], location: tuple[int | str, ...]) -> list[str]:
    model: Any = kind
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
