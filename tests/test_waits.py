"""A step keeps the host ahead of the device: nothing in it reads a number but the engine's one decision,
whether the gradient is finite.

On a CPU nothing ever waits, but what would is seen: the operations that hand a number to Python.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock
from benchmarks.plan_cases import OFF, ZERO_1, Case
from fd_scale.data.reader import Batch
from fd_scale.distill import Distillation
from fd_scale.engine.zero import Engine
from fd_scale.meter import Meter
from fd_scale.run.world import World
from tests.spawn import spawn

ON_CPU_ONLY = "torch/optim/optimizer.py"
"""Where AdamW reads its step count, which the fused form that runs on a GPU leaves on the device."""

SETTINGS: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "zero0-fp32": ({"stage": 0}, False, {}),
    "zero1-bf16": (ZERO_1, True, {}),
    "zero2-bf16": ({"stage": 2}, True, {}),
    "zero3-fp32": ({"stage": 3}, False, {}),
    "zero3-fp32, loss in pieces": ({"stage": 3}, False, {"loss_chunk_tokens": 32}),
}
IN_THE_STEP = {"zero0-fp32": 1, "zero1-bf16": 2, "zero2-bf16": 4}
"""At most so often an optimizer step reads a number, once where nothing is said: in DeepSpeed whether the
norm is finite (0.19.8 asks up to three times, and stage 2 looks for an overflow of its own); at stage 0 in
float32 it is ``engine.adamw`` that asks."""


def waiting(world: World, folder: str) -> dict[str, tuple[list[str], list[str]]]:
    """Where the host would wait, before the optimizer's step and in it, for the third step of each."""
    found = {}
    for name, (zero, bf16, own) in SETTINGS.items():
        case = Case("demo", "demo", OFF, 2, zero, bf16=bf16, more={"fd_scale": own})
        recipe, resolved = case.build(Path(folder), 1)
        task = Distillation(recipe, resolved, world)
        engine = Engine(task.module, recipe, resolved, world)
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        batch = Batch({64: pixels}, torch.ones(2, dtype=torch.bool), ["a", "b"])
        if world.device.type == "cuda":
            batch = batch.pin_memory()
        meter = Meter(2)
        for _ in range(2):  # ZeRO-3 learns the order of its parameters, kernels are compiled
            engine.step(task.loss(engine, batch))

        def before(
            task: Distillation = task, engine: Engine = engine, batch: Batch = batch, meter: Meter = meter
        ) -> None:
            loss = task.loss(engine, batch)
            engine.deepspeed.backward(loss)
            meter.add(loss)

        kind = world.device.type
        found[name] = (clock.waits(before, kind), clock.waits(engine.deepspeed.step, kind))
    return found


def check(found: dict[str, tuple[list[str], list[str]]]) -> None:
    for name, (before, step) in found.items():
        assert before == [], name
        asked = Counter(place for place in step if ON_CPU_ONLY not in place)
        assert asked.total() <= IN_THE_STEP.get(name, 1), (name, asked)


@pytest.mark.slow
def test_a_step_waits_for_one_decision(tmp_path: Path) -> None:
    (found,) = spawn(waiting, 1, str(tmp_path))
    assert found["zero0-fp32"][1], "a count that sees nothing"
    check(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA device")
def test_on_a_gpu_by_its_own_warnings(tmp_path: Path) -> None:
    (found,) = spawn(waiting, 1, str(tmp_path))
    check(found)


def test_numbers_that_are_read_are_counted_with_their_place() -> None:
    def work() -> None:
        values = torch.arange(3.0)
        values.sum().item()
        bool(values.any())

    places = clock.waits(work, "cpu")
    assert len(places) == 2
    assert all(Path(place.rpartition(":")[0]).name == "test_waits.py" for place in places)
