"""A small distillation problem with known answers: the engine under test, and a plain loop beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from fd_scale.engine import checkpoint, saving
from fd_scale.engine.fragments import ADAM, fragments, inner_optimizer, steps_taken
from fd_scale.engine.zero import Engine
from fd_scale.meter import Meter
from fd_scale.objective import whitened_smooth_l1
from fd_scale.run import recipe as recipes
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe
from fd_scale.run.world import World, seed_step

GLOBAL_BATCH = 8
TOKENS, WIDTH = 17, 24


@dataclass(frozen=True)
class Setting:
    """One way to run the same ten steps."""

    stage: int
    bf16: bool = False
    micro_batch: int = 4
    activation_checkpointing: bool = False
    drop_path: float = 0.0
    clip_norm: float | None = 0.05
    steps: int = 10
    option: str = ""
    """A key of ``OPTIONS``."""

    def label(self) -> str:
        precision = "bf16" if self.bf16 else "fp32"
        marks = "-ckpt" * self.activation_checkpointing + f"-{self.option}" * bool(self.option)
        return f"zero{self.stage}-{precision}-micro{self.micro_batch}{marks}"


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "optimizer on the host": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    "all on the host": {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    },
    "two-level": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    "wide sums": {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"},
}
"""What scales may turn on beside the stage."""


def recipe(setting: Setting) -> Recipe:
    return recipes.build(
        {
            "name": "problem",
            "student": {"architecture": "vit_micro_patch8", "drop_path": setting.drop_path},
            "teacher": {"library": "timm", "architecture": "none", "weights": "random"},
            "optim": {"lr": 2e-3, "clip_norm": setting.clip_norm},
            "schedule": {
                "images": GLOBAL_BATCH * 20,
                "warmup_images": GLOBAL_BATCH * 3,
                "warmup_lr": 1e-4,
                "min_lr": 1e-5,
            },
            "global_batch": GLOBAL_BATCH,
            "seed": 5,
            "scale": "problem",
        }
    )


class Network(nn.Module):
    """A ViT with a shared relative position table, and a projector."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = models.create(
            "vit_micro_patch8", input_size=32, drop_path=setting.drop_path, depth=2, embed_dim=32, num_heads=2
        )
        self.projector = nn.Linear(32, WIDTH)
        if setting.activation_checkpointing:
            self.backbone.set_grad_checkpointing()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projector(self.backbone(pixels.to(self.projector.weight.dtype)))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Pixels (8, 3, 32, 32) and teacher tokens (8, 17, 24) of one global batch."""
    generator = torch.Generator().manual_seed(1000 + step)
    pixels = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    return pixels, torch.randn(GLOBAL_BATCH, TOKENS, WIDTH, generator=generator) * 3 + 1


def make_engine(world: World, setting: Setting, folder: str) -> tuple[Engine, scale.Resolved]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": setting.micro_batch,
        "zero_optimization": {"stage": setting.stage, "reduce_bucket_size": 1_000_000},
        "bf16": {"enabled": setting.bf16},
        "fd_scale": {"activation_checkpointing": setting.activation_checkpointing},
    }
    if setting.stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    for key, value in OPTIONS[setting.option].items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    path = Path(folder) / f"{setting.label()}-{world.rank}.json"
    path.write_text(json.dumps(config))
    asked = recipe(setting)
    resolved = scale.resolve(scale.load(str(path)), asked, world.size)
    return Engine(Network(setting), asked, resolved, world), resolved


def advance(
    engine: Engine,
    resolved: scale.Resolved,
    world: World,
    stop: int,
    poison: int | None = None,
    meter: Meter | None = None,
) -> dict[str, Any]:
    """Step the engine up to ``stop``; global losses, norms and applied flags per step."""
    history: dict[str, Any] = {"loss": [], "norm": [], "applied": []}
    share = GLOBAL_BATCH // world.size
    while engine.step_number < stop:
        step = engine.step_number
        pixels, taught = batch(step)
        if step == poison:
            taught[0, 0, 0] = math.nan
        seed_step(5, step, world.rank)
        losses, outcome = [], None
        for index in range(resolved.accumulation):
            low = world.rank * share + index * resolved.micro_batch
            rows = slice(low, low + resolved.micro_batch)
            loss = whitened_smooth_l1(engine(pixels[rows]), taught[rows])
            losses.append(loss.detach())
            outcome = engine.step(loss)
        assert outcome is not None
        if meter is not None:
            meter.add(losses[-1])
            meter.end_step(outcome)
        history["loss"].append(float(world.mean(torch.stack(losses).mean())))
        history["norm"].append(float(outcome.grad_norm))
        history["applied"].append(bool(outcome.applied))
    return history


def run_settings(world: World, settings: list[Setting], folder: str) -> dict[str, Any]:
    """The history of each setting, on a fresh engine."""
    results = {}
    for setting in settings:
        engine, resolved = make_engine(world, setting, folder)
        results[setting.label()] = advance(engine, resolved, world, setting.steps)
        engine.deepspeed.destroy()
    return results


def plain(setting: Setting) -> dict[str, list[float]]:
    """The same steps by torch.optim.AdamW on the whole batch, float32, one process: written to be obvious."""
    network, asked = Network(replace(setting, activation_checkpointing=False)), recipe(setting)
    decayed = [p for n, p in network.named_parameters() if p.ndim > 1 and n != "backbone.cls_token"]
    rest = [p for n, p in network.named_parameters() if p.ndim == 1 or n == "backbone.cls_token"]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=0.0, eps=1e-8
    )
    losses, norms = [], []
    for step in range(setting.steps):
        rate = 1e-4 + (2e-3 - 1e-4) * step / 3
        if step >= 3:
            rate = 1e-5 + (2e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * (step - 3) / 17))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, taught = batch(step)
        target = torch.nn.functional.layer_norm(taught, (WIDTH,))
        loss = torch.nn.functional.smooth_l1_loss(network(pixels), target, beta=2.0)
        optimizer.zero_grad()
        loss.backward()
        limit = asked.optim.clip_norm or math.inf
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), limit)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"loss": losses, "norm": norms}


def interrupted(world: World, settings: list[Setting], folder: str, stop: int) -> dict[str, Any]:
    """Per setting: the history of a run that saved at ``stop``, and that of a fresh engine from there."""
    results = {}
    for setting in settings:
        root = Path(folder) / setting.label()
        engine, resolved = make_engine(world, setting, folder)
        whole = advance(engine, resolved, world, stop)
        saving.save(root, engine, world, {"of": setting.label()})
        rest = advance(engine, resolved, world, setting.steps)
        engine.deepspeed.destroy()
        whole = {name: values + rest[name] for name, values in whole.items()}
        results[setting.label()] = {"whole": whole, "resumed": resume(world, setting, folder, str(root))}
    return results


def resume(world: World, setting: Setting, folder: str, root: str) -> dict[str, Any]:
    """Load the newest checkpoint under ``root`` into a fresh engine and finish."""
    warnings: list[str] = []
    found = checkpoint.newest(Path(root), world, warnings.append)
    assert found is not None
    engine, resolved = make_engine(world, setting, folder)
    checkpoint.load(found, engine)
    start = engine.step_number
    history = advance(engine, resolved, world, setting.steps)
    groups = engine.deepspeed.basic_optimizer.param_groups
    engine.deepspeed.destroy()
    return history | {
        "start": start,
        "warnings": warnings,
        "decays": sorted({g["weight_decay"] for g in groups}),
    }


def resume_many(world: World, pairs: list[tuple[Setting, str]], folder: str) -> dict[str, Any]:
    """Every setting from the root that stands beside it."""
    return {(setting.label(), root): resume(world, setting, folder, root) for setting, root in pairs}


def poisoned(world: World, settings: list[Setting], folder: str) -> dict[str, Any]:
    """A NaN in the teacher at step 2, on the first rank's part of the batch; all that this rank holds before
    and after that step, and what a meter says of all steps."""
    results = {}
    for setting in settings:
        engine, resolved = make_engine(world, setting, folder)
        meter = Meter(GLOBAL_BATCH)
        advance(engine, resolved, world, 2, meter=meter)
        before = held(engine)
        skipped = advance(engine, resolved, world, 3, poison=2, meter=meter)
        after = held(engine)
        later = advance(engine, resolved, world, 6, meter=meter)
        results[setting.label()] = {
            "applied": skipped["applied"] + later["applied"],
            "held": len(before),
            "untouched": all(torch.equal(before[name], after[name]) for name in before | after),
            "reported": meter.read(world)["skipped_steps"],
            "loss": later["loss"],
            "adam_steps": steps_taken(engine.deepspeed),
        }
        engine.deepspeed.destroy()
    return results


def held(engine: Engine) -> dict[str, Tensor]:
    """Copies of this rank's part of weights, moments, step counts, and of the module's parameters."""
    state = inner_optimizer(engine.deepspeed).state
    found = {}
    for fragment in fragments(engine.deepspeed):
        found[f"master/{fragment.name}"] = fragment.of(fragment.buffer).clone()
        found[f"step/{fragment.name}"] = state[fragment.buffer]["step"].clone()
        for key in ADAM:
            found[f"{key}/{fragment.name}"] = fragment.of(state[fragment.buffer][key]).clone()
    for name, parameter in engine.module.named_parameters():
        found[f"parameter/{name}"] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    return found


def several(world: World, calls: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """What several functions return, one after the other in one group: its imports cost more than they do."""
    return [function(world, *arguments) for function, arguments in calls]
