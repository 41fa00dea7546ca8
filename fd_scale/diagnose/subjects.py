"""Which network is diagnosed, where does it come from, and what is it set against?

A network is named as in ``evaluate.naming``; beside a run that distils, ``teacher`` is the run's own. All
come to a ``Subject``: the backbone that evaluation sees, and the module inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fd_scale.distill import load_teachers
from fd_scale.engine.checkpoint import Checkpoint, Pieces, kind_of_weights
from fd_scale.errors import RunError, UserError
from fd_scale.evaluate import tuned
from fd_scale.evaluate.backbone import Backbone, of_student, of_teacher
from fd_scale.evaluate.naming import DistilledRun, LabelledRun, LibraryNetwork, Named, meaning
from fd_scale.evaluate.source import open_source
from fd_scale.export import choose
from fd_scale.objective.losses import Objective
from fd_scale.pixels import normalise
from fd_scale.run import recipe as recipes
from fd_scale.run.folder import RunFolder
from fd_scale.student import Student, begin, build_student
from fd_scale.teachers import Guest, Teacher, difference, targets
from fd_scale.teachers.timm import load_classifier

TEACHER, NONE = "teacher", "none"


class DiagnoseError(UserError):
    """A diagnosis that cannot be made: a network that is not one, too few images, unequal stages."""


@dataclass(frozen=True, eq=False)
class Distillation:
    """A run's own loss: its student with projectors, its teachers' tokens, and their distance."""

    student: Student
    guests: Sequence[Guest]
    objective: Objective

    @property
    def sizes(self) -> set[int]:
        """Input sizes that it needs an image at."""
        return {self.student.input_size, *(guest.teacher.input_size for guest in self.guests)}

    def __call__(self, pixels: Mapping[int, Tensor]) -> Tensor:
        """The sum over images of the loss of uint8 pixels (B, 3, S, S) by size S, float64, as a scalar."""
        return self.loss(self.student(pixels[self.student.input_size]), self.taught(pixels))

    def taught(self, pixels: Mapping[int, Tensor]) -> list[Tensor]:
        """The tokens (B, M, D) of each teacher, and the embedding of a run that keeps it."""
        return targets(self.guests, pixels)

    def loss(self, predicted: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
        """The sum over images of the loss of tokens (B, M, D) per teacher, float64, as a scalar."""
        count = len(taught[0])
        valid_B = torch.ones(count, dtype=torch.bool, device=taught[0].device)
        return self.objective(predicted, taught, valid_B).double() * count


class Classifier(nn.Module):
    """A fine-tuned network as it classifies: uint8 pixels (B, 3, S, S) to logits (B, K)."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, pixels: Tensor) -> Tensor:
        """The logits of pixels on the network's device."""
        logits: Tensor = self.network(normalise(pixels, self.mean, self.std, torch.float32))
        return logits


@dataclass(frozen=True, eq=False)
class Subject:
    """A network that is diagnosed."""

    name: str
    """In figures: ``student, step 256``."""
    origin: str
    """Where it comes from, for the page."""
    backbone: Backbone
    network: nn.Module
    """What runs in ``backbone``; in eval mode."""
    distillation: Distillation | None = None
    """Of a run's student, where its teacher was loaded."""
    classifier: Callable[[], Classifier] | None = None
    """Loads the network whole, where its weights may bring a classifier of their own."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides everything that is measured of it, as JSON."""
        return dict(self.backbone.fingerprint)


@dataclass(frozen=True, eq=False)
class Run:
    """A run that a subject belongs to, for what only runs have: data, metrics, checkpoints, a teacher."""

    folder: RunFolder
    recipe: recipes.Recipe
    checkpoint: Checkpoint
    teachers: Sequence[Teacher]
    """Empty where they were not wanted."""
    average: bool = False
    """Whether the moving average of the weights is diagnosed, of all its checkpoints."""


@dataclass(frozen=True, eq=False)
class Pair:
    """What is diagnosed, what it is set against, and the run that it comes from."""

    subject: Subject
    against: Subject | None
    run: Run | None

    @property
    def both(self) -> list[Subject]:
        """Before and after, in this order."""
        return [self.subject] if self.against is None else [self.against, self.subject]


def load_pair(
    target: str,
    against: str | None,
    *,
    step: int | None = None,
    device: torch.device | str = "cpu",
) -> Pair:
    """The networks named by ``target`` and ``against``, on ``device`` in float32.

    ``against`` is ``none``, ``teacher`` (of a run; its default), or names a network as ``target`` does.
    ``step`` chooses the checkpoint of ``target`` when that is a run. Raises ``SourceError`` for a name that
    is no network, and the errors of recipes, teachers and checkpoints.
    """
    device = torch.device(device)
    named, run = meaning(target), None
    if isinstance(named, DistilledRun):
        run = _open_run(named, step, device, with_teacher=against != NONE)
        subject = student_of(run, run.checkpoint, device)
    else:
        subject = _subject(target, named, device, step=step)
    if against == NONE or (against is None and run is None):
        return Pair(subject, None, run)
    if against in (None, TEACHER):
        if run is None:
            raise DiagnoseError(
                f"--against teacher is the teacher of a distillation, and {target} is none: name a network"
            )
        return Pair(subject, _of_teacher(run.teachers[0], device), run)
    other = _subject(str(against), meaning(str(against)), device)
    if other.name == subject.name:
        other = replace(other, name=f"{other.name} (before)")
    return Pair(subject, other, run)


def student_of(run: Run, checkpoint: Checkpoint | None, device: torch.device) -> Subject:
    """The student of a run at a checkpoint, or with the weights that it began with (``None``)."""
    recipe = run.recipe
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        # Without its teacher there is nothing to project to, and the backbone stands alone.
        student = build_student(recipe, run.teachers)
    if checkpoint is None:
        begin(student, recipe.student)
    if checkpoint is not None:
        tensors = student_weights(checkpoint, average=run.average)
        wanted = student.state_dict()
        student.load_state_dict({name: tensors[name] for name in wanted if name in tensors}, strict=True)
    student = student.eval().requires_grad_(False).to(device=device)
    step = 0 if checkpoint is None else checkpoint.step
    averaged = " (EMA)" if run.average and checkpoint is not None else ""
    distillation = None
    if run.teachers:
        guests = [Guest(teacher, recipe.objective) for teacher in run.teachers]
        distillation = Distillation(student, guests, Objective(recipe.objective))
    return Subject(
        name=f"student{averaged}, step {step:,}",
        origin=f"{recipe.student.architecture}, {run.folder.path.name}, step {step:,} of {recipe.steps:,}"
        f"{averaged}",
        backbone=of_student(student, name=recipe.student.architecture),
        network=student.backbone,
        distillation=distillation,
    )


def student_weights(checkpoint: Checkpoint, *, average: bool = False) -> dict[str, Tensor]:
    """Parameters (float32; with ``average`` their moving average) and buffers of backbone and projectors, by
    the student's own names."""
    pieces, kind = Pieces(checkpoint), kind_of_weights(checkpoint, average=average)
    return {name: pieces.whole(kind, name) for name in checkpoint.manifest["parameters"]} | pieces.buffers()


def _open_run(named: DistilledRun, step: int | None, device: torch.device, *, with_teacher: bool) -> Run:
    folder = named.folder
    recipe = folder.read_recipe()
    checkpoint = choose(folder, step)
    teachers = load_teachers(recipe, device, torch.float32) if with_teacher else []
    differing = difference(checkpoint.facts["teacher"], teachers[0].fingerprint) if teachers else []
    if differing:
        raise RunError(f"{checkpoint.path} was made with another teacher: {'; '.join(differing)}")
    return Run(folder, recipe, checkpoint, teachers, named.average)


def _of_teacher(teacher: Teacher, device: torch.device) -> Subject:
    origin = f"{teacher.name}, weights {teacher.fingerprint['weights']}"
    return Subject("teacher", origin, of_teacher(teacher, device), teacher.network)


def _subject(text: str, named: Named, device: torch.device, *, step: int | None = None) -> Subject:
    """A network without its run."""
    if isinstance(named, DistilledRun):
        run = _open_run(named, step, device, with_teacher=False)
        return student_of(run, run.checkpoint, device)
    backbone = open_source(text, step=step, device=device)
    subject = Subject(backbone.name, text, backbone, backbone.network)
    if isinstance(named, LabelledRun):

        def whole() -> Classifier:
            found = tuned.load(named, step=step)
            return Classifier(found.classifier.to(device), found.start.mean, found.start.std)

        origin = f"{text}, {named.recipe.name} of {named.recipe.start.network}"
        return replace(subject, name=f"fine-tuned {subject.name}", origin=origin, classifier=whole)
    if isinstance(named, LibraryNetwork):
        return _of_library(subject, named.spec, device)
    return subject


def _of_library(subject: Subject, spec: recipes.Teacher, device: torch.device) -> Subject:
    """With the classifier that timm's weights may bring."""
    subject = replace(subject, name=subject.name.partition(":")[2].partition("@")[0] or subject.name)
    if spec.library != "timm":
        return subject
    statistics = subject.backbone.fingerprint

    def whole() -> Classifier:
        return Classifier(load_classifier(spec, device=device), statistics["mean"], statistics["std"])

    return replace(subject, classifier=whole)
