"""The pieces that every study is put together from: teachers, students, fine-tunings, frozen measurements.

Each method gives a piece, made now or found; all science is the product's (``fd_scale``), on images that lie
in memory. A seed decides weights, order and views of a piece, and of a fine-tuning the labelled images too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fd_scale import teachers
from fd_scale.errors import RunError
from fd_scale.export import write_weights
from fd_scale.objective.losses import Objective
from fd_scale.objective.targets import select
from fd_scale.run import recipe as recipes
from fd_scale.run.recipe import Recipe, RunRecipe, derive
from fd_scale.run.sections import Optim, Schedule, View
from fd_scale.student import Student, begin, build_backbone, build_student
from fd_scale.teachers import Teacher
from studies import lockstep
from studies.lessons import LESSONS, Lesson
from studies.lockstep import Learner
from studies.measures import FORWARD, Measures, generator, orders
from studies.pictures import Parts
from studies.settings import ARCHITECTURE, Bench, Length
from studies.store import Piece, Store
from studies.views import random_view

TEACHER_LAYER_SCALE = None
"""CLIP, DINO, DeiT and MAE have none."""


@dataclass(frozen=True)
class Workbench:
    """The settings of a study, its images on their device, and its store."""

    bench: Bench
    parts: Parts
    store: Store
    device: torch.device

    @property
    def measures(self) -> Measures:
        """Fine-tuning, kNN and the linear probe of finished networks."""
        return Measures(self.bench, self.parts, self.store, self.device)

    @property
    def shared(self) -> dict[str, Any]:
        """What decides every piece."""
        return {
            "data": self.parts.fingerprint,
            "network": self.bench.network.model_dump(),
            "device": self.device.type,
        }

    def teacher(self, lesson: str, seed: int = 0, **spec: Any) -> Piece:
        """A network of absolute positions and without LayerScale that learnt a lesson from the taught images;
        ``spec`` changes the network (``position``)."""
        length = self.bench.teaching
        facts = {**self.shared, "lesson": lesson, "length": length.model_dump(), "seed": seed, **spec}
        work = length.images * LESSONS[lesson].num_views
        make = partial(self._teach, lesson, length, seed, None, {"position": "ape"} | spec)
        return self.store.piece("teacher", facts, make, work=work, suppose={"seconds": work})

    def taught_on(self, teacher: Piece, lesson: str, seconds: float, seed: int, **spec: Any) -> Piece:
        """The teacher after as many seconds more of its own lesson, from a new start of its schedule."""
        spent = teacher.record["seconds"]
        before = self.bench.teaching
        batches = max(1, round(seconds / spent * before.images / before.batch))
        length = before.model_copy(update={"images": batches * before.batch})
        facts = {**self.shared, "from": teacher.identity, "length": length.model_dump(), "seed": seed}
        make = partial(self._teach, lesson, length, seed, teacher, {"position": "ape"} | spec)
        work = length.images * LESSONS[lesson].num_views
        return self.store.piece("taught_on", facts, make, work=work, suppose={"seconds": work})

    def students(
        self, teacher: Piece, variants: Mapping[str, Mapping[str, Any]], seed: int, images: int | None = None
    ) -> dict[str, Piece]:
        """A student per variant, all in lockstep under the one teacher: same seed, batches and views.

        A variant is changes of the recipe by dotted fields, ``"null"`` standing for null;
        ``"student.weights": "teacher"`` begins with the teacher. ``images`` is another length than
        the settings'.
        """
        asked = {name: self.recipe(teacher, changes, seed, images) for name, changes in variants.items()}
        facts = {
            name: {**self.shared, "from": teacher.identity, "recipe": _comparable(recipe)}
            for name, recipe in asked.items()
        }
        found = {name: self.store.find("student", facts[name]) for name in asked}
        missing = [name for name, piece in found.items() if piece is None]
        if self.store.planning:
            # In the teacher's unit, measured or supposed: what is taught on asks for a ratio of the two.
            pace = teacher.record["seconds"] / self.bench.teaching.images
            work = {name: asked[name].schedule.images * (1 + FORWARD / len(missing)) for name in missing}
            planned = {
                name: self.store.plan(
                    "student",
                    facts[name],
                    work=work[name],
                    suppose={"seconds": asked[name].schedule.images * (1 + FORWARD) * pace},
                )
                for name in missing
            }
        else:
            planned = self._distill(teacher, {n: asked[n] for n in missing}, {n: facts[n] for n in missing})
        return {name: found[name] or planned[name] for name in asked}  # type: ignore[misc]

    def recipe(
        self, teacher: Piece, changes: Mapping[str, Any], seed: int, images: int | None = None
    ) -> Recipe:
        """A distillation as the product knows it; ``fd-scale distill --recipe`` runs the same from shards."""
        length = self.bench.distilling
        if images is not None:
            length = length.model_copy(update={"images": images})
        base = Recipe(
            name="student",
            student=self.bench.network.spec("shared_rpb", drop_path=0.1),
            teacher=recipes.Teacher(
                library="models",
                architecture=ARCHITECTURE,
                weights=str(teacher.weights),
                input_size=self.bench.network.input_size,
                arguments=self.bench.network.model_dump(exclude={"input_size"})
                | {"position": teacher.record.get("position", "ape"), "layer_scale": TEACHER_LAYER_SCALE},
            ),
            seed=seed,
            **common(length),
        )
        words = {("student.weights", "teacher"): str(teacher.weights)}
        # TOML has no null.
        plain = {
            key: None if value == "null" else words.get((key, value), value) for key, value in changes.items()
        }
        return derive(base, **plain)

    def _teach(
        self,
        lesson: str,
        length: Length,
        seed: int,
        begun: Piece | None,
        spec: Mapping[str, Any],
        folder: Path,
    ) -> dict[str, Any]:
        network = self.bench.network.spec(layer_scale=TEACHER_LAYER_SCALE, **spec)
        taught, classes = self.parts.taught, len(self.parts.classes)
        torch.manual_seed(seed)
        module: Lesson = LESSONS[lesson](build_backbone(network), taught.labels, classes, 0)
        if begun is not None:
            module.load_state_dict(load_file(begun.folder / "lesson.safetensors"))
        module.to(self.device)
        recipe = RunRecipe(name=lesson, seed=seed, **common(length))
        learner = Learner(
            lesson, recipe, module, lambda shared: module(*shared), after_step=module.after_step
        )

        def share(index_B: Tensor) -> tuple[list[Tensor], Tensor]:
            pixels = taught.pixels[index_B]
            size = self.bench.network.input_size
            return [random_view(pixels, recipe.view, size, draws) for _ in range(module.num_views)], index_B

        draws = generator("fd.views", seed)
        batches = orders(len(taught), recipe.global_batch, seed, self.device)
        course = self._run([learner], batches, share, recipe.steps, f"teacher, {lesson}")
        write_weights(folder / "weights.safetensors", _whole(module.backbone), network)
        save_file(_whole(module), folder / "lesson.safetensors")
        return {
            "seconds": course.seconds[lesson],
            "images": recipe.steps * recipe.global_batch,
            "losses": course.losses[lesson],
            "position": network.position,
            "lesson": lesson,
        }

    def _distill(
        self,
        teacher: Piece,
        asked: Mapping[str, Recipe],
        facts: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Piece]:
        if not asked:
            return {}
        first = next(iter(asked.values()))
        if len({(one.steps, one.global_batch, one.seed, one.view) for one in asked.values()}) > 1:
            raise RunError("students in lockstep see the same batches: their lengths and views must be equal")
        frozen = {_key(one): _loaded(one, self.device) for one in asked.values()}
        learners = []
        for name, recipe in asked.items():
            torch.manual_seed(recipe.seed)
            student = build_student(recipe, [frozen[_key(recipe)]])
            begin(student, recipe.student)
            student.to(self.device)
            learners.append(Learner(name, recipe, student, partial(_distance, student, recipe)))

        def share(index_B: Tensor) -> Shared:
            pixels = random_view(images[index_B], first.view, self.bench.network.input_size, draws)
            return Shared(pixels, {key: one.features(pixels) for key, one in frozen.items()})

        images, draws = self.parts.distilled, generator("fd.views", first.seed)
        batches = orders(len(images), first.global_batch, first.seed, self.device)
        title = f"{len(learners)} students, seed {first.seed}"
        course = self._run(learners, batches, share, first.steps, title)
        made = {}
        for learner in learners:
            name = learner.name
            folder = self.store.begin("student", facts[name])
            student: Any = learner.module
            write_weights(folder / "weights.safetensors", _whole(student.backbone), asked[name].student)
            record = {
                "seconds": course.seconds[name],
                "images": first.steps * first.global_batch,
                "losses": course.losses[name],
                "position": asked[name].student.position,
            }
            made[name] = self.store.finish("student", facts[name], record)
        return made

    def _run(
        self, learners: list[Learner], batches: Iterator[Tensor], share: Any, steps: int, title: str
    ) -> lockstep.Course:
        begin_s = time.perf_counter()
        course = lockstep.run(learners, batches, share, steps=steps, device=self.device, title=title)
        images = steps * learners[0].recipe.global_batch
        ends = ", ".join(f"{one.name} {one.losses[-1]:.4f}" for one in learners)
        self.store.say(f"{title}: {images:,} images, {time.perf_counter() - begin_s:.0f} s, loss {ends}")
        return course


@dataclass(frozen=True, eq=False)
class Shared:
    """What all students see of a batch."""

    pixels: Tensor
    maps: Mapping[str, Any]
    """The teachers' maps, by ``_key`` of the recipe."""


def _distance(student: Student, recipe: Recipe, shared: Shared) -> Tensor:
    """The product's loss of one student."""
    spec = recipe.objective
    taught = select(shared.maps[_key(recipe)], granularity=spec.granularity, cls=spec.cls)
    valid = torch.ones(len(shared.pixels), dtype=torch.bool, device=shared.pixels.device)
    return Objective(spec)(student(shared.pixels), [taught], valid)


def _key(recipe: Recipe) -> str:
    """Students of equal teachers share its maps."""
    return recipe.teacher.model_dump_json()


def _loaded(recipe: Recipe, device: torch.device) -> Teacher:
    return teachers.load(recipe.teacher, device=device, dtype=torch.float32, seed=0)


def common(length: Length) -> dict[str, Any]:
    """A length as the fields of any recipe: warm-up of a tenth, cosine to a hundredth of the peak."""
    return {
        "view": View(crop_scale=(length.crop, 1.0), interpolation="bilinear"),
        "optim": Optim(lr=length.lr, weight_decay=length.weight_decay, clip_norm=length.clip_norm),
        "schedule": Schedule(
            images=length.images,
            warmup_images=length.images // 10,
            warmup_lr=length.lr / 100,
            min_lr=length.lr / 100,
        ),
        "global_batch": length.batch,
        "scale": "cpu",
    }


def _whole(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The science of a recipe without names and places, which are in the teacher's identity."""
    values = recipe.science(defaults=False)
    del values["name"]
    del values["teacher"]["weights"]
    if "weights" in values["student"]:
        values["student"]["weights"] = "teacher"
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
