"""A step keeps the host ahead of the device: nothing in it reads a number, and nothing makes one to be sent.

On a CPU nothing ever waits, but what would is seen: operations that hand a number to Python, and those that
make a tensor of Python's numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import clock
from benchmarks.plan_cases import OFF, ZERO_1, Case
from fd_scale.data.reader import Batch
from fd_scale.distill import Distillation
from fd_scale.engine import ahead
from fd_scale.engine.zero import Engine
from fd_scale.meter import Meter
from fd_scale.run.world import World
from tests.spawn import spawn

BY_ITSELF = "zero2-bf16, as DeepSpeed steps in another version"

SETTINGS: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "zero0-fp32": ({"stage": 0}, False, {}),
    "zero0-bf16": ({"stage": 0}, True, {}),
    "zero1-fp32": ({"stage": 1}, False, {}),
    "zero1-bf16": (ZERO_1, True, {}),
    "zero2-fp32": ({"stage": 2}, False, {}),
    "zero2-bf16": ({"stage": 2}, True, {}),
    "zero3-fp32": ({"stage": 3}, False, {}),
    "zero3-bf16": ({"stage": 3}, True, {}),
    "zero3-fp32, loss in pieces": ({"stage": 3}, False, {"loss_chunk_tokens": 32}),
    BY_ITSELF: ({"stage": 2}, True, {}),
}


def waiting(world: World, folder: str) -> dict[str, list[str]]:
    """Where the host would wait in the third step of each, with a moving average and what a meter gathers."""
    found = {}
    known = ahead.READ_IN
    for name, (zero, bf16, own) in SETTINGS.items():
        ahead.READ_IN = () if name == BY_ITSELF else known
        case = Case("demo", "demo", OFF, 2, zero, bf16=bf16, more={"fd_scale": own})
        recipe, resolved = case.build(Path(folder), 1)
        task = Distillation(recipe, resolved, world)
        engine = Engine(task.module, recipe, resolved, world, average_decay=0.9)
        pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        batch = Batch({64: pixels}, torch.ones(2, dtype=torch.bool), ["a", "b"])
        if world.device.type == "cuda":
            batch = batch.pin_memory()
        meter = Meter(2)

        def step(
            task: Distillation = task, engine: Engine = engine, batch: Batch = batch, meter: Meter = meter
        ) -> None:
            loss = task.loss(engine, batch)
            outcome = engine.step(loss)
            meter.add(loss)
            assert outcome is not None
            meter.end_step(outcome)

        for _ in range(2):  # ZeRO-3 learns the order of its parameters, kernels are compiled
            step()
        found[name] = clock.waits(step, world.device.type)
    return found


def check(found: dict[str, list[str]]) -> None:
    assert len(found.pop(BY_ITSELF)) >= 4, "a count that sees nothing"
    assert {name: places for name, places in found.items() if places} == {}


@pytest.mark.slow
def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    (found,) = spawn(waiting, 1, str(tmp_path))
    check(found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs on a machine with a CUDA device")
def test_on_a_gpu_by_its_own_warnings(tmp_path: Path) -> None:
    (found,) = spawn(waiting, 1, str(tmp_path))
    check(found)


def test_numbers_that_are_read_or_sent_are_counted_with_their_place() -> None:
    values = torch.arange(3.0)

    def work() -> None:
        values.sum().item()
        bool(values.any())
        torch.tensor(2.0)

    places = clock.waits(work, "cpu")
    assert len(places) == 3
    assert all(Path(place.rpartition(":")[0]).name == "test_waits.py" for place in places)
