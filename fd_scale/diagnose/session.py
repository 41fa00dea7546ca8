"""How is a diagnosis put together? From the names of two networks to the page, on any number of processes.

What is finished is kept in ``<out>/parts`` and not computed again: a stopped diagnosis goes on by the same
command, and one more checkpoint of a run costs one more student, not one more teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.sets import access_of, open_shards
from fd_scale.diagnose import images as imagery
from fd_scale.diagnose import landscape, tasks
from fd_scale.diagnose.anatomy import Anatomy, anatomy
from fd_scale.diagnose.drift import Drift, drift
from fd_scale.diagnose.images import Images
from fd_scale.diagnose.landscape import Grid, Landscape, Surface, Task
from fd_scale.diagnose.parts import Parts, slug
from fd_scale.diagnose.report import write
from fd_scale.diagnose.results import Pictures, Results, Role, Side
from fd_scale.diagnose.rollout import has_rollout
from fd_scale.diagnose.similarity import MIN_IMAGES, cka
from fd_scale.diagnose.single_images import look_at
from fd_scale.diagnose.subjects import DiagnoseError, Pair, Run, Subject, load_pair
from fd_scale.diagnose.survey import Survey, survey
from fd_scale.diagnose.teller import SILENT, Teller
from fd_scale.engine.checkpoint import committed
from fd_scale.evaluate.naming import DistilledRun, LabelledRun, meaning
from fd_scale.run.report import read_metrics
from fd_scale.run.world import Place, World

NUM_PICTURES = 5
"""Images of the data that are shown, unless the user brings some."""
LANDSCAPE_FLOP = {"cpu": 3e11, "cuda": 2e16}
"""Of forward passes that the landscape of one task may spend by default, by kind of device."""
LANDSCAPE_IMAGES = (8, 1000)
"""Fewest and most by default."""
DRIFT_IMAGES = 64
MAX_BAD_FRACTION = 1e-3
"""Of samples that may be unreadable where no run says it."""

Work = tuple[Task, list[Tensor]]
"""What a landscape is of, and this process's pixels on the device."""


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    target: str
    against: str | None = None
    data: Path | None = None
    """A folder of shards; the run's own by default."""
    images: int | None = None
    pictures: Sequence[Path] = ()
    """The user's own images."""
    step: int | None = None
    out: Path | None = None
    """Folder of the page; by default in the run's ``reports``."""
    batch: int = 32
    workers: int = 0
    bf16: bool = False
    with_landscape: bool = True
    landscape_images: int | None = None
    grid: Grid = field(default_factory=Grid)
    with_surface: bool = False
    fine_tuned: bool = False
    """Whether both networks bring the classifier that they were fine-tuned with, whose loss is wanted."""


def diagnose(request: Request, world: World, *, teller: Teller | None = None, live: bool = False) -> Path:
    """Diagnose, and write the page; returns its path. Collective.

    ``teller`` hears how far it is, on one process. Raises ``UserError`` for anything that the user can
    put right.
    """
    pair = world.together(
        lambda: load_pair(request.target, request.against, step=request.step, device=world.device)
    )
    chosen = world.together(lambda: _choose_images(request, pair))
    out = _out_folder(request)
    told = teller or Teller() if world.is_main else SILENT
    session = Session(request, pair, chosen, world, Parts(out / "parts"), told)
    results = session.run()
    page = world.on_main(lambda: write(results, out, live=live))
    told.say(f"page: {page}")
    return page


@dataclass(eq=False)
class Session:
    """One diagnosis on this process."""

    request: Request
    pair: Pair
    images: Images
    world: World
    parts: Parts
    teller: Teller
    notes: list[str] = field(default_factory=list)
    """What cannot be shown, and why."""

    def run(self) -> Results:
        """All that there is to find. Collective."""
        names = " against ".join(subject.name for subject in reversed(self.pair.both))
        self.teller.say(f"{names}: {self.images.count:,} of {self.images.shards.num_samples:,} images")
        scored = self.images.first(self.request.landscape_images or self._landscape_count())
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.request.bf16):
            # First, since most of what may be wrong with a request comes to light here.
            work = self.tasks(scored) if self.request.with_landscape else []
            sides = [self.side(subject) for subject in self.pair.both]
            curves = [self.landscape(task, batches) for task, batches in work]
            wanted = work if self.request.with_surface else []
            surfaces = [self.surface(task, batches) for task, batches in wanted]
        return Results(
            title=_title(self.pair),
            sides=sides,
            about=self.about(scored.count if work else 0),
            cka=self.layer_similarity(sides),
            landscapes=curves,
            surfaces=surfaces,
            pictures=self.world.on_main(lambda: self.pictures(sides)),
            drift=self.world.on_main(self.drift),
            training=_training(self.pair.run),
            notes=self.notes,
        )

    def side(self, subject: Subject) -> Side:
        """The survey of a network, as it was finished before or made now."""
        role: Role = "after" if subject is self.pair.subject else "before"
        found = anatomy(subject)
        if found.left_out:
            self.notes.append(f"Attention of {subject.name}: {found.left_out}.")
        if found.attention and not has_rollout(found):
            self.notes.append(f"Rollout of {subject.name}: its layers attend among changing tokens.")
        facts = {**self.images.facts, "network": subject.facts, "bf16": self.request.bf16}
        name = f"survey-{slug(subject.name)}"
        record = self.parts.kept(self.world, name, facts, lambda: self._survey(subject, found).record())
        self.teller.say(f"attention and tokens of {subject.name}")
        return Side(subject.name, role, subject.origin, subject.facts, found, Survey.of_record(record))

    def tasks(self, scored: Images) -> list[Work]:
        """What landscapes are made of: both networks, all stages that there is something to score for."""
        facts = {**self.images.facts, **scored.facts, "bf16": self.request.bf16}
        work: list[Work] = []
        for subject in self.pair.both:
            size, held = subject.backbone.input_size, subject.distillation
            batches = [pixels.to(self.world.device) for pixels in scored.batches(size, self.world)]
            work.append((tasks.shift(subject, batches, facts), batches))
            if held is not None:
                by_size = _by_size(scored, held.sizes, self.world)
                work.append((tasks.distillation(subject, by_size, facts), batches))
        if self.request.fine_tuned:
            return work + self.world.together(lambda: self._fine_tuned(scored, facts))
        if imagery.has_labels(self.images.shards):
            return work + self._heads(scored.count, facts)
        self.notes.append(
            "Landscape under a linear head: the data have no labels (give labelled shards with --data)."
        )
        return work

    def landscape(self, task: Task, batches: list[Tensor]) -> Landscape:
        """The curves of a task."""
        grid = self.request.grid
        title = f"landscape of {task.network}, {task.quantities[0]}"
        with self.teller.counting(title, grid.directions * grid.points) as on_points:
            found = landscape.measure(task, batches, grid, self.world, self.parts, on_points=on_points)
        self.teller.say(title)
        return found

    def surface(self, task: Task, batches: list[Tensor]) -> Surface:
        """The plane of a task."""
        grid = self.request.grid
        title = f"surface of {task.network}, {task.quantities[0]}"
        with self.teller.counting(title, grid.points**2) as on_points:
            found = landscape.measure_surface(
                task, batches, grid, self.world, self.parts, on_points=on_points
            )
        self.teller.say(title)
        return found

    def layer_similarity(self, sides: Sequence[Side]) -> Tensor | None:
        """CKA of all layers of the first network with those of the last."""
        first, last = (list(side.survey.pooled.values()) for side in (sides[0], sides[-1]))
        if len(first[0]) < MIN_IMAGES:
            self.notes.append(f"Similarity of layers: it needs {MIN_IMAGES} images or more.")
            return None
        return cka(first, last)

    def pictures(self, sides: Sequence[Side]) -> Pictures:
        """Single images: the user's own, or the first of the data."""
        subjects = list(zip(self.pair.both, (side.anatomy for side in sides), strict=True))
        paths = self.request.pictures
        if paths:
            return look_at(
                subjects,
                lambda size: torch.stack([imagery.read_file(path, size) for path in paths]),
                [path.name for path in paths],
            )
        first = self.images.first(NUM_PICTURES)
        alone = _alone(self.world)
        names = [f"image {number + 1} of the data" for number in range(first.count)]
        return look_at(subjects, lambda size: torch.cat(list(first.batches(size, alone))), names)

    def drift(self) -> Drift | None:
        """The checkpoints of the run, where there is one."""
        run = self.pair.run
        if run is None:
            return None
        held = self.pair.subject.distillation
        sizes = held.sizes if held else {self.pair.subject.backbone.input_size}
        batches = _by_size(self.images.first(DRIFT_IMAGES), sizes, _alone(self.world))
        if sum(len(next(iter(batch.values()))) for batch in batches) < MIN_IMAGES:
            self.notes.append(f"Drift over training: it needs {MIN_IMAGES} images or more.")
            return None
        return self._kept_drift(run, batches)

    def about(self, num_scored: int) -> dict[str, str]:
        """The head of the page. How many images were used stands here, always."""
        shards, grid, run = self.images.shards, self.request.grid, self.pair.run
        facts = {
            "Images": f"the first {self.images.count:,} of {shards.num_samples:,}, centre view",
            "Data": ", ".join(str(part.folder) for part in shards.folders),
            "Input": ", ".join(dict.fromkeys(f"{s.backbone.input_size} px" for s in self.pair.both)),
            "Precision": "bfloat16 autocast" if self.request.bf16 else "float32",
        }
        if num_scored:
            lines = f"{grid.directions} directions of {grid.points} points up to {grid.radius:g}"
            facts["Landscape"] = f"the first {num_scored:,} images, {lines}"
        return facts if run is None else facts | {"Run": str(run.folder.path)}

    def _heads(self, num_scored: int, facts: dict[str, Any]) -> list[Work]:
        """Linear heads on frozen features of both networks."""
        shards = self.images.shards
        count = min(num_scored * (1 + tasks.FIT_PER_SCORED), shards.num_samples)
        work: list[Work] = []
        for subject in self.pair.both:
            data = tasks.fit_head(subject, replace(self.images, count=count), num_scored, self.world)
            work.append((tasks.head(subject, data, facts), data.batches))
        return work

    def _fine_tuned(self, scored: Images, facts: dict[str, Any]) -> list[Work]:
        """The classifiers that both networks bring."""
        classes = self.images.shards.classes
        device = self.world.device
        work: list[Work] = []
        for subject in self.pair.both:
            seen = list(scored.labelled(subject.backbone.input_size, self.world))
            batches = [part.pixels.to(device) for part in seen]
            labels = [part.labels.to(device) for part in seen]
            num_classes = None if classes is None else len(classes)
            task = tasks.fine_tuned(subject, batches, labels, facts, num_classes=num_classes)
            work.append((task, batches))
        return work

    def _survey(self, subject: Subject, found: Anatomy) -> Survey:
        batches = self.images.batches(subject.backbone.input_size, self.world)
        share = self.images.count // self.world.size
        with self.teller.counting(f"attention and tokens of {subject.name}", share) as on_batch:
            return survey(subject, found, batches, self.world, on_batch=on_batch)

    def _kept_drift(self, run: Run, batches: list[dict[int, Tensor]]) -> Drift:
        """On one process: what was finished before for the same checkpoints, or made now."""
        steps = [found.step for found in committed(run.folder.checkpoints)]
        facts = {
            **self.images.facts,
            "run": self.pair.subject.facts,
            "steps": steps,
            "recipe": run.recipe.fingerprint,
        }
        record = self.parts.read("drift", facts)
        if record is None:
            with self.teller.counting("drift over checkpoints", len(steps) + 1) as on_checkpoint:
                found = drift(run, batches, self.world.device, on_checkpoint=on_checkpoint)
            self.teller.say("drift over checkpoints")
            record = asdict(found)
            self.parts.write("drift", facts, record)
        return Drift(**record)

    def _landscape_count(self) -> int:
        budget = LANDSCAPE_FLOP[self.world.device.type]
        flop = max(imagery.flop_per_image(subject) for subject in self.pair.both)
        points = self.request.grid.points * self.request.grid.directions
        fewest, most = LANDSCAPE_IMAGES
        return int(min(max(budget / (flop * points), fewest), most))


def _choose_images(request: Request, pair: Pair) -> Images:
    bad = pair.run.recipe.data.max_bad_fraction if pair.run else MAX_BAD_FRACTION
    shards = _open_data(request, pair)
    for path in request.pictures:
        # Read again when they are shown; whoever gave a wrong name hears of it now.
        imagery.read_file(path, 1)
    return imagery.choose(
        shards, request.images, pair.both, batch=request.batch, workers=request.workers, bad=bad
    )


def _open_data(request: Request, pair: Pair) -> ShardSet:
    if request.data is not None:
        return ShardSet.open(request.data)
    if pair.run is not None:
        return open_shards(pair.run.recipe)
    named = meaning(request.target)
    if isinstance(named, LabelledRun) and named.recipe.data.test is not None:
        return ShardSet.open(named.recipe.data.test, access=access_of(named.recipe))
    raise DiagnoseError(
        f"there are no images to look at: {request.target} names none, so give a folder of shards with "
        "--data (make one with `fd-scale shards pack IMAGES FOLDER`)"
    )


def _out_folder(request: Request) -> Path:
    if request.out is not None:
        return request.out
    named = meaning(request.target)
    if isinstance(named, DistilledRun | LabelledRun):
        return named.folder.reports / "diagnose"
    return Path("diagnose_out")


def _title(pair: Pair) -> str:
    if pair.against is None:
        return pair.subject.name[0].upper() + pair.subject.name[1:]
    return f"From {pair.against.name} to {pair.subject.name}"


def _training(run: Run | None) -> list[dict[str, Any]]:
    return read_metrics(run.folder.metrics) if run is not None and run.folder.metrics.is_file() else []


def _by_size(chosen: Images, sizes: set[int], world: World) -> list[dict[int, Tensor]]:
    """The batches at several sizes, image by image the same, on the device."""
    streams = [[pixels.to(world.device) for pixels in chosen.batches(s, world)] for s in sorted(sizes)]
    return [dict(zip(sorted(sizes), batch, strict=True)) for batch in zip(*streams, strict=True)]


def _alone(world: World) -> World:
    """This process as the only one: for what it does while the others wait."""
    alone = World(Place(0, 1, world.local_rank, world.launcher))
    alone.device = world.device
    return alone
