"""What is asked of a study: data, networks, lengths, learning rates and seeds, read from TOML and checked.

``bench.toml`` holds what all studies share, one table per budget; the ``settings.toml`` of a study holds
its question, its variants, and what it changes of the bench. Equal settings give equal pieces, which studies
share (``pieces``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from fd_scale.errors import RecipeError, near_misses
from fd_scale.run import recipe as recipes
from fd_scale.run.sections import Section

HERE = Path(__file__).parent
BENCH = HERE / "bench.toml"
ARCHITECTURE = "vit_micro_patch8"
"""Of the catalogue; every size of it is given by ``Network``."""
Position = Literal["shared_rpb", "rpb", "ape"]


class Sizes(Section):
    """How many images each part of the data has; no two parts share one."""

    taught: PositiveInt
    """Whose labels or captions the teacher sees; also distilled on, without them."""
    unlabelled: PositiveInt
    """Distilled on as well; nobody sees their labels."""
    labelled: PositiveInt
    """To fine-tune on, and the neighbours of kNN and the examples of the linear probe."""
    held_out: PositiveInt
    """To choose learning rates by."""
    test: PositiveInt
    """Of the test set, to measure on, once."""


class Network(Section):
    """The one size of teacher and student."""

    input_size: PositiveInt
    """Side of the input, pixels."""
    patch_size: PositiveInt
    embed_dim: PositiveInt
    depth: PositiveInt
    num_heads: PositiveInt

    @property
    def identity(self) -> str:
        """For names of files."""
        return "-".join(str(value) for value in self.model_dump().values())

    def spec(
        self, position: Position, layer_scale: float | None = 0.1, drop_path: float = 0.0
    ) -> recipes.Student:
        """The network with these choices of a student."""
        return recipes.Student(
            architecture=ARCHITECTURE,
            input_size=self.input_size,
            position=position,
            layer_scale=layer_scale,
            drop_path=drop_path,
            arguments=self.model_dump(exclude={"input_size"}),
        )


class Length(Section):
    """How long, and how fast, something learns."""

    images: PositiveInt
    """Images to see, with repetition."""
    batch: PositiveInt
    lr: PositiveFloat
    """Peak; the first tenth is warm-up, then a cosine to a hundredth."""
    crop: float = Field(gt=0, le=1)
    """Smallest share of the image's area that a crop covers."""
    weight_decay: float = Field(default=0.05, ge=0)
    clip_norm: PositiveFloat = 3.0


class FineTuning(Section):
    """How labels are learnt, alike for all networks."""

    labels: tuple[PositiveInt, ...]
    """Numbers of labelled images, one measurement each."""
    images: PositiveInt
    """Images to see, with repetition, whatever the number of labels."""
    batch: PositiveInt
    lrs: tuple[PositiveFloat, ...]
    """Peaks to choose from, for each network by itself, on the held-out images."""
    crop: float = Field(gt=0, le=1)
    layer_decay: float = Field(gt=0, le=1)
    drop_path: float = Field(ge=0, lt=1)
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0)


class Seeds(Section):
    """What is repeated."""

    distill: tuple[int, ...]
    finetune: tuple[int, ...]


class Bench(Section):
    """All that is common to the settings of one study under one budget."""

    data: Sizes
    network: Network
    teaching: Length
    distilling: Length
    finetuning: FineTuning
    seeds: Seeds
    frozen: bool = True
    """Whether kNN and the linear probe are measured as well."""
    teacher: str = "contrastive"
    """The lesson of the teacher where a study has one (``lessons.LESSONS``)."""
    for_images_per_s: PositiveFloat | None = None
    """The rate (``rate.images_per_second``) that the lengths are for: on another machine they are scaled by
    its own. Null for lengths that are the same everywhere."""


class Study(Section):
    """The settings of one study."""

    question: str
    paper: str
    """What the papers found, as one cell of a table."""
    variants: dict[str, dict[str, Any]] = Field(default={})
    """By name, fields of the distillation's recipe that differ from the base."""
    contrasts: tuple[tuple[str, str], ...] = ()
    """Pairs of rows: is the first better than the second, as in the papers?"""
    choices: dict[str, Any] = Field(default={})
    """Further values, which the study's own script reads."""


def load(name: str, budget: str) -> tuple[Study, Bench]:
    """The settings of a study under a budget. Raises ``RecipeError`` for anything unknown or of a wrong
    type."""
    path = HERE / name / "settings.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    shared = tomllib.loads(BENCH.read_text(encoding="utf-8"))
    changes = values.pop("budgets", {}).get(budget, {})
    if budget not in shared:
        raise RecipeError(f"--budget {budget!r}{near_misses(budget, shared)} (budgets: {', '.join(shared)})")
    bench = merged(shared[budget], {key: value for key, value in changes.items() if key != "study"})
    study = merged(values, changes.get("study", {}))
    return _checked(Study, study, path), _checked(Bench, bench, BENCH)


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested ``values`` with ``changes`` laid over them."""
    result = dict(values)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _checked(kind: type[Any], values: Mapping[str, Any], path: Path) -> Any:
    try:
        return kind.model_validate(_as_tuples(values))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (found {e['input']!r})" for e in error.errors()]
        raise RecipeError(f"{path}:\n  " + "\n  ".join(lines)) from None


def _as_tuples(value: Any) -> Any:
    """TOML has lists where the settings have tuples."""
    if isinstance(value, Mapping):
        return {key: _as_tuples(part) for key, part in value.items()}
    return tuple(_as_tuples(part) for part in value) if isinstance(value, list) else value
