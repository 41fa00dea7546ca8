"""Several networks in training at once, each on the same batches: one forward pass of a teacher serves all.

Loss, optimizer and schedule are the product's; here is the loop around them for data that lies in memory, and
the time that each learner would have taken alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fd_scale.engine.adamw import adamw
from fd_scale.engine.optim import parameter_groups
from fd_scale.engine.schedule import learning_rate
from fd_scale.errors import RunError
from fd_scale.run.recipe import RunRecipe

TIMED_EVERY = 16
"""Steps of which one is timed: on a GPU a timed step waits for the device."""
LOSSES_KEPT = 64
"""Points of a recorded loss curve."""

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds of work on a device: of this thread's processor, or by the wall on a GPU."""

    device: torch.device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


@dataclass
class Learner:
    """A module in training by its own recipe; ``loss`` is of what the loop hands to all."""

    name: str
    recipe: RunRecipe
    module: nn.Module
    loss: Callable[[Any], Tensor]
    groups: list[dict[str, Any]] | None = None
    after_step: Callable[[], None] = lambda: None
    optimizer: torch.optim.Optimizer = field(init=False)
    timed_s: float = 0.0
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        optim = self.recipe.optim
        groups = self.groups or parameter_groups(
            self.module, weight_decay=optim.weight_decay, decay_position=optim.decay_position
        )
        self.optimizer = adamw(groups, optim, clip_here=True)
        self.module.train()

    def step(self, shared: Any, number: int) -> Tensor:
        """One optimizer step; the loss before it."""
        schedule = self.recipe.schedule
        for group in self.optimizer.param_groups:
            floor = group.get("floor_scale", 1.0)
            group["lr"] = learning_rate(
                number,
                steps=self.recipe.steps,
                warmup_steps=self.recipe.warmup_steps,
                peak=self.recipe.optim.lr * group.get("lr_scale", 1.0),
                warmup_lr=schedule.warmup_lr * floor,
                min_lr=schedule.min_lr * floor,
            )
        loss = self.loss(shared)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()
        return loss.detach()


@dataclass(frozen=True)
class Course:
    """What a loop over learners came to."""

    seconds: dict[str, float]
    """Of each learner, as if it had been alone: its own steps and what all share."""
    losses: dict[str, list[float]]
    """Points of the curve, evenly spaced, the last step among them."""


def run(
    learners: list[Learner],
    batches: Iterable[T],
    share: Callable[[T], Any],
    *,
    steps: int,
    device: torch.device,
    title: str,
) -> Course:
    """Take ``steps`` steps with all learners; ``share`` makes of a batch what their losses are given.

    Raises ``RunError`` for a loss that is not finite at a point of the curve.
    """
    clock, shared_s, timed = Clock(device), 0.0, 0
    points = {round(place * (steps - 1) / (LOSSES_KEPT - 1)) for place in range(LOSSES_KEPT)}
    feed = iter(batches)
    for number in shown(range(steps), title, steps):
        with autocast(device):
            timing = number % TIMED_EVERY == 0 and (number > 0 or steps <= TIMED_EVERY)
            begin = clock() if timing else 0.0
            shared = share(next(feed))
            if timing:
                shared_s += clock() - begin
                timed += 1
            for learner in learners:
                begin = clock() if timing else 0.0
                loss = learner.step(shared, number)
                if timing:
                    learner.timed_s += clock() - begin
                if number in points:
                    learner.losses.append(_finite(loss, learner.name, number))
    whole = steps / max(timed, 1)
    return Course(
        seconds={one.name: whole * (shared_s + one.timed_s) for one in learners},
        losses={one.name: one.losses for one in learners},
    )


def autocast(device: torch.device) -> Any:
    """bfloat16 on a GPU; on a processor, which may have no fast bfloat16, float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def shown(numbers: Iterable[int], title: str, total: int) -> Iterator[int]:
    """The numbers, with a bar on a terminal; elsewhere what was finished is told by whoever finished it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(numbers, total=total, description=title)


def _finite(loss: Tensor, name: str, number: int) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise RunError(
            f"the loss of {name} is {value} at step {number}: lower its lr in the study's settings"
        )
    return value
