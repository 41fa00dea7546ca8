"""What is asked of a run: the science, and a few habits that are not science.

A recipe is a frozen value. It is written in Python (``recipes.py``), recorded as JSON, and changed for a
trial with ``--set section.field=value``. Everything is checked here, before anything is loaded. How the run
fits a machine is the business of ``scale.py``; names and paths of a run directory that of ``folder.py``.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from fd_scale.errors import RecipeError, near_misses

IMAGENET_1K_IMAGES = 1_281_167
"""Training images of ImageNet-1K: the papers' epoch."""

MAX_STREAMS = 1024
"""Most streams that the order of the data is cut into, hence most processes that can share a run."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Scalar = bool | int | float | str | tuple[int, ...] | None


class Section(BaseModel):
    """A frozen, strict part of a recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Student(Section):
    """The network that is trained, from random weights."""

    architecture: str
    """A name of ``models`` (``vit_base_patch16``), or ``timm:NAME`` for any timm backbone."""
    input_size: PositiveInt = 224
    """Side of the square input, pixels."""
    position: Literal["shared_rpb", "rpb", "ape"] | None = "shared_rpb"
    """Position encoding of a ViT of ``models`` (``vit_*``); ``null`` for other families."""
    layer_scale: PositiveFloat | None = 0.1
    """Initial LayerScale of a ViT of ``models`` (released code, ``VIT.INIT_VALUES``); ``null`` for none
    and for other families."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block, linear over depth; the student only."""
    arguments: dict[str, Scalar] = {}
    """Further arguments of the architecture, by its own names."""


class Teacher(Section):
    """The frozen network whose feature map is regressed."""

    library: Literal["timm", "open_clip", "models"]
    """Where the architecture lives; ``models`` is this project's own package."""
    architecture: str
    """Its name there, without a weights tag."""
    weights: str
    """A tag of the library's hub, a local file (.safetensors, .pth, .pt), or ``random`` (trials only)."""
    input_size: PositiveInt | None = None
    """Side of its square input, pixels; ``null`` takes the size it was trained at."""
    arguments: dict[str, Scalar] = {}
    """Further arguments of the architecture, by the library's own names."""


class View(Section):
    """The one geometric view that all networks see."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Antialiased resampling of the crop."""
    exif: Literal["ignore", "apply"] = "ignore"
    """The EXIF orientation; teachers were trained without it."""

    @model_validator(mode="after")
    def _ranges(self) -> View:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={low, high} must rise")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale={self.crop_scale} must end at 1 or below")
        return self


class Objective(Section):
    """What is regressed on what (FD paper, section 3)."""

    target: Literal["whiten", "l2", "none"] = "whiten"
    """Normalisation of each teacher token."""
    granularity: Literal["full", "cls", "gap"] = "full"
    """The whole map, the class token alone, or the mean of the patches."""
    beta: float = Field(default=2.0, ge=0)
    """Knee of the smooth-L1 loss."""
    cls: Literal["match", "drop", "mean"] = "match"
    """The teacher's class token: regressed by the student's, left out, or by the student's mean patch."""
    cls_weight: PositiveFloat = 10.0
    """Weight of the class token in the full map (ICCV text; the released code has 1)."""
    normaliser: Literal["mean", "weighted_mean"] = "mean"
    """Divide the weighted sum by the number of elements, or by the sum of their weights."""
    grid: Literal["exact", "bilinear", "bicubic"] = "exact"
    """How the student's grid reaches the teacher's: it must be equal, or it is resampled."""

    @model_validator(mode="after")
    def _pairs(self) -> Objective:
        if self.granularity == "cls" and self.cls == "drop":
            raise ValueError(
                "granularity='cls' regresses the class token, so cls='drop' leaves nothing to regress"
            )
        return self


class Optim(Section):
    """AdamW and the clip."""

    lr: PositiveFloat = 1.2e-3
    """Peak learning rate at this recipe's global batch; not rescaled when the batch changes."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.05, ge=0)
    decay_position: bool = True
    """Whether relative position tables are decayed (the released code does; FT-CLIP does not)."""
    clip_norm: PositiveFloat | None = 3.0
    """Largest global L2 norm of the gradient; ``null`` for no clip."""


class Schedule(Section):
    """Linear warm-up, then cosine, counted in images."""

    images: PositiveInt = 300 * IMAGENET_1K_IMAGES
    """Images to see, all told."""
    warmup_images: int = Field(default=10 * IMAGENET_1K_IMAGES, ge=0)
    """Images of the linear warm-up, part of ``images``."""
    warmup_lr: float = Field(default=2e-6, ge=0)
    """Learning rate of the first step."""
    min_lr: float = Field(default=2e-5, ge=0)
    """Learning rate at the end of the cosine."""

    @model_validator(mode="after")
    def _order(self) -> Schedule:
        if self.warmup_images >= self.images:
            raise ValueError(f"warmup_images={self.warmup_images:,} must be below images={self.images:,}")
        return self


class Data(Section):
    """Where the images are, and how much damage is borne."""

    shards: str | None = None
    """A folder of tar shards with its index (made by ``fd-scale shards``)."""
    max_bad_fraction: float = Field(default=1e-3, ge=0, le=1)
    """Share of samples that may be unreadable before the run stops."""


class Habits(Section):
    """What a run does beside the science: saving, logging, reading. Not part of the fingerprint."""

    root: str = "runs"
    """Folder that holds the run directories."""
    workers: int = Field(default=2, ge=0)
    """Decoding processes per rank; 0 decodes in the training process."""
    log_every_steps: PositiveInt = 20
    save_every_steps: PositiveInt = 1000
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""
    async_save: bool = True
    """Save in the background: training waits for a copy in host memory (12 bytes per parameter, shared by
    the ranks) instead of for the disk. ``false`` where the hosts have no room for that copy."""
    watchdog_s: PositiveFloat | None = 900.0
    """A rank that has not finished a micro-batch for so long hangs: stacks of all ranks are written, and the
    start ends. More than the longest first step and the longest save; ``null`` for no watch."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite before the run stops."""
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "fd_scale"


class Recipe(Section):
    """One run, whole."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    notes: str = ""
    """Where the numbers come from, and what was decided where sources disagree."""
    student: Student
    teacher: Teacher
    view: View = View()
    objective: Objective = Objective()
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
    def _pairs(self) -> Recipe:
        self._family()
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

    def _family(self) -> None:
        """Position and LayerScale belong to the ViTs of ``models`` and to no other family."""
        student = self.student
        if student.architecture.startswith("vit_"):
            if student.position is None:
                raise ValueError(
                    f"student.position=null leaves {student.architecture!r} without positions: "
                    "choose shared_rpb, rpb or ape"
                )
            return
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

    @property
    def steps(self) -> int:
        """Optimizer steps: the images to see, in whole global batches, rounded up."""
        return -(-self.schedule.images // self.global_batch)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.schedule.warmup_images / self.global_batch)

    def science(self) -> dict[str, Any]:
        """What the fingerprint covers, as plain JSON values."""
        return self.model_dump(
            mode="json", exclude={"notes": True, "scale": True, "run": True, "data": {"shards"}}
        )

    @property
    def fingerprint(self) -> str:
        """Eight hex digits of the science: the same on any machine, at any log interval."""
        canonical = json.dumps(self.science(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:8]

    @property
    def run_name(self) -> str:
        """Name of the run directory."""
        return f"{self.name}-{self.fingerprint}"

    def to_json(self) -> str:
        """The record form, indented, one trailing newline."""
        return self.model_dump_json(indent=2) + "\n"


def streams_of(global_batch: int) -> int:
    """The largest divisor of the global batch up to ``MAX_STREAMS``: so many streams has the data's order."""
    return next(size for size in range(min(global_batch, MAX_STREAMS), 0, -1) if global_batch % size == 0)


def build(values: Mapping[str, Any]) -> Recipe:
    """A checked recipe from nested plain values; a ``RecipeError`` names field, value and remedy."""
    try:
        # JSON mode: lists become tuples, while every other type stays strict.
        return Recipe.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise RecipeError(_explain(error)) from None
    except TypeError as error:
        raise RecipeError(f"recipe: {error}") from None


def load(path: Path) -> Recipe:
    """The recipe recorded in a JSON file."""
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
    return build(values)


def derive(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe like ``recipe`` with dotted fields changed: ``derive(r, **{"optim.lr": 1e-3})``."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        _assign(values, key, value)
    return build(values)


def apply_overrides(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """``--set`` assignments ``section.field=value`` in order; values are JSON or Python literals, or text."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise RecipeError(f"--set {assignment!r} is not of the form section.field=value")
        changes[key.strip()] = _literal(text.strip())
    return derive(recipe, **changes)


def _literal(text: str) -> Any:
    if text in ("null", "true", "false"):
        return json.loads(text)
    try:
        value = ast.literal_eval(text)
        json.dumps(value)
    except (ValueError, SyntaxError, TypeError):
        return text
    return value


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key that exists; ``arguments`` dictionaries alone take new names."""
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


def _explain(error: ValidationError) -> str:
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
            valid = _fields_at(location[:-1])
            guess = near_misses(str(location[-1]), valid)
            lines[where] = f"unknown recipe field {where!r}{guess} (fields here: {', '.join(valid)})"
            continue
        message = issue["msg"].removeprefix("Value error, ")
        lines[where] = f"recipe{' field ' + where if where else ''}{given}: {message}"
    return "\n".join(lines.values())


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        model = model.model_fields[part].annotation
    return list(model.model_fields)
