"""Which network does the user mean? The one grammar of the words that name a network.

    runs/fd_clip_vitb16-3fa91c07             the student of a run's newest checkpoint, or of --step
    runs/fd_clip_vitb16-3fa91c07#ema         the same with the moving average of its weights
    runs/fd_clip_vitb16-3fa91c07#teacher     the teacher that this run learns from
    runs/fd_base-0b7d1c2e                    a fine-tuned run: the network in its classifier; or with #ema
    step-00012000.safetensors                a file of ``fd-scale export``
    timm:vit_base_patch16_224.dino           any network of timm, with a tag of its hub
    timm:vit_base_patch16_224@dino.pth       the same with a file of weights, or with ``random`` ones
    timm:vit_base_patch16_224.dino@dino.pth  a file of weights that were trained with the tag's mean and std
    open_clip:ViT-B-16-quickgelu@openai      the vision tower of any model of open_clip
    models:swinv2_g@swinv2_g.safetensors     an architecture of ``models``

A word is read here and nothing is loaded; ``source.py`` opens what it means, ``start.py`` trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fd_scale.errors import RunError, UserError, near_misses
from fd_scale.run import recipe as recipes
from fd_scale.run import transfer
from fd_scale.run.folder import RunFolder
from fd_scale.run.transfer import TransferRecipe

LIBRARIES: tuple[str, ...] = get_args(recipes.Teacher.model_fields["library"].annotation)
TEACHER = "#teacher"
EMA = "#ema"
"""After the name of a run: the moving average of its weights."""
SUFFIX = ".safetensors"
FORMS = (
    f"a network is a run directory, the average of its weights (RUN{EMA}), its teacher (RUN{TEACHER}), a "
    f"file of `fd-scale export`, or LIBRARY:NAME@WEIGHTS with one of {', '.join(LIBRARIES)}"
)


class SourceError(UserError):
    """A word that names no network."""


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library, as teachers are loaded, and the seed of weights that are random."""

    spec: recipes.Teacher
    seed: int


@dataclass(frozen=True)
class ExportedFile:
    """A file of ``fd-scale export``."""

    path: Path


@dataclass(frozen=True)
class DistilledRun:
    """A run that distils or distilled: its student."""

    folder: RunFolder
    average: bool
    """Whether the moving average of its weights is meant."""


@dataclass(frozen=True)
class LabelledRun:
    """A run that learnt labels: a fine-tuning or a probe."""

    folder: RunFolder
    recipe: TransferRecipe
    average: bool


Named = LibraryNetwork | ExportedFile | DistilledRun | LabelledRun


def meaning(text: str, *, input_size: int | None = None) -> Named:
    """What ``text`` names; ``input_size`` (pixels) goes into a library's network.

    Raises ``SourceError`` for an unknown library, for missing weights and for what is no run.
    """
    if text.endswith(TEACHER):
        recipe = run_folder(text.removesuffix(TEACHER)).read_recipe()
        spec = recipe.teacher
        if input_size is not None:
            spec = spec.model_copy(update={"input_size": input_size})
        return LibraryNetwork(spec, recipe.seed)
    library, separator, rest = text.partition(":")
    if separator and not Path(text).exists():
        return LibraryNetwork(_library_spec(library, rest, input_size), seed=0)
    if text.endswith(SUFFIX):
        return ExportedFile(Path(text))
    folder, average = run_folder(text.removesuffix(EMA)), text.endswith(EMA)
    tuned = transfer.of_run(folder.path)
    return DistilledRun(folder, average) if tuned is None else LabelledRun(folder, tuned, average)


def run_folder(text: str) -> RunFolder:
    """The run directory of this name; a ``SourceError`` says what else a network can be named by."""
    try:
        return RunFolder.at(text)
    except RunError as error:
        raise SourceError(f"{error}; {FORMS}") from None


def refuse_unused(text: str, found: Named, *, step: int | None, input_size: int | None) -> None:
    """Raise ``SourceError`` for a choice that this kind of network does not have."""
    if step is not None and isinstance(found, LibraryNetwork | ExportedFile):
        raise SourceError(f"--step {step} is for runs, and {text} is none")
    if input_size is not None and not isinstance(found, LibraryNetwork):
        raise SourceError(
            f"--input-size {input_size}: {text} is measured at the size that it was trained at; "
            "fine-tuning alone changes that"
        )


def label(text: str, step: int | None = None) -> str:
    """What a network is called in records: the same by whatever task it is measured."""
    if ":" in text and not Path(text).exists():
        return text
    path = Path(text)
    if text.endswith(SUFFIX):
        return path.stem
    return path.resolve().name + ("" if step is None else f"@{step}")


def reports_of(text: str) -> Path:
    """Where records about a network belong: the reports of the run that ``text`` names or lies in, or
    ``reports`` here."""
    path = Path(text.removesuffix(TEACHER).removesuffix(EMA))
    for folder in (path, *path.parents[:2]):
        if (folder / "recipe.json").is_file():
            return RunFolder.at(folder).reports
    return Path("reports")


def _library_spec(library: str, rest: str, input_size: int | None) -> recipes.Teacher:
    """``NAME@WEIGHTS`` of a library; with timm also ``NAME.TAG`` and ``NAME.TAG@WEIGHTS``."""
    if library not in LIBRARIES:
        raise SourceError(
            f"unknown library {library!r}{near_misses(library, LIBRARIES)} "
            f"(libraries: {', '.join(LIBRARIES)})"
        )
    name, _, weights = rest.partition("@")
    arguments: dict[str, Any] = {}
    if library == "timm":
        name, _, tag = name.partition(".")
        if weights and tag:
            arguments["pretrained_cfg"] = tag
        weights = weights or tag
    if not weights:
        raise SourceError(
            f"{library}:{rest} names no weights: append @ and a tag, a file, or random (trials only)"
        )
    return recipes.Teacher.model_validate(
        {
            "library": library,
            "architecture": name,
            "weights": weights,
            "input_size": input_size,
            "arguments": arguments,
        }
    )
