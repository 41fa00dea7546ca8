"""``fd_swinv2t`` by ZeRO-3 on two processes: a sharded teacher and recomputed blocks change no loss, and no
memory grows."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_scale.distill import load_teachers, seeded_student
from fd_scale.engine.zero import Engine
from fd_scale.objective.losses import Objective
from fd_scale.run import recipe as recipes
from fd_scale.run import recipes as named
from fd_scale.run import scale
from fd_scale.run.world import World, seed_step
from fd_scale.teachers import Guest
from fd_scale.teachers.sharded import placed
from tests.spawn import spawn
from tests.teachers.tiny import pixels

SIDE, GLOBAL_BATCH = 64, 4

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    # ZeRO stage, and what the scale turns on beside.
    "whole": (1, {}),
    "recomputed": (3, {"activation_checkpointing": {"every": 2, "stages": [2]}}),
    "in shares": (3, {"activation_checkpointing": True, "teacher": "shard"}),
}


def recipe(**changes: Any) -> recipes.Recipe:
    return recipes.derive(
        named.get("fd_swinv2t"),
        **{
            "student.input_size": SIDE,
            "teacher.input_size": SIDE,
            "teacher.weights": "random",
            "global_batch": GLOBAL_BATCH,
            "schedule.images": 100 * GLOBAL_BATCH,
            "schedule.warmup_images": 0,
            **changes,
        },
    )


class Trainer:
    """A run without data: pixels are drawn by step and rank."""

    def __init__(self, world: World, asked: recipes.Recipe, folder: str, way: str) -> None:
        stage, own = WAYS[way]
        zero = {
            "stage": stage,
            "reduce_bucket_size": 1_000_000,
            "stage3_prefetch_bucket_size": 1_000_000,
            "stage3_param_persistence_threshold": 10_000,
        }
        micro_batch = GLOBAL_BATCH // world.size
        values = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "zero_optimization": zero,
            "fd_scale": own,
        }
        path = Path(folder) / f"{way}-{world.rank}.json"
        path.write_text(json.dumps(values))
        resolved = scale.resolve(scale.load(str(path)), asked, world.size)
        teachers = load_teachers(asked, world.device, torch.float32)
        student = seeded_student(asked, teachers, resolved)
        self.world, self.asked, self.micro_batch = world, asked, micro_batch
        self.guests = [Guest(t, asked.objective) for t in placed(teachers, resolved, world)]
        self.engine = Engine(student, asked, resolved, world)
        self.objective = Objective(asked.objective)

    def step(self) -> float:
        number = self.engine.step_number
        seed_step(0, number, self.world.rank)
        side = self.asked.student.input_size
        seen = pixels(side, self.micro_batch, seed=2 * number + self.world.rank)
        taught = [guest({side: seen}) for guest in self.guests]
        valid = torch.ones(self.micro_batch, dtype=torch.bool)
        loss = self.objective(self.engine(seen), taught, valid)
        self.engine.step(loss)
        return float(self.world.mean(loss.detach()))


def losses(world: World, folder: str) -> dict[str, list[float]]:
    results = {}
    for way in WAYS:
        trainer = Trainer(world, recipe(), folder, way)
        results[way] = [trainer.step() for _ in range(3)]
        trainer.engine.deepspeed.destroy()
    return results


@pytest.mark.slow
def test_neither_shares_nor_recomputing_change_a_loss(tmp_path: Path) -> None:
    found, _ = spawn(losses, 2, str(tmp_path))
    assert found["whole"][2] < found["whole"][0]
    assert found["recomputed"] == found["in shares"]
    # Stage 1 sums gradients in other pieces than stage 3: float32 rounding, 6e-8 seen.
    assert found["whole"] == pytest.approx(found["in shares"], rel=1e-6)


def held_bytes() -> int:
    """All tensors that Python can reach."""
    gc.collect()
    found = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


def memory(world: World, folder: str, steps: int) -> list[int]:
    """Bytes held after 20 steps, and at the end."""
    network = {"architecture": "vit_micro_patch8", "input_size": 32}
    asked = recipe(
        **{
            "student": {**network, "arguments": {"depth": 1}},
            "teacher": {**network, "library": "models", "weights": "random", "arguments": {"depth": 1}},
            "schedule.images": steps * GLOBAL_BATCH,
        }
    )
    trainer = Trainer(world, asked, folder, "in shares")
    seen = []
    for number in range(steps):
        trainer.step()
        if number in (19, steps - 1):
            seen.append(held_bytes())
    return seen


@pytest.mark.slow
def test_no_memory_grows_with_both_in_shares(tmp_path: Path) -> None:
    for early, late in spawn(memory, 2, str(tmp_path), 300):
        assert early > 1_000_000
        assert late == early
