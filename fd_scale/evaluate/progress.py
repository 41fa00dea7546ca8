"""Is it learning? What a distillation measures of itself on a small labelled set, from step 0 on.

kNN accuracy of the student's features with the teacher's beside it, the share of the target's variance that
the prediction explains, the effective rank of the features, and how far they have drifted from those of step
0. The loop logs the figures; each measurement says what it cost.

Shape letters: B images, N images of the set, M tokens, D channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import evaluation_batches
from fd_scale.distill import Distillation
from fd_scale.errors import RecipeError
from fd_scale.evaluate.backbone import pool
from fd_scale.evaluate.knn import HEADLINE, classify
from fd_scale.objective.features import Features
from fd_scale.objective.targets import l2_normalise, l2_scaled, whiten
from fd_scale.run.recipe import Recipe
from fd_scale.run.world import World
from fd_scale.timm_maps import as_features
from fd_scale.training import Run

NORMALISERS = {
    "whiten": whiten,
    "l2": l2_normalise,
    "l2_scaled": l2_scaled,
    "none": lambda tokens: tokens.float(),
}
START = "probe_start.safetensors"
"""In the run's reports: pooled features of step 0."""


class Progress:
    """Measures a run on a labelled set of shards, every so many steps; ``figures`` is collective.

    Every second image is looked up among the others. Raises ``RecipeError`` for too small a set.
    """

    def __init__(self, shards: ShardSet, *, every_steps: int, world: World) -> None:
        if shards.num_samples < 4:
            raise RecipeError(
                f"run.probe holds {shards.num_samples} images: a few hundred make a measurement"
            )
        self.shards, self.every_steps, self.world = shards, every_steps, world
        self.teacher: dict[str, float] = {}
        self.seconds = 0.0
        self.since = time.perf_counter()

    def __call__(self, task: Distillation, run: Run, step: int) -> dict[str, float]:
        """What is measured when ``step`` steps are done; nothing where it is not the time."""
        if step % self.every_steps and step != run.recipe.steps:
            return {}
        begin = time.perf_counter()
        found = self.measure(task, run)
        self.seconds += time.perf_counter() - begin
        share = self.seconds / max(time.perf_counter() - self.since, 1e-9)
        return found | {"probe_s": time.perf_counter() - begin, "probe_share": share}

    @torch.no_grad()
    def measure(self, task: Distillation, run: Run) -> dict[str, float]:
        """The figures, in [0, 1] but for ranks."""
        module: Any = run.engine.module
        fits = [Explained() for _ in task.guests]
        seen: list[Tensor] = []
        hook = module.backbone.register_forward_hook(lambda *call: seen.append(call[2]))
        module.eval()
        students, teachers, labels = [], [], []
        try:
            for pixels, valid, named in self.batches(task, run.resolved.micro_batch):
                seen.clear()
                run.beat("a batch of the probe")
                # A recipe may have the embedding beside the maps; what is explained is of the maps.
                predicted = run.engine(pixels[task.student_size])[: len(task.guests)]
                taught = [guest(pixels) for guest in task.guests]
                first = task.teachers[0]
                shown = None if self.teacher else first.features(pixels[first.input_size])
                if valid is None:  # all ranks call all networks equally often: they may be sharded
                    continue
                students.append(_pooled(as_features(seen[0], module.form), valid))
                for guest, fit, tokens, wanted in zip(task.guests, fits, predicted, taught, strict=True):
                    target = NORMALISERS[guest.objective.target](wanted)
                    fit.add(tokens.float()[valid], target[valid])
                if shown is not None:
                    teachers.append(_pooled(shown, valid))
                labels.append(named[valid.cpu()])
        finally:
            module.train()
            hook.remove()
        return self.summary(task, run, students, teachers, labels, fits)

    def summary(
        self,
        task: Distillation,
        run: Run,
        students: list[Tensor],
        teachers: list[Tensor],
        labels: list[Tensor],
        fits: list[Explained],
    ) -> dict[str, float]:
        """The figures of all ranks from the parts of this one."""
        student_ND, labels_N = (_everywhere(parts, self.world) for parts in (students, labels))
        if not self.teacher:
            taught_ND = _everywhere(teachers, self.world)
            self.teacher = {
                "teacher_knn": half_knn(taught_ND, labels_N),
                "teacher_rank": effective_rank(taught_ND),
            }
        figures = {
            "knn": half_knn(student_ND, labels_N),
            "rank": effective_rank(student_ND),
            "drift": 1 - similarity(student_ND, self.first(run, student_ND)),
        }
        for number, fit in enumerate(fits):
            name = "explained" if len(fits) == 1 else f"explained_{number}"
            figures[name] = Explained.together(self.world.gather(fit)).share
        return figures | self.teacher

    def first(self, run: Run, student_ND: Tensor) -> Tensor:
        """The features of step 0, kept beside the run's reports. Those of now where they were not kept."""
        path = run.folder.reports / START

        def on_main() -> Tensor:
            if not path.is_file():
                path.parent.mkdir(exist_ok=True)
                save_file({"pooled": student_ND.contiguous()}, path)
            return load_file(path)["pooled"]

        return self.world.on_main(on_main)

    def batches(
        self, task: Distillation, batch: int
    ) -> Iterator[tuple[dict[int, Tensor], Tensor | None, Tensor]]:
        """Views of this rank's part by size, which are valid, and labels; then as many grey images, valid
        ``None``, as other ranks have more batches."""
        device, done = self.world.device, 0
        streams = [
            evaluation_batches(
                self.shards,
                size=size,
                crop_pct=1.0,
                batch=batch,
                rank=self.world.rank,
                world_size=self.world.size,
            )
            for size in task.sizes
        ]
        for parts in zip(*streams, strict=True):
            pixels = {
                size: part.pixels[size].to(device) for size, part in zip(task.sizes, parts, strict=True)
            }
            done += 1
            yield pixels, parts[0].valid.to(device), torch.as_tensor(parts[0].labels)
        most = math.ceil(math.ceil(self.shards.num_samples / self.world.size) / batch)
        for _ in range(most - done):
            grey = {s: torch.zeros(1, 3, s, s, dtype=torch.uint8, device=device) for s in task.sizes}
            yield grey, None, torch.zeros(0, dtype=torch.int64)


class Explained:
    """The share of a target's variance that predictions explain: 1 - squared error / variance."""

    def __init__(self) -> None:
        self.error = self.square = 0.0
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, predicted_BMD: Tensor, target_BMD: Tensor) -> None:
        """Note some tokens."""
        target = target_BMD.double().flatten(0, 1)
        self.error += float((predicted_BMD.double().flatten(0, 1) - target).square().sum())
        self.square += float(target.square().sum())
        self.total = self.total + target.sum(dim=0).cpu()
        self.count += len(target)

    @classmethod
    def together(cls, parts: list[Explained]) -> Explained:
        """Those of all ranks."""
        whole = cls()
        for part in parts:
            whole.error, whole.square = whole.error + part.error, whole.square + part.square
            whole.total, whole.count = whole.total + part.total, whole.count + part.count
        return whole

    @property
    def share(self) -> float:
        """1 where all is explained, 0 for the mean of each channel, below for worse."""
        spread = self.square - float(torch.as_tensor(self.total).square().sum()) / max(self.count, 1)
        return 1 - self.error / max(spread, 1e-300)


def half_knn(features_ND: Tensor, labels_N: Tensor, k: int = HEADLINE) -> float:
    """Accuracy of every second image by its ``k`` nearest (or all) of the others."""
    bank, asked = features_ND[0::2], features_ND[1::2]
    used = min(k, len(bank))
    answers = classify(bank, labels_N[0::2], asked, num_classes=int(labels_N.max()) + 1, ks=[used])[used]
    return float((answers == labels_N[1::2]).double().mean())


def effective_rank(features_ND: Tensor) -> float:
    """exp of the entropy of the singular values' shares, of centred features: 1 to min(N, D)."""
    values = torch.linalg.svdvals((features_ND - features_ND.mean(dim=0)).double())
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.exp(-(shares * shares.clamp_min(1e-300).log()).sum()))


def similarity(first_ND: Tensor, second_ND: Tensor) -> float:
    """Linear CKA: 1 for features that are equal up to rotation and scale."""
    first, second = ((x - x.mean(dim=0)).double() for x in (first_ND, second_ND))
    cross = (first.T @ second).square().sum()
    norms = (first.T @ first).norm() * (second.T @ second).norm()
    return float(cross / norms.clamp_min(1e-300))


def of_recipe(recipe: Recipe, world: World) -> Progress | None:
    """What the recipe asks to be measured, or None. Collective."""
    if recipe.run.probe is None:
        return None
    folder = Path(recipe.run.probe)
    every = recipe.run.probe_every_steps
    return world.together(lambda: Progress(ShardSet.open(folder), every_steps=every, world=world))


def _pooled(features: Features, valid: Tensor) -> Tensor:
    return pool(features)["gap"].float()[valid].cpu()


def _everywhere(parts: list[Tensor], world: World) -> Tensor:
    return torch.cat(world.gather(torch.cat(parts)))
