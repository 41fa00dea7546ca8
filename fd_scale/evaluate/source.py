"""Which network does the user mean? One word on the command line becomes a backbone.

    runs/fd_clip_vitb16-3fa91c07             the student of a run's newest checkpoint, or of --step
    runs/fd_clip_vitb16-3fa91c07#ema         the same with the moving average of its weights
    runs/fd_clip_vitb16-3fa91c07#teacher     the teacher that this run learns from
    step-00012000.safetensors                a file of ``fd-scale export``
    timm:vit_base_patch16_224.dino           any network of timm, with a tag of its hub
    timm:vit_base_patch16_224@dino.pth       the same with a file of weights, or with ``random`` ones
    open_clip:ViT-B-16-quickgelu@openai      the vision tower of any model of open_clip
    models:swinv2_g@swinv2_g.safetensors     an architecture of ``models``

Libraries load as they do for teachers: by their own mean, std and input size, with the same refusals.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from fd_scale.errors import RunError, UserError, near_misses
from fd_scale.evaluate.backbone import EMA, Backbone, of_export, of_run, of_teacher
from fd_scale.run import recipe as recipes
from fd_scale.run.folder import RunFolder
from fd_scale.teachers import load

LIBRARIES: tuple[str, ...] = get_args(recipes.Teacher.model_fields["library"].annotation)
TEACHER = "#teacher"
SUFFIX = ".safetensors"


class SourceError(UserError):
    """A word that names no network."""


def open_source(
    text: str, *, step: int | None = None, input_size: int | None = None, device: torch.device | str = "cpu"
) -> Backbone:
    """The backbone that ``text`` means, on its device, in float32.

    ``step`` chooses a run's checkpoint, ``input_size`` (pixels) is for networks of libraries. Raises
    ``SourceError`` for a word of none of the forms above, and the errors of runs and teachers.
    """
    asked = library_network(text, input_size=input_size)
    refuse_unused(text, asked is not None, step=step, input_size=input_size)
    if asked is not None:
        taught = load(asked.spec, device=device, dtype=torch.float32, seed=asked.seed)
        return replace(of_teacher(taught, device), name=label(text))
    if text.endswith(SUFFIX):
        return of_export(Path(text), device=device)
    path, average = run_and_average(text)
    return of_run(run_folder(path).path, step=step, average=average, device=device)


def run_and_average(text: str) -> tuple[Path, bool]:
    """The path of a run in a word, and whether the average of its weights is meant."""
    return Path(text.removesuffix(EMA)), text.endswith(EMA)


def run_folder(path: Path) -> RunFolder:
    """The run directory at ``path``; a ``SourceError`` says what else a network can be named by."""
    try:
        return RunFolder.at(path)
    except RunError as error:
        raise SourceError(
            f"{error}; a network is a run directory, the average of its weights (RUN{EMA}), its teacher "
            f"(RUN{TEACHER}), a file of `fd-scale export`, or LIBRARY:NAME@WEIGHTS with one of "
            f"{', '.join(LIBRARIES)}"
        ) from None


def reports_of(text: str) -> Path:
    """Where records about a network belong: the reports of the run that ``text`` names or lies in, or
    ``reports`` here."""
    path = Path(text.removesuffix(TEACHER).removesuffix(EMA))
    for folder in (path, *path.parents[:2]):
        if (folder / "recipe.json").is_file():
            return RunFolder.at(folder).reports
    return Path("reports")


def refuse_unused(text: str, of_library: bool, *, step: int | None, input_size: int | None) -> None:
    """Raise ``SourceError`` for a choice that this kind of network does not have."""
    if step is not None and (of_library or text.endswith(SUFFIX)):
        raise SourceError(f"--step {step} is for runs, and {text} is none")
    if input_size is not None and not of_library:
        raise SourceError(
            f"--input-size {input_size}: {text} is measured at the size that it was distilled at; "
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


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library, as teachers are loaded, and the seed of weights that are random."""

    spec: recipes.Teacher
    seed: int


def library_network(text: str, *, input_size: int | None = None) -> LibraryNetwork | None:
    """The network that ``LIBRARY:NAME@WEIGHTS`` or ``RUN#teacher`` means, or None for other words.

    Raises ``SourceError`` for an unknown library, for missing weights and for a run that is none.
    """
    if text.endswith(TEACHER):
        recipe = run_folder(Path(text.removesuffix(TEACHER))).read_recipe()
        spec = recipe.teacher
        return LibraryNetwork(
            spec if input_size is None else spec.model_copy(update={"input_size": input_size}), recipe.seed
        )
    library, separator, rest = text.partition(":")
    if not separator or Path(text).exists():
        return None
    if library not in LIBRARIES:
        raise SourceError(
            f"unknown library {library!r}{near_misses(library, LIBRARIES)} "
            f"(libraries: {', '.join(LIBRARIES)})"
        )
    name, separator, weights = rest.partition("@")
    if not separator and library == "timm":
        name, separator, weights = rest.partition(".")
    if not weights:
        raise SourceError(
            f"{library}:{rest} names no weights: append @ and a tag, a file, or random (trials only)"
        )
    spec = recipes.Teacher.model_validate(
        {"library": library, "architecture": name, "weights": weights, "input_size": input_size}
    )
    return LibraryNetwork(spec, 0)
