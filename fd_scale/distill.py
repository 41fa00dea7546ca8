"""The loop, and how a run is put together around it.

A step: every teacher and the student see the same crop; the student's projected map is compared with each
teacher's whitened map; the engine steps. What a run is asked is the recipe's, how it fits is the scale's,
where it lies is the folder's, and how it goes on after a stop is the checkpoint's.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from fd_scale.compiled import compile_blocks
from fd_scale.data import color
from fd_scale.data.loader import TrainLoader
from fd_scale.data.plan import Plan
from fd_scale.data.reader import Batch
from fd_scale.data.sets import open_together, plan_of
from fd_scale.engine import checkpoint, saving
from fd_scale.engine.zero import Engine, StepOutcome
from fd_scale.errors import RunError, UserError
from fd_scale.export import export
from fd_scale.objective.losses import Objective
from fd_scale.run import scale
from fd_scale.run.folder import RunFolder, environment
from fd_scale.run.lease import Lease
from fd_scale.run.recipe import Recipe
from fd_scale.run.report import Reporter
from fd_scale.run.scale import Resolved
from fd_scale.run.state import announce
from fd_scale.run.watchdog import Watchdog
from fd_scale.run.world import StopRequest, World, seed_step
from fd_scale.student import Student, build_student
from fd_scale.teachers import FrozenTeacher, Guest, Teacher, difference, load
from fd_scale.teachers.sharded import placed

log = logging.getLogger("fd_scale")


def distill(recipe: Recipe) -> None:
    """Run a recipe to its end, going on from its newest checkpoint; ends the process and never returns.

    Exit status 0: all images were seen and the student exported, or SIGUSR2 (a scheduler's warning) stopped
    it with everything saved. 128 + n: signal n did. 2: wrong input. 1: anything else, with a traceback.
    """
    world = World.start()
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    run: Run | None = None
    try:
        run = Run(recipe, world)
        status = run.go()
    except UserError as error:
        # Every rank says so before it leaves: the first one to leave may be the last that is left alive.
        announce(f"FAILED {error}", None if run is None else run.folder.path)
        if world.is_main:
            log.error("error: %s", error)
        status = 2
    except Exception:
        log.exception("rank %d failed", world.rank)
        status = 1
    if run is not None:
        run.give_back()
    world.leave(status)


class Run:
    """Everything of one run on this process: networks, data, engine, folder."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.resolved = scale.resolve(scale.load(recipe.scale), recipe, world.size)
        self.shards = open_together(recipe, world)
        self.plan = plan_of(recipe, self.shards)
        self.folder = world.on_main(lambda: RunFolder.open(recipe.run.root, recipe))
        dtype = torch.bfloat16 if self.resolved.bf16 else torch.float32
        teachers = world.together(lambda: load_teachers(recipe, world.device, dtype))
        self.teachers = placed(teachers, self.resolved, world)
        self.guests = [Guest(teacher, recipe.objective) for teacher in self.teachers]
        self.objective = Objective(recipe.objective)
        student = world.together(lambda: seeded_student(recipe, self.teachers, self.resolved))
        self.sizes = sorted({student.input_size, *(teacher.input_size for teacher in self.teachers)})
        self.student_size = student.input_size
        self.engine = Engine(student, recipe, self.resolved, world)
        self.started_at = 0
        # Last, for nothing was written so far, and a start that fails on its input has nothing to give back.
        self.lease = Lease(self.folder.path)
        world.on_main(lambda: self.lease.take(log.warning))

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must know beside the weights: whose features, whose images."""
        return {
            "recipe": self.recipe.fingerprint,
            "teacher": self.teachers[0].fingerprint,
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
        seed_step(self.recipe.seed, self.engine.step_number, self.world.rank)
        received = 0
        for batch in meter.waiting(iter(loader)):
            loss = self.losses(batch)
            outcome = self.engine.step(loss)
            meter.add(loss)
            watchdog.beat(f"step {self.engine.step_number}")
            if outcome is None:
                continue
            self.after_step(outcome, meter, reporter, loader, saver)
            received = stop.poll()
            if received:
                break
        loader.settle(self.world.gather)
        return stop.close() or received

    def losses(self, batch: Batch) -> Tensor:
        """The method: one crop for all, the teachers' maps as they are, the student's prediction, their
        distance."""
        pixels = self.pixels(batch)
        valid = batch.valid.to(self.world.device, non_blocking=True)
        taught = [guest(pixels) for guest in self.guests]
        predicted = self.engine(pixels[self.student_size])
        return self.objective(predicted, taught, valid)

    def pixels(self, batch: Batch) -> dict[int, Tensor]:
        """The views on this rank's device, in the colours that were drawn for them."""
        device = self.world.device
        views = {size: tensor.to(device, non_blocking=True) for size, tensor in batch.pixels.items()}
        if batch.colors is None:
            return views
        colors = batch.colors.to(device, non_blocking=True)
        return {size: color.apply(view, colors) for size, view in views.items()}

    def after_step(
        self,
        outcome: StepOutcome,
        meter: Meter,
        reporter: Reporter,
        loader: TrainLoader,
        saver: saving.Saver,
    ) -> None:
        """What happens between two optimizer steps: a new seed, a log line, a checkpoint, a look at skipped
        steps."""
        step, habits = self.engine.step_number, self.recipe.run
        seed_step(self.recipe.seed, step, self.world.rank)
        meter.end_step(outcome)
        if self.engine.skipped_in_a_row >= habits.max_nonfinite_steps:
            raise RunError(self.explain_nonfinite(step - 1))
        if step % habits.log_every_steps == 0 or step == self.recipe.steps:
            bad = loader.settle(self.world.gather).bad
            reporter.log(step, meter.read(self.world) | {"bad_samples": float(bad)})
            self.world.together(saver.check)
        if step % habits.save_every_steps == 0 and step < self.recipe.steps:
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
            self.sizes,
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
            pin_memory=self.world.device.type == "cuda",
        )

    def resume(self) -> int | None:
        """Load the newest whole checkpoint, unless teacher or data are other ones than it was made with; its
        step, or None."""
        folder = self.folder.checkpoints
        found = checkpoint.newest(folder, self.world, log.warning)
        if found is None:
            return None
        if differences := difference(found.facts["teacher"], self.teachers[0].fingerprint):
            raise RunError(f"{found.path} was made with another teacher: {'; '.join(differences)}")
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
            saving.retain(folder, keep_last=habits.keep_last, keep_every_steps=habits.keep_every_steps)
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
            lambda: self.folder.new_start(self.resolved.ds_config, facts | {"world_size": self.world.size})
        )
        limit_s = self.recipe.run.watchdog_s
        return Watchdog(record / "stacks", limit_s, rank=self.world.rank, world_size=self.world.size)

    def finish(self) -> int:
        """Export the student of the last step."""
        written = self.world.on_main(lambda: export(self.folder.path))
        log.info("student: %s", written.weights)
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

    @torch.no_grad()
    def explain_nonfinite(self, step: int) -> str:
        """Which network and which samples made step ``step`` not finite, found by running it once more.
        Collective."""
        culprits: dict[str, list[str]] = {}
        for batch in self.loader(step, step + 1):
            pixels = self.pixels(batch)
            maps = {
                f"teacher {t.name}": guest(pixels)
                for t, guest in zip(self.teachers, self.guests, strict=True)
            }
            maps["student"] = self.engine(pixels[self.student_size])[0]
            for name, tokens in maps.items():
                bad = ~torch.isfinite(tokens.flatten(1)).all(1)
                culprits.setdefault(name, []).extend(
                    k for k, wrong in zip(batch.keys, bad.tolist(), strict=True) if wrong
                )
        everywhere = (pair for ranks in self.world.gather(culprits) for pair in ranks.items())
        found = [f"{name} on {', '.join(keys[:8])}" for name, keys in everywhere if keys]
        seen = "; ".join(found) or "only the gradient, all features are finite"
        return (
            f"loss or gradient was not finite for {self.recipe.run.max_nonfinite_steps} steps in a row, the "
            f"last one step {step}; not finite there: {seen}. Lower optim.lr, look at these samples, or try "
            "another precision; the last checkpoint is intact"
        )


@dataclass
class Meter:
    """Sums on the device between two log lines, so that no step waits for a number."""

    global_batch: int
    steps: int = 0
    skipped: int = 0
    wait_s: float = 0.0
    stall_s: float = 0.0
    since: float = field(default_factory=time.perf_counter)
    losses: list[Tensor] = field(default_factory=list)
    outcome: StepOutcome | None = None

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for them added up."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Note the time for which training stands still to save."""
        begin = time.perf_counter()
        yield
        self.stall_s += time.perf_counter() - begin

    def add(self, loss: Tensor) -> None:
        """Note the loss of a micro-batch."""
        self.losses.append(loss.detach())

    def end_step(self, outcome: StepOutcome) -> None:
        """Note the end of an optimizer step."""
        self.steps += 1
        self.skipped += not outcome.applied
        self.outcome = outcome

    def read(self, world: World) -> dict[str, float]:
        """Global figures since the last reading, units in the names; starts anew. Collective, and the one
        sync."""
        loss = float(world.mean(torch.stack(self.losses).mean()))
        elapsed = time.perf_counter() - self.since
        figures = {
            "loss": loss,
            "lr": self.outcome.lr if self.outcome else float("nan"),
            "grad_norm": float(self.outcome.grad_norm) if self.outcome else float("nan"),
            "images_per_s": self.steps * self.global_batch / elapsed,
            "data_wait_share": self.wait_s / elapsed,
            "memory_gib": memory_gib(world.device),
            "checkpoint_stall_s": self.stall_s,
            "skipped_steps": float(self.skipped),
        }
        self.steps, self.skipped, self.wait_s, self.stall_s, self.losses = 0, 0, 0.0, 0.0, []
        self.since = time.perf_counter()
        return figures


def memory_gib(device: torch.device) -> float:
    """Peak memory of the device's allocator, or the resident memory of a CPU process, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def load_teachers(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> list[FrozenTeacher]:
    """The recipe's frozen teachers on their device."""
    return [load(recipe.teacher, device=device, dtype=dtype, seed=recipe.seed)]


def seeded_student(recipe: Recipe, teachers: Sequence[Teacher], resolved: Resolved) -> Student:
    """The student with random weights that depend on the recipe's seed alone, hence equal on every rank."""
    torch.manual_seed(recipe.seed)
    student = build_student(recipe, teachers)
    student.set_grad_checkpointing(resolved.activation_checkpointing, **resolved.granularity)
    if resolved.compile:
        compile_blocks(student.backbone)
    return student
