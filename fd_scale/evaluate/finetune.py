"""Fine-tuning on labels: the papers' main measure, on the engine, plan and checkpoints of every run.

The network that ``start.py`` prepares gets a head and learns with layer-wise learning rates. Which weights
are measured is declared before: those of the last step, or those with the best accuracy on shards that were
set aside from training. The test shards are looked at once, at the end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fd_scale import training
from fd_scale.compiled import compile_blocks
from fd_scale.data.index import ShardSet
from fd_scale.data.reader import Batch
from fd_scale.data.sets import open_shards
from fd_scale.engine import checkpoint
from fd_scale.engine.adamw import adamw
from fd_scale.engine.layers import layer_groups
from fd_scale.engine.zero import Engine
from fd_scale.errors import RecipeError, RunError
from fd_scale.evaluate import accuracy, job, overlap
from fd_scale.evaluate.accuracy import Accuracy
from fd_scale.evaluate.augment import Mixer, randaug
from fd_scale.evaluate.classifier import Classifier, map_head
from fd_scale.evaluate.features import EvaluationError, check_classes, data_record
from fd_scale.evaluate.naming import reports_of
from fd_scale.evaluate.record import Record, over_seeds, table, write
from fd_scale.evaluate.start import NETWORK, Trainable, prepare
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise
from fd_scale.run import scale
from fd_scale.run.folder import environment
from fd_scale.run.scale import Resolved
from fd_scale.run.transfer import TransferRecipe
from fd_scale.run.world import World, launch
from fd_scale.student import recompute
from fd_scale.teachers import difference

log = logging.getLogger("fd_scale")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""By which FD's released code normalises the images that it measures on, whatever it trained with."""


def finetune(asked: Sequence[TransferRecipe], *, out: Path | None = None) -> None:
    """Run recipes that differ in their seeds, one after the other, and write one record of all, into ``out``
    or the reports of the network's run; ends the process and never returns.

    The same call goes on where a stopped one left off. For the exit status see ``training.run``.
    """

    def action(world: World) -> int:
        records = []
        for recipe in asked:
            done: list[FineTuning] = []
            status = training.drive(partial(_prepared, recipe, done), world)
            if not done[0].results:
                return status
            records.append(record_of(done[0]))
            job.going_on(world, recipe.steps)
        conclude(records, out or reports_of(asked[0].start.network), world)
        return 0

    launch(action)


def conclude(records: Sequence[Record], folder: Path, world: World) -> None:
    """Write the record of all seeds, show it, and say that nothing is left to do. Collective."""
    whole = over_seeds(records)
    path = world.on_main(lambda: write(whole, folder))
    log.info("%s", path)
    if world.is_main:
        Console(soft_wrap=True).print(table([whole]))
    job.done(world, max(int(record.facts["steps"]) for record in records))


def _prepared(recipe: TransferRecipe, done: list[FineTuning], world: World) -> training.Run:
    resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
    sets = open_sets(recipe, world)
    done.append(FineTuning(recipe, resolved, sets, world))
    return training.Run(recipe, done[0], sets.train, resolved, world)


class FineTuning:
    """A classifier in training; a ``training.Task``."""

    labels = True
    make_optimizer = staticmethod(adamw)

    def __init__(self, recipe: TransferRecipe, resolved: Resolved, sets: Sets, world: World) -> None:
        self.recipe, self.sets, self.world = recipe, sets, world
        self.begun = time.perf_counter()
        self.start = world.together(lambda: prepare(recipe.start))
        self.module = world.together(lambda: classifier(recipe, self.start, sets))
        recompute(self.module.network, resolved.activation_checkpointing, **resolved.granularity)
        if resolved.compile:
            compile_blocks(self.module.network)
        self.groups = groups_of(recipe, self.module)
        self.average_decay = recipe.optim.average_decay
        self.sizes = [self.start.input_size]
        self.train_pixels, self.test_pixels = normalisations(recipe, self.start)
        self.change = world.together(lambda: randaug(recipe.augment, self.train_pixels[0]))
        num_classes = self.module.head.out_features
        self.mixer = Mixer(recipe.augment, num_classes=num_classes, device=world.device)
        self.best: dict[str, float] = {}
        self.results: dict[str, Accuracy] = {}

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """Cross entropy with the soft labels of what was erased and mixed."""
        device = self.world.device
        pixels = training.on_device(batch, device)[self.start.input_size]
        labels = torch.as_tensor(batch.labels).to(device, non_blocking=True)
        valid = batch.valid.to(device, non_blocking=True)
        values = normalise(pixels, *self.train_pixels, torch.float32)
        values, soft_BC, valid = self.mixer(values, labels, valid)
        return soft_cross_entropy(engine(values), soft_BC, valid)

    def maps(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """The logits of the batch without augmentation."""
        pixels = training.on_device(batch, self.world.device)[self.start.input_size]
        return {"classifier": engine(normalise(pixels, *self.train_pixels, torch.float32))}

    @property
    def facts(self) -> dict[str, Any]:
        """The weights that it started from, the classes, and the best save so far."""
        return {"start": self.start.record, "classes": self.sets.classes, "best": self.best}

    def resume(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Take up the best save so far; raises ``RunError`` for another start or other classes."""
        if differences := difference(facts["start"], self.start.record):
            raise RunError(f"{checkpoint} started from another network: {'; '.join(differences)}")
        if facts["classes"] != self.facts["classes"]:
            raise RunError(f"{checkpoint} learnt other classes than those of the training shards now")
        self.best = dict(facts["best"])

    @property
    def keep_steps(self) -> tuple[int, ...]:
        """The best save."""
        return (int(self.best["step"]),) if self.best else ()

    def figures(self, run: training.Run, step: int) -> dict[str, float]:
        """Accuracy on the shards set aside, before every save and at the end."""
        due = step % run.recipe.run.save_every_steps == 0 or step == run.recipe.steps
        if self.sets.held_out is None or not due or step == 0:
            return {}
        found = self.measured(run, self.sets.held_out)
        if found.top1 > self.best.get("top1", -1.0):
            self.best = {"step": step, "top1": found.top1}
        return {"held_out_top1": found.top1, "held_out_best_top1": self.best["top1"]}

    def finish(self, run: training.Run) -> None:
        """Choose the weights as declared, and measure them on the test shards, if there are any."""
        if self.sets.test is None:
            log.info("data.test is not set: nothing was measured")
            return
        step = self.select(run)
        self.results = {"top1": self.measured(run, self.sets.test)}
        if run.engine.average is not None:
            self.results["top1_raw"] = self.measured(run, self.sets.test, raw=True)
        run.engine.move_to(run.recipe.steps)
        shown = ", ".join(f"{name} {100 * found.top1:.2f} %" for name, found in self.results.items())
        log.info("step %d on %d test images: %s", step, self.results["top1"].num_images, shown)

    def select(self, run: training.Run) -> int:
        """Put the declared weights into the engine; their step."""
        if self.recipe.measure.select == "last" or self.best["step"] == run.engine.step_number:
            return run.engine.step_number
        step = int(self.best["step"])
        saved = run.world.on_main(lambda: checkpoint.committed(run.folder.checkpoints))
        found = next((one for one in saved if one.step == step), None)
        if found is None:
            raise RunError(
                f"{run.folder.checkpoints} no longer holds step {step}, the best on held-out shards"
            )
        checkpoint.load(found, run.engine)
        return step

    def measured(self, run: training.Run, shards: ShardSet, *, raw: bool = False) -> Accuracy:
        """Accuracy of the averaged weights where there are any, and not ``raw``. Collective."""
        engine = run.engine
        if engine.average is not None and not raw:
            with engine.average.in_place():
                return self.measured(run, shards, raw=True)

        def predict(pixels: Tensor) -> Tensor:
            logits: Any = engine(normalise(pixels, *self.test_pixels, torch.float32))
            return logits

        engine.module.eval()
        try:
            return accuracy.measure(
                predict,
                shards,
                self.world,
                size=self.start.input_size,
                crop_pct=self.recipe.measure.crop_pct,
                batch=run.resolved.micro_batch,
                workers=self.recipe.run.workers,
                beat=run.beat,
            )
        finally:
            engine.module.train()


class Sets:
    """The shards of a run, opened and of the same classes. Raises ``EvaluationError`` where they are not, or
    do not name their classes."""

    def __init__(self, recipe: TransferRecipe) -> None:
        self.train = open_shards(recipe)
        self.test = None if recipe.data.test is None else ShardSet.open(Path(recipe.data.test))
        self.held_out = None if recipe.data.held_out is None else ShardSet.open(Path(recipe.data.held_out))
        for other in (self.test, self.held_out):
            if other is not None:
                check_classes(self.train, other)
        if self.train.classes is None:
            raise EvaluationError(
                "the training shards do not name their classes: pack images from one folder per class "
                "(fd-scale shards pack)"
            )
        self.classes = list(self.train.classes)
        if self.test and self.held_out and data_record(self.test) == data_record(self.held_out):
            raise RecipeError(
                "data.held_out is the test set: selecting by it would measure the selection. Set aside a "
                "part of the training images"
            )

    @property
    def records(self) -> dict[str, Any]:
        """What a record says of them."""
        named = {"train": self.train, "test": self.test, "held_out": self.held_out}
        return {name: data_record(shards) for name, shards in named.items() if shards is not None}


def open_sets(recipe: TransferRecipe, world: World) -> Sets:
    """The shards of a run; says so when images to measure on are among those to learn from. Collective."""
    sets = world.together(lambda: Sets(recipe))
    for other in (sets.test, sets.held_out):
        if other is not None and (words := world.on_main(partial(overlap.warning, sets.train, other))):
            log.warning("warning: %s", words)
    return sets


def classifier(recipe: TransferRecipe, start: Trainable, sets: Sets) -> Classifier:
    """The network with its head, whose random weights depend on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    module = Classifier(start, recipe.head, num_classes=len(sets.classes))
    if recipe.head.init == "mapped":
        found = map_head(module, start, sets.classes)
        log.info("head: %d of %d classes begin at rows of the start", found, len(sets.classes))
    module.freeze(stem=recipe.start.freeze_stem, blocks=recipe.start.freeze_blocks)
    return module


def groups_of(recipe: TransferRecipe, module: Classifier) -> list[dict[str, Any]]:
    """Its parameters by layer, with the recipe's decays."""
    optim = recipe.optim
    return layer_groups(
        module,
        backbone=NETWORK,
        layers=module.layers,
        layer_decay=optim.layer_decay,
        weight_decay=optim.weight_decay,
        decay_position=optim.decay_position,
        scaled_floor=recipe.scaled_floor,
    )


Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std of pixels, per colour."""


def normalisations(recipe: TransferRecipe, start: Trainable) -> tuple[Statistics, Statistics]:
    """How training and test images are normalised: both as the network's own were, or as the released
    code."""
    if recipe.compat.released_code:
        return (IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)
    return (start.mean, start.std), (start.mean, start.std)


def soft_cross_entropy(logits_BC: Tensor, soft_BC: Tensor, valid_B: Tensor) -> Tensor:
    """Mean over valid samples of the cross entropy with soft labels, in float32; 0 where none is valid."""
    losses_B = -(soft_BC * logits_BC.float().log_softmax(dim=1)).sum(dim=1)
    return torch.where(valid_B, losses_B, 0.0).sum() / valid_B.sum().clamp_min(1)


def protocol_of(recipe: TransferRecipe) -> dict[str, Any]:
    """All of a recipe that must be equal where two networks are compared."""
    science = recipe.science()
    for name in ("name", "seed", "data"):
        science.pop(name, None)
    start = {k: v for k, v in science.pop("start", {}).items() if k not in ("network", "step", "weights")}
    return science | {"start": start}


def record_of(task: FineTuning) -> Record:
    """The record of a finished fine-tuning."""
    recipe, start = task.recipe, task.start
    train, test = (
        {"mean": list(mean), "std": list(std)} for mean, std in (task.train_pixels, task.test_pixels)
    )
    groups = task.groups
    return Record(
        task=recipe.task,
        model=start.found.label,
        feature=recipe.head.feature,
        network=start.record,
        protocol=protocol_of(recipe),
        data=task.sets.records,
        metrics={name: [found.top1] for name, found in task.results.items()} | task.results["top1"].metrics,
        headline="top1",
        num_test=task.results["top1"].num_images,
        seeds=[recipe.seed],
        trained=True,
        facts={
            "effective_lr": {f"{g['name']}": recipe.optim.lr * g.get("lr_scale", 1.0) for g in groups},
            "steps": recipe.steps,
            "normalisation": {"train": train, "test": test},
            "num_left_out": task.results["top1"].num_left_out,
            "best": task.best,
        },
        environment=environment(),
        wall_s=time.perf_counter() - task.begun,
    )
