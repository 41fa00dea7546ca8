"""The loop, and how a run is put together around it.

A step: a micro-batch, the task's loss, and the engine steps. What is learnt is the task's, what a run is
asked is the recipe's, how it fits is the scale's, where it lies is the folder's, and how it goes on after a
stop is the checkpoint's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fd_scale.data import color
from fd_scale.data.index import ShardSet
from fd_scale.data.loader import Change, TrainLoader
from fd_scale.data.plan import Plan
from fd_scale.data.reader import Batch
from fd_scale.data.sets import plan_of
from fd_scale.engine import checkpoint, saving
from fd_scale.engine.adamw import MakeOptimizer
from fd_scale.engine.zero import Engine, StepOutcome
from fd_scale.errors import RunError, UserError
from fd_scale.meter import Meter, Row
from fd_scale.run.folder import RunFolder, environment
from fd_scale.run.lease import Lease
from fd_scale.run.recipe import RunRecipe
from fd_scale.run.report import Reporter
from fd_scale.run.scale import Resolved
from fd_scale.run.state import announce
from fd_scale.run.watchdog import Watchdog
from fd_scale.run.world import StopRequest, World, launch, seed_step

log = logging.getLogger("fd_scale")


def run(prepare: Callable[[World], Run]) -> None:
    """Run what ``prepare`` puts together to its end, going on from its newest checkpoint; ends the process
    and never returns.

    Exit status 0: all images were seen and the task concluded, or SIGUSR2 (a scheduler's warning) stopped it
    with everything saved. 128 + n: signal n did. 2: wrong input. 1: anything else, with a traceback.
    """
    launch(lambda world: drive(prepare, world))


def drive(prepare: Callable[[World], Run], world: World) -> int:
    """As ``run``, within a process that goes on; the exit status, or the error that is 2 or 1."""
    started: Run | None = None
    try:
        started = prepare(world)
        return started.go()
    except UserError as error:
        # Every rank says so before it leaves: the first one to leave may be the last that is left alive.
        announce(f"FAILED {error}", None if started is None else started.folder.path)
        raise
    finally:
        if started is not None:
            started.give_back()


class Task(Protocol):
    """What is learnt: the part of a run that differs between distillation, fine-tuning and a probe."""

    @property
    def module(self) -> nn.Module:
        """What the engine trains; the run hands it over."""

    @property
    def groups(self) -> list[dict[str, Any]] | None:
        """Parameter groups of ``module``; None for those of ``engine.optim``."""

    @property
    def make_optimizer(self) -> MakeOptimizer:
        """Builds the optimizer."""

    @property
    def average_decay(self) -> float | None:
        """Decay of a moving average of the weights, or None for none."""

    @property
    def sizes(self) -> Sequence[int]:
        """Sides of the views that a batch must hold, pixels."""

    @property
    def labels(self) -> bool:
        """Whether a batch must hold labels."""

    @property
    def change(self) -> Change | None:
        """What is done to the views of every sample where they are decoded."""

    @property
    def keep_steps(self) -> Collection[int]:
        """Steps whose checkpoints are not let go of."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know of the task: frozen networks by their fingerprints, and the like."""

    def resume(self, facts: Mapping[str, Any], checkpoint: Path) -> None:
        """Go on from these facts; raises ``RunError`` when the checkpoint is not of this task."""

    def loss(self, engine: Engine, batch: Batch) -> Tensor:
        """The mean loss of this rank's micro-batch, a scalar with a gradient."""

    def maps(self, engine: Engine, batch: Batch) -> dict[str, Tensor]:
        """What the networks give for a batch, (B, ...) by name: where to look for what is not finite."""

    def figures(self, run: Run, step: int) -> dict[str, float]:
        """What is measured when ``step`` steps are done, to be logged; nothing at most steps. Collective.

        What takes long calls ``run.beat`` as it goes on, lest it be taken for a hang.
        """

    def finish(self, run: Run) -> None:
        """What is done once, after the last step was saved. Collective."""


class Run:
    """Everything of one run on this process: task, data, engine, folder."""

    def __init__(
        self, recipe: RunRecipe, task: Task, shards: ShardSet, resolved: Resolved, world: World
    ) -> None:
        self.recipe, self.task, self.shards, self.resolved, self.world = recipe, task, shards, resolved, world
        self.plan = plan_of(recipe, shards)
        self.folder = world.on_main(lambda: RunFolder.open(recipe.run.root, recipe))
        self.engine = Engine(
            task.module,
            recipe,
            resolved,
            world,
            groups=task.groups,
            make_optimizer=task.make_optimizer,
            average_decay=task.average_decay,
        )
        self.started_at = 0
        self.beat: Callable[[str], None] = _nobody_watches
        # Last, for nothing was written so far, and a start that fails on its input has nothing to give back.
        self.lease = Lease(self.folder.path)
        world.on_main(lambda: self.lease.take(log.warning))

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know beside the weights: of the task, and whose images."""
        return {
            "recipe": self.recipe.fingerprint,
            **self.task.facts,
            "data": self.plan.state(self.engine.step_number),
        }

    def go(self) -> int:
        """Resume, train, save, export; the exit status."""
        saver = self.saver(self.resume())
        self.started_at = self.engine.step_number
        if self.engine.step_number >= self.recipe.steps:
            log.info("%s is finished: %d steps", self.folder.path, self.engine.step_number)
            return self.finish()
        self.announce("RUNNING")
        watchdog = self.watchdog()
        self.beat = watchdog.beat
        stop = StopRequest()
        reporter = Reporter(
            self.folder,
            self.recipe,
            enabled=self.world.is_main,
            total_steps=self.recipe.steps,
            start_step=self.engine.step_number,
        )
        try:
            received = self.train(stop, reporter, saver, watchdog)
        finally:
            reporter.close()
        watchdog.beat("the last step")
        saver.save(self.engine, self.facts)
        saver.wait()
        watchdog.stop()
        self.beat = _nobody_watches
        if received and self.engine.step_number < self.recipe.steps:
            name = signal.Signals(received).name
            log.info(
                "stopped by %s at step %d; the same command goes on from here", name, self.engine.step_number
            )
            self.announce("PREEMPTED")
            return 0 if received == signal.SIGUSR2 else 128 + received
        return self.finish()

    def train(self, stop: StopRequest, reporter: Reporter, saver: saving.Saver, watchdog: Watchdog) -> int:
        """Steps until the end or a signal; returns the signal's number, or 0."""
        meter = Meter(self.recipe.global_batch)
        loader = self.loader(self.engine.step_number)
        if self.engine.step_number == 0 and (found := self.task.figures(self, 0)):
            reporter.log(0, found)
        seed_step(self.recipe.seed, self.engine.step_number, self.world.rank)
        received, begin = 0, time.perf_counter()
        for batch in meter.waiting(iter(loader)):
            loss = self.task.loss(self.engine, batch)
            outcome = self.engine.step(loss)
            meter.add(loss)
            watchdog.beat(f"step {self.engine.step_number}")
            if outcome is None:
                continue
            if self.resolved.compile and outcome.step == self.started_at:
                log.info("compiled within the first step, of %.0f s", time.perf_counter() - begin)
            self.after_step(outcome, meter, reporter, loader, saver)
            received = stop.poll()
            if received:
                break
        loader.settle(self.world.gather)
        return stop.close() or received

    def after_step(
        self,
        outcome: StepOutcome,
        meter: Meter,
        reporter: Reporter,
        loader: TrainLoader,
        saver: saving.Saver,
    ) -> None:
        """What happens between two optimizer steps: a new seed, a log line, a checkpoint, and where one of
        those waits for the device, a look at skipped steps."""
        step, habits = self.engine.step_number, self.recipe.run
        seed_step(self.recipe.seed, step, self.world.rank)
        meter.end_step(outcome)
        logs = step % habits.log_every_steps == 0 or step == self.recipe.steps
        saves = step % habits.save_every_steps == 0 and step < self.recipe.steps
        if logs or saves:
            self.check_skipped(meter.settle())
        found = self.task.figures(self, step)
        if logs:
            bad = loader.settle(self.world.gather).bad
            reporter.log(step, meter.read(self.world) | {"bad_samples": float(bad)} | found)
            self.world.together(saver.check)
        elif found:
            reporter.log(step, found)
        if saves:
            loader.settle(self.world.gather)
            with meter.stalled():
                saver.save(self.engine, self.facts)

    def loader(self, start_step: int, stop_step: int | None = None) -> TrainLoader:
        """Micro-batches of this rank from ``start_step`` on, up to the end of the run or before
        ``stop_step``."""
        return TrainLoader(
            self.shards,
            self.plan,
            self.recipe.view,
            self.task.sizes,
            rank=self.world.rank,
            world_size=self.world.size,
            micro_batch=self.resolved.micro_batch,
            accumulation=self.resolved.accumulation,
            start_step=start_step,
            stop_step=self.recipe.steps if stop_step is None else stop_step,
            workers=self.recipe.run.workers,
            decoder=self.recipe.run.decoder,
            max_bad_fraction=self.recipe.data.max_bad_fraction,
            max_bad_shards=self.recipe.data.max_bad_shards,
            quarantine_path=self.folder.quarantine,
            labels=self.task.labels,
            change=self.task.change,
            pin_memory=self.world.device.type == "cuda",
        )

    def resume(self) -> int | None:
        """Load the newest whole checkpoint, unless task or data are other ones than it was made with; its
        step, or None."""
        folder = self.folder.checkpoints
        found = checkpoint.newest(folder, self.world, log.warning)
        if found is None:
            return None
        self.task.resume(found.facts, found.path)
        self.plan = self.resumed_plan(found.facts["data"])
        checkpoint.load(found, self.engine)
        self.world.on_main(lambda: checkpoint.set_aside(folder, after=found.step))
        log.info("going on from step %d of %d in %s", found.step, self.recipe.steps, self.folder.path)
        return found.step

    def resumed_plan(self, state: Mapping[str, Any]) -> Plan:
        """The plan to go on with; a data set that has changed is taken up only if the recipe says so."""
        plan = self.plan.resumed(state, on_change=self.recipe.data.on_change)
        if changed := self.plan.differences(state):
            log.warning("the data set has changed (%s): taken from its next epoch on", ", ".join(changed))
        return plan

    def saver(self, resumed_at: int | None) -> saving.Saver:
        """What saves the checkpoints, and lets go of old ones once a new one stands."""
        habits, folder = self.recipe.run, self.folder.checkpoints

        def committed(step: int) -> None:
            saving.retain(
                folder,
                keep_last=habits.keep_last,
                keep_every_steps=habits.keep_every_steps,
                keep=self.task.keep_steps,
            )
            self.announce("RUNNING", step)

        return saving.Saver(
            folder,
            self.world,
            background=habits.async_save,
            last_step=resumed_at,
            before_commit=self.lease.check,
            committed=committed,
            stage=self.world.together(saving.stage),
        )

    def watchdog(self) -> Watchdog:
        """Record this start, and watch over its steps from now on."""
        facts = environment() if self.world.is_main else {}
        record = self.world.on_main(
            lambda: self.folder.new_start(
                self.resolved.ds_config,
                facts | {"world_size": self.world.size, "fd_scale": self.resolved.own},
            )
        )
        limit_s = self.recipe.run.watchdog_s
        return Watchdog(record / "stacks", limit_s, rank=self.world.rank, world_size=self.world.size)

    def finish(self) -> int:
        """Let the task conclude."""
        self.task.finish(self)
        if self.world.is_main:
            announce(f"DONE step={self.engine.step_number}", self.folder.path)
        return 0

    def announce(self, word: str, step: int | None = None) -> None:
        """Say how the run stands, with a step that is saved (that of the engine by default) and the one this
        start began from."""
        if self.world.is_main:
            saved = self.engine.step_number if step is None else step
            announce(f"{word} step={saved} from={self.started_at}", self.folder.path)

    def give_back(self) -> None:
        """Let the next start have the run directory at once."""
        if self.world.is_main:
            self.lease.give_back()

    def check_skipped(self, row: Row) -> None:
        """Raise ``RunError`` where so many steps in a row changed nothing that the run is to end; then
        collective."""
        if row.length >= self.recipe.run.max_nonfinite_steps:
            raise RunError(self.explain_nonfinite(row))

    @torch.no_grad()
    def explain_nonfinite(self, row: Row) -> str:
        """Which network and which samples made the last step of a row not finite, found by running it once
        more. Collective."""
        culprits: dict[str, list[str]] = {}
        for batch in self.loader(row.last, row.last + 1):
            for name, values in self.task.maps(self.engine, batch).items():
                bad = ~torch.isfinite(values.flatten(1)).all(1)
                culprits.setdefault(name, []).extend(
                    k for k, wrong in zip(batch.keys, bad.tolist(), strict=True) if wrong
                )
        everywhere = (pair for ranks in self.world.gather(culprits) for pair in ranks.items())
        found = [f"{name} on {', '.join(keys[:8])}" for name, keys in everywhere if keys]
        seen = "; ".join(found) or "only the gradient, all features are finite"
        return (
            f"loss or gradient was not finite for {row.length} steps in a row, the last one step {row.last}; "
            f"not finite there: {seen}. Lower optim.lr, look at these samples, or try another precision; the "
            "last checkpoint is intact"
        )


def _nobody_watches(where: str) -> None:
    """``Run.beat`` before and after the steps."""


def on_device(batch: Batch, device: torch.device) -> dict[int, Tensor]:
    """The views of a batch on a device, by size, in the colours that were drawn for them."""
    views = {size: tensor.to(device, non_blocking=True) for size, tensor in batch.pixels.items()}
    if batch.colors is None:
        return views
    colors = batch.colors.to(device, non_blocking=True)
    return {size: color.apply(view, colors) for size, view in views.items()}
