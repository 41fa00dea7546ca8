"""How much can a linear classifier read from frozen features? The papers' protocol, on augmented images.

MAE's probe, which FD cites: LARS at batch 16384 for 90 epochs, crops and flips, the class token through a
batch norm without affine. The frozen network stays outside the engine, as a teacher does; the probe is a run
like any other. The fast mode is ``linear_fast.py``; the two never share a table.

Shape letters: B images, D channels, C classes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from fd_scale import training
from fd_scale.data.reader import Batch
from fd_scale.engine.adamw import adamw
from fd_scale.engine.lars import lars
from fd_scale.engine.zero import Engine
from fd_scale.errors import RecipeError, RunError, ScaleError
from fd_scale.evaluate import accuracy, job
from fd_scale.evaluate.accuracy import Accuracy
from fd_scale.evaluate.augment import smoothed
from fd_scale.evaluate.classifier import HEAD_STD
from fd_scale.evaluate.finetune import Sets, conclude, open_sets, protocol_of, soft_cross_entropy
from fd_scale.evaluate.naming import reports_of
from fd_scale.evaluate.record import Record
from fd_scale.evaluate.source import open_source
from fd_scale.run import scale
from fd_scale.run.folder import environment
from fd_scale.run.scale import Resolved
from fd_scale.run.transfer import TransferRecipe
from fd_scale.run.world import World, launch
from fd_scale.teachers import difference

log = logging.getLogger("fd_scale")

NORM_EPS = 1e-6
"""Of the batch norm (MAE)."""


class Head(nn.Module):
    """Features (B, D) to logits (B, C): batch norm without affine, then one linear layer.

    The norm's statistics in training are those of a micro-batch, as MAE's are those of one GPU's.
    """

    def __init__(self, width: int, num_classes: int, *, std: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, eps=NORM_EPS, affine=False)
        self.linear = nn.Linear(width, num_classes)
        trunc_normal_(self.linear.weight, std=std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B, C)."""
        return self.linear(self.norm(features_BD.to(self.linear.weight.dtype)))


def probe(asked: Sequence[TransferRecipe], *, out: Path | None = None) -> None:
    """Run probes that differ in their seeds, one after the other; as ``finetune.finetune``."""

    def action(world: World) -> int:
        records = []
        for recipe in asked:
            done: list[Probe] = []
            status = training.drive(partial(_prepared, recipe, done), world)
            if done[0].result is None:
                return status
            records.append(done[0].record(done[0].result))
            job.going_on(world, recipe.steps)
        conclude(records, out or reports_of(asked[0].start.network), world)
        return 0

    launch(action)


def _prepared(recipe: TransferRecipe, done: list[Probe], world: World) -> training.Run:
    resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
    sets = open_sets(recipe, world)
    done.append(Probe(recipe, resolved, sets, world))
    return training.Run(recipe, done[0], sets.train, resolved, world)


class Probe:
    """A frozen network and a head in training; a ``training.Task``.

    Raises ``ScaleError`` where the scale shards what LARS needs whole, ``RecipeError`` for a feature that the
    network does not have, and for a choice of weights that a probe does not have.
    """

    labels = True
    change = None
    groups = None
    average_decay = None
    keep_steps = ()

    def __init__(self, recipe: TransferRecipe, resolved: Resolved, sets: Sets, world: World) -> None:
        _check(recipe, resolved)
        self.recipe, self.sets, self.world = recipe, sets, world
        self.begun = time.perf_counter()
        self.make_optimizer = lars if recipe.optim.algorithm == "lars" else adamw
        start = recipe.start
        self.backbone = world.together(
            lambda: open_source(
                start.network, step=start.step, input_size=start.input_size, device=world.device
            )
        )
        self.sizes = [self.backbone.input_size]
        grey = torch.zeros(1, 3, self.backbone.input_size, self.backbone.input_size, dtype=torch.uint8)
        pooled = self.backbone.pooled(grey)
        if recipe.head.feature not in pooled:
            raise RecipeError(
                f"head.feature={recipe.head.feature!r}: {self.backbone.name} gives {', '.join(pooled)} alone"
            )
        torch.manual_seed(recipe.seed)
        width = pooled[recipe.head.feature].shape[1]
        self.num_classes = len(sets.classes)
        self.module = Head(width, self.num_classes, std=HEAD_STD * recipe.head.init_scale)
        self.result: Accuracy | None = None

    def features(self, pixels: Tensor) -> Tensor:
        """What the head reads (B, D) of uint8 pixels."""
        return self.backbone.pooled(pixels)[self.recipe.head.feature]

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """Cross entropy on the features of this rank's micro-batch."""
        device = self.world.device
        pixels = training.on_device(batch, device)[self.backbone.input_size]
        labels = torch.as_tensor(batch.labels).to(device, non_blocking=True).clamp_min(0)
        valid = batch.valid.to(device, non_blocking=True)
        soft_BC = smoothed(labels, self.num_classes, self.recipe.augment.smoothing)
        return soft_cross_entropy(engine(self.features(pixels)), soft_BC, valid)

    def maps(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """The features and the logits."""
        pixels = training.on_device(batch, self.world.device)
        features = self.features(pixels[self.backbone.input_size])
        return {self.backbone.name: features, "probe": engine(features)}

    @property
    def facts(self) -> dict[str, Any]:
        """The frozen network, and the classes."""
        return {"start": self.backbone.fingerprint, "classes": self.sets.classes}

    def resume(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ``RunError`` for another network or other classes."""
        if differences := difference(facts["start"], self.backbone.fingerprint):
            raise RunError(f"{checkpoint} is a probe of another network: {'; '.join(differences)}")
        if facts["classes"] != self.sets.classes:
            raise RunError(f"{checkpoint} learnt other classes than those of the training shards now")

    def figures(self, run: training.Run, step: int) -> dict[str, float]:
        """None; but the norm's running statistics are averaged over the processes after every step, so that
        a checkpoint, which holds those of one, is whole."""
        if self.world.size > 1:
            for name, value in run.engine.module.named_buffers():
                if name.startswith("norm.running"):
                    value.copy_(self.world.mean(value))
        return {}

    def finish(self, run: training.Run) -> None:
        """Measure the last step on the test shards, if there are any."""
        if self.sets.test is None:
            log.info("data.test is not set: nothing was measured")
            return
        run.engine.module.eval()
        self.result = accuracy.measure(
            lambda pixels: run.engine(self.features(pixels)),
            self.sets.test,
            self.world,
            size=self.backbone.input_size,
            crop_pct=self.recipe.measure.crop_pct,
            batch=run.resolved.micro_batch,
            workers=self.recipe.run.workers,
        )
        run.engine.module.train()
        log.info("%d test images: top1 %.2f %%", self.result.num_images, 100 * self.result.top1)

    def record(self, result: Accuracy) -> Record:
        """What was measured, with one seed."""
        seen = {name: self.backbone.fingerprint.get(name) for name in ("mean", "std")}
        return Record(
            task=self.recipe.task,
            model=self.backbone.name,
            feature=self.recipe.head.feature,
            network=self.backbone.fingerprint,
            protocol=protocol_of(self.recipe),
            data=self.sets.records,
            metrics=result.metrics,
            headline="top1",
            num_test=result.num_images,
            seeds=[self.recipe.seed],
            trained=True,
            facts={
                "effective_lr": self.recipe.optim.lr,
                "steps": self.recipe.steps,
                "normalisation": {"train": seen, "test": seen},
                "num_left_out": result.num_left_out,
            },
            environment=environment(),
            wall_s=time.perf_counter() - self.begun,
        )


def _check(recipe: TransferRecipe, resolved: Resolved) -> None:
    if recipe.optim.algorithm == "lars" and (resolved.zero_stage or resolved.bf16):
        raise ScaleError(
            f"LARS compares whole matrices in float32, and scale {recipe.scale!r} has ZeRO stage "
            f"{resolved.zero_stage}{' and bf16' if resolved.bf16 else ''}: choose --set scale=probe, or "
            "another with stage 0 and without bf16"
        )
    if recipe.measure.select != "last":
        raise RecipeError("a probe is measured at its last step: set measure.select=last")
    if recipe.compat.released_code:
        raise RecipeError(
            "compat.released_code is for fine-tuning: a probe's network is frozen with its own mean and std"
        )
