"""The engine: a student under DeepSpeed ZeRO 0 to 3, in bf16 or fp32, stepped by the loop.

The engine owns averaging over ranks and accumulation, clipping, the optimizer and the learning rate of each
step. Teachers never enter it. Randomness, data and saving are the loop's; see ``checkpoint.py`` for the
latter.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fd_scale.engine.adamw import MakeOptimizer, adamw, reset_steps
from fd_scale.engine.ahead import keep_ahead
from fd_scale.engine.average import Average
from fd_scale.engine.norm import is_finite
from fd_scale.engine.optim import parameter_groups
from fd_scale.engine.schedule import learning_rate
from fd_scale.run.recipe import RunRecipe
from fd_scale.run.scale import FIXED, MICRO_BATCH, Resolved
from fd_scale.run.world import World

log = logging.getLogger("fd_scale")


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step came to; its tensors are scalars on the device, and to read one is to wait."""

    step: int
    """Its number, from 0."""
    lr: float
    """The learning rate that it had."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping; nan when the step was skipped."""
    applied: Tensor
    """False when a gradient was not finite and nothing was changed."""


class Engine:
    """A module in training. ``engine(pixels)`` is its forward pass; ``engine.step(loss)`` the rest.

    ``step`` counts optimizer steps of the run, applied or skipped: it is the position in the data and the
    schedule. ``groups`` are parameter groups by another rule than ``engine.optim``'s; ``average_decay`` is of
    a moving average of the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: RunRecipe,
        resolved: Resolved,
        world: World,
        *,
        groups: list[dict[str, Any]] | None = None,
        make_optimizer: MakeOptimizer = adamw,
        average_decay: float | None = None,
        start_step: int = 0,
    ) -> None:
        self.recipe = recipe
        self.step_number = start_step
        self._device = world.device
        groups = groups or parameter_groups(
            module, weight_decay=recipe.optim.weight_decay, decay_position=recipe.optim.decay_position
        )
        self.group_facts = [(group["name"], len(group["params"]), group["weight_decay"]) for group in groups]
        if resolved.bf16:
            _round_constants(module)
        whole = resolved.zero_stage == 0
        optimizer = make_optimizer(groups, recipe.optim, clip_here=whole)
        config = dict(resolved.ds_config)
        if whole:
            config["gradient_clipping"] = 0.0
        self.deepspeed = _initialize(module, optimizer, config, world)
        reset_steps(optimizer)
        if (slower := keep_ahead(self.deepspeed)) and world.is_main:
            log.warning("%s", slower)
        self.average = None if average_decay is None else Average(self.deepspeed, average_decay)
        self._set_learning_rate()

    def __call__(self, pixels: Any, **more: Any) -> Any:
        return self.deepspeed(pixels, **more)

    @property
    def module(self) -> nn.Module:
        """The student, for its buffers and names; its parameters may be sharded away."""
        return self.deepspeed.module

    @property
    def lr(self) -> float:
        """Learning rate of the step under way, of groups that do not scale it."""
        return self.lr_of({})

    def lr_of(self, group: Mapping[str, Any]) -> float:
        """Learning rate of the step under way, of a group with its ``lr_scale`` and ``floor_scale``."""
        schedule, floor_scale = self.recipe.schedule, group.get("floor_scale", 1.0)
        return learning_rate(
            self.step_number,
            steps=self.recipe.steps,
            warmup_steps=self.recipe.warmup_steps,
            peak=self.recipe.optim.lr * group.get("lr_scale", 1.0),
            warmup_lr=schedule.warmup_lr * floor_scale,
            min_lr=schedule.min_lr * floor_scale,
        )

    def step(self, loss: Tensor) -> StepOutcome | None:
        """Backward of one micro-batch; the optimizer step after the last one of the global batch.

        ``loss`` is the mean over this rank's micro-batch. Returns None between optimizer steps. A gradient
        that is not finite on any rank leaves weights and moments untouched on all of them, and the step
        counts as skipped. Nothing here waits for the device (``ahead.py`` says where it cannot be helped).
        """
        boundary = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.backward(loss)
        self.deepspeed.step()
        if not boundary:
            return None
        # A Python number where DeepSpeed found on the host that the gradient was not finite.
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self._device)
        applied = is_finite(norm)
        if self.average is not None:
            self.average.update(applied)
        outcome = StepOutcome(self.step_number, self.lr, norm.masked_fill(~applied, torch.nan), applied)
        self.move_to(self.step_number + 1)
        return outcome

    def move_to(self, step: int) -> None:
        """Make ``step`` the next optimizer step, with its learning rate."""
        self.step_number = step
        self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = self.lr_of(group)


def shard_frozen(module: nn.Module, world: World, *, bf16: bool) -> nn.Module:
    """The module with its parameters sharded over all processes, for forward passes without gradients.

    An engine of its own without an optimizer (ZeRO-3), beside the student's: each layer is gathered when it
    is called and let go after, and so are parameters that a module takes from another one. Every call is
    therefore collective. ``module`` must be whole on its device.
    """
    config = {
        MICRO_BATCH: 1,
        **FIXED,
        "bf16": {"enabled": bf16},
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            # Nothing is used twice in a pass, so that nothing is worth keeping.
            "stage3_max_reuse_distance": 0,
        },
    }
    return _initialize(module, None, config, world)


def _round_constants(module: nn.Module) -> None:
    """Bring what a network computes with beside its parameters (Swin V2's offsets, rotary tables) to bf16.

    DeepSpeed casts parameters alone, and a product of the two has no dtype. Buffers that are saved are
    statistics, of a batch norm say, and stay in float32.
    """
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            buffer = getattr(part, name)
            if buffer is not None and buffer.is_floating_point():
                setattr(part, name, buffer.bfloat16())


def _initialize(
    module: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], world: World
) -> Any:
    # DeepSpeed picks its accelerator once, at import; on a machine whose GPU is hidden it must not look for
    # one.
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Its chatter is one line per rank and setting; what goes wrong still comes through.
    for chatty in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On a CPU it would compile this operator for inference at the first start, a minute of g++ under a lock
    # that a killed process leaves behind for ever. Training never calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine
