"""How does an image network meet words? In CLIP's joint embedding, by CLIP itself and by its students.

The text side is open_clip's. CLIP itself is asked as it is. A student distilled from CLIP gives, through its
projector, CLIP's class token as the recipe normalised it: a whitened target has lost each token's mean and
scale, and cosines forgive the scale only. So there are two modes, and both are reported: ``direct`` projects
what the student gives, ``destandardised`` first maps each channel affinely to CLIP's own, fitted by least
squares on training images. A student that learnt the embedding itself (``objective.embedding_weight``) is
asked by that head too: ``projected``. What is asked is the business of ``zeroshot.py`` and ``retrieval.py``.

Shape letters: B images, D channels, E the joint embedding.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from rich.console import Console
from torch import Tensor, nn

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.engine.checkpoint import Pieces, kind_of_weights
from fd_scale.evaluate.backbone import PROJECTED, of_export
from fd_scale.evaluate.features import EvaluationError
from fd_scale.evaluate.naming import (
    EMA,
    DistilledRun,
    ExportedFile,
    SourceError,
    label,
    meaning,
    refuse_unused,
    reports_of,
)
from fd_scale.evaluate.record import Record, table, write_all
from fd_scale.export import choose, embedding_file
from fd_scale.objective.targets import has_class_token
from fd_scale.pixels import normalise
from fd_scale.run.folder import RunFolder
from fd_scale.run.world import World
from fd_scale.student import Student, build_student
from fd_scale.teachers import Teacher, load
from fd_scale.teachers.fingerprint import fingerprint

log = logging.getLogger("fd_scale")

FIT_IMAGES = 4096
"""Training images of the affine map of ``destandardised``."""

Embed = Callable[[Tensor], Tensor]
"""uint8 pixels (B, 3, S, S) to embeddings (B, E)."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A whole CLIP: vision tower, text tower and tokenizer, in eval mode."""

    model: nn.Module
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    @property
    def input_size(self) -> int:
        """Side of the vision tower's input, pixels."""
        size: Any = self.model.visual.image_size  # type: ignore[union-attr]
        return int(size[0] if isinstance(size, tuple) else size)

    @property
    def projection_DE(self) -> Tensor:
        """From the class token after its norm to the joint embedding. Raises ``EvaluationError`` for a
        tower that has no such matrix."""
        found = getattr(self.model.visual, "proj", None)
        if not isinstance(found, Tensor):
            raise EvaluationError(
                f"the vision tower of {self.name} has no projection matrix of its class token, which "
                "zero-shot of a student needs: choose the CLIP that the student was distilled from (--clip)"
            )
        return found

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """CLIP's own image embeddings."""
        values = normalise(pixels, self.mean, self.std, torch.float32)
        return self.model.encode_image(values)  # type: ignore[operator]

    @property
    def width(self) -> int:
        """Channels of the joint embedding."""
        return int(self.embed_texts(["a word"]).shape[1])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, E) of texts."""
        device = next(self.model.parameters()).device
        return self.model.encode_text(self.tokenizer(list(texts)).to(device))  # type: ignore[operator]


def load_clip(text: str, device: torch.device) -> Clip:
    """``NAME@WEIGHTS`` of open_clip, weights a tag, a file or ``random``.

    Raises ``SourceError`` for a name or weights that cannot be loaded.
    """
    name, separator, weights = text.removeprefix("open_clip:").partition("@")
    if not separator:
        raise SourceError(f"--clip {text!r} names no weights: give NAME@TAG, NAME@FILE or NAME@random")
    if name not in open_clip.list_models():
        raise SourceError(f"unknown open_clip model {name!r} (--clip)")
    torch.manual_seed(0)
    logging.disable(logging.INFO)  # open_clip tells each of its thoughts to the root logger
    try:
        model = open_clip.create_model(name, pretrained=None if weights == "random" else weights)
        settings = open_clip.get_model_preprocess_cfg(model)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError) as error:
        raise SourceError(f"open_clip cannot load {weights!r} of {name}: {error} (--clip)") from error
    finally:
        logging.disable(logging.NOTSET)
    return Clip(model.eval().to(device), tokenizer, tuple(settings["mean"]), tuple(settings["std"]), text)


@dataclass(frozen=True, eq=False)
class ClipStudent:
    """A student with the projector to CLIP's class token."""

    student: Student
    teacher: Teacher
    name: str
    record: dict[str, Any]

    @torch.no_grad()
    def tokens(self, pixels: Tensor) -> Tensor:
        """CLIP's class token (B, D) as the recipe normalised it."""
        return self.student(pixels)[0][:, 0]

    @torch.no_grad()
    def embeddings(self, pixels: Tensor) -> Tensor:
        """CLIP's embedding (B, E) by the student's own head."""
        return self.student(pixels)[-1][:, 0]


def clip_student(
    folder: RunFolder, *, step: int | None, device: torch.device, average: bool = False
) -> ClipStudent:
    """The student of a run with its first projector; with ``average`` the moving average of its weights.

    Raises ``EvaluationError`` for a recipe that regressed neither class token nor embedding, and the errors
    of runs.
    """
    recipe = folder.read_recipe()
    objective = recipe.objective
    has_class = has_class_token(granularity=objective.granularity, cls=objective.cls)
    if not has_class and not objective.embedding_weight:
        raise EvaluationError(
            f"{folder.path} did not regress its teacher's class token (objective.granularity="
            f"{objective.granularity!r}, objective.cls={objective.cls!r}): nothing to ask in words"
        )
    teacher = load(recipe.teacher, device=device, dtype=torch.float32, seed=recipe.seed)
    student = build_student(recipe, [teacher])
    checkpoint = choose(folder, step)
    pieces, kind = Pieces(checkpoint), kind_of_weights(checkpoint, average=average)
    state = {name: pieces.whole(kind, name) for name in checkpoint.manifest["parameters"]}
    student.load_state_dict(state | pieces.buffers())
    record = fingerprint(state, run=folder.path.resolve().name, input_size=student.input_size)
    name = label(f"{folder.path}{EMA * average}", checkpoint.step)
    return ClipStudent(student.eval().to(device), teacher, name, record)


@dataclass(frozen=True, eq=False)
class Affine:
    """A map of every channel by itself."""

    scale_D: Tensor
    shift_D: Tensor

    def __call__(self, tokens_BD: Tensor) -> Tensor:
        """(B, D)."""
        return tokens_BD * self.scale_D + self.shift_D


def fit_affine(given_ND: Tensor, wanted_ND: Tensor) -> Affine:
    """Least squares per channel, in float64; a constant channel is mapped to the mean that is wanted."""
    given, wanted = given_ND.double(), wanted_ND.double()
    spread = given.var(dim=0, correction=0)
    covariance = ((given - given.mean(0)) * (wanted - wanted.mean(0))).mean(0)
    scale = torch.where(spread > 0, covariance / spread.clamp_min(1e-300), 0.0)
    shift = wanted.mean(0) - scale * given.mean(0)
    return Affine(scale.to(given_ND.dtype), shift.to(given_ND.dtype))


def embeddings(student: ClipStudent, clip: Clip, train: ShardSet | None, world: World) -> dict[str, Embed]:
    """How a student's images are embedded, by mode; ``projected`` first, as it is what a recipe with such a
    head is for. Collective.

    Raises ``EvaluationError`` for a CLIP of another width than the student's teacher.
    """
    modes: dict[str, Embed] = {}
    if (head := student.student.embedder) is not None:
        check_embedding(student.name, head.out_features, clip)
        modes["projected"] = student.embeddings
    objective = student.student.objective
    if not has_class_token(granularity=objective.granularity, cls=objective.cls):
        return modes
    projection_DE = clip.projection_DE
    width = student.student.projectors[0].linear.out_features  # type: ignore[union-attr]
    if projection_DE.shape[0] != width:
        raise EvaluationError(
            f"{student.name} gives class tokens of {width} channels, and {clip.name} projects "
            f"{projection_DE.shape[0]}: give the CLIP that was its teacher (--clip)"
        )
    modes["direct"] = lambda pixels: student.tokens(pixels) @ projection_DE
    if train is not None:
        affine = _fitted(student, train, world)
        modes["destandardised"] = lambda pixels: affine(student.tokens(pixels)) @ projection_DE
    return modes


def check_embedding(name: str, width: int, clip: Clip) -> None:
    """Raise ``EvaluationError`` where images are embedded in another width than texts."""
    if width != clip.width:
        raise EvaluationError(
            f"{name} embeds images in {width} channels, and {clip.name} texts in {clip.width}: give the CLIP "
            "that was its teacher (--clip)"
        )


def _fitted(student: ClipStudent, train: ShardSet, world: World) -> Affine:
    """Between the student's class tokens and its teacher's, on the first images of the set."""
    batch, device = 64, world.device
    given, wanted = [], []
    sizes = {student.student.input_size, student.teacher.input_size}
    streams = [evaluation_batches(train, size=size, crop_pct=1.0, batch=batch) for size in sorted(sizes)]
    for parts in itertools.islice(zip(*streams, strict=True), -(-FIT_IMAGES // batch)):
        pixels = {size: part.pixels[size].to(device) for size, part in zip(sorted(sizes), parts, strict=True)}
        valid = parts[0].valid
        given.append(student.tokens(pixels[student.student.input_size]).cpu()[valid])
        taught = student.teacher.features(pixels[student.teacher.input_size]).tokens_BND[:, 0]
        wanted.append(taught.float().cpu()[valid])
    affine = fit_affine(torch.cat(given), torch.cat(wanted))
    return Affine(affine.scale_D.to(device), affine.shift_D.to(device))


def clip_for(text: str, clip: str | None) -> str:
    """The CLIP that a network is asked through."""
    if text.startswith("open_clip:"):
        return text
    if clip is None:
        raise SourceError(
            f"{text} has no text tower: name its teacher's, as --clip ViT-B-16-quickgelu@openai"
        )
    return clip


@dataclass(frozen=True, eq=False)
class Asked:
    """A network that can be asked in words."""

    name: str
    record: dict[str, Any]
    """Its fingerprint."""
    input_size: int
    """Side of the square input, pixels."""
    modes: dict[str, Embed]
    """How its images are embedded, by mode."""


def asked(text: str, tower: Clip, fit: ShardSet | None, step: int | None, world: World) -> Asked:
    """The network that ``text`` names, through the words of ``tower``. Collective.

    Raises ``SourceError`` for a network that is neither a CLIP nor a distillation nor an export with a head
    to CLIP's embedding.
    """
    if text.startswith("open_clip:"):
        visual = tower.model.visual.state_dict()  # type: ignore[union-attr]
        return Asked(text, fingerprint(visual, clip=text), tower.input_size, {"clip": tower.embed})
    named = meaning(text)
    refuse_unused(text, named, step=step, input_size=None)
    if isinstance(named, ExportedFile):
        return world.together(lambda: _asked_export(text, named.path, tower, world.device))
    if not isinstance(named, DistilledRun):
        raise SourceError(
            f"{text} has no text tower: words are for open_clip:NAME@WEIGHTS and for distillations"
        )
    opened = partial(clip_student, named.folder, step=step, average=named.average, device=world.device)
    student = world.together(opened)
    modes = embeddings(student, tower, fit, world)
    return Asked(student.name, student.record, student.student.input_size, modes)


def _asked_export(text: str, weights: Path, tower: Clip, device: torch.device) -> Asked:
    """An exported student, by the head that lies beside it."""
    backbone = of_export(weights, device=device)
    if backbone.project is None:
        raise SourceError(
            f"{text} has no {embedding_file(weights).name} beside it, the head to CLIP's embedding that "
            "objective.embedding_weight gives: name its run instead"
        )
    grey = torch.zeros(1, 3, backbone.input_size, backbone.input_size, dtype=torch.uint8)
    check_embedding(backbone.name, backbone.pooled(grey)[PROJECTED].shape[1], tower)
    return Asked(
        backbone.name,
        backbone.fingerprint,
        backbone.input_size,
        {"projected": lambda pixels: backbone.pooled(pixels)[PROJECTED]},
    )


@dataclass(frozen=True)
class Question:
    """What the tasks of networks in words are asked alike: of which networks, on which images, read how."""

    networks: Sequence[str]
    """CLIPs (``open_clip:NAME@WEIGHTS``), students of a CLIP, and exports with a head to its embedding."""
    test: Path
    train: Path | None
    """Shards on which ``destandardised`` is fitted; None leaves that mode out."""
    clip: str | None
    """The text tower of networks that bring none, ``NAME@WEIGHTS``."""
    crop_pct: float
    batch: int
    workers: int
    out: Path | None
    """Folder of the records; by default the reports of the run that the first network is of."""
    step: int | None

    def answering(self, world: World) -> Iterator[tuple[float, Clip, Asked]]:
        """Each network with its text tower, and when its turn began (``time.perf_counter``, s). Collective.

        Raises as ``load_clip`` and ``asked`` do.
        """
        train = self.train
        fit = None if train is None else world.together(lambda: ShardSet.open(train))
        for text in self.networks:
            begin = time.perf_counter()
            tower = world.together(partial(load_clip, clip_for(text, self.clip), world.device))
            yield begin, tower, asked(text, tower, fit, self.step, world)

    def tell(self, records: Sequence[Record], world: World) -> None:
        """Write the records, and print their table. Collective."""
        for path in world.on_main(lambda: write_all(records, self.out or reports_of(self.networks[0]))):
            log.info("%s", path)
        if world.is_main:
            Console(soft_wrap=True).print(table(records))
