"""For how long does a save keep the training waiting, beside it and in it?

    python -m benchmarks.saving [--architecture vit_base_patch16] [--saves 8]

One process trains a student under ZeRO-3 on random pictures, and saves in turn in the background and
blocking, each save after ``--steps`` steps and once the one before it stands. The stall is the time for which
the loop stands still; of a background save also the time until it stands is given. Both are of the same run,
on the same disk, so that their ratio is what counts. Writes results/saving-DEVICE.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models
from benchmarks import record
from fd_scale.engine import saving
from fd_scale.engine.zero import Engine
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import derive
from fd_scale.run.world import World


class Student(nn.Module):
    """A backbone, and the mean of its tokens as loss: what is learned does not matter here."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.backbone = models.create(architecture)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return self.backbone(pixels_BCHW.to(dtype)).float().square().mean()


def measure(architecture: str, num_saves: int, num_steps: int, root: Path) -> dict[str, Any]:
    """Stalls in seconds of ``num_saves`` pairs of saves."""
    world = World.start()
    recipe = derive(recipes.get("fd_clip_vitb16"), **{"global_batch": 2, "scale": "cpu"})
    config = root / "scale.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}')
    engine = Engine(Student(architecture), recipe, scale.resolve(scale.load(str(config)), recipe, 1), world)
    savers = {
        name: saving.Saver(
            root / name,
            world,
            background=name == "background",
            last_step=None,
            before_commit=lambda: None,
            committed=lambda step, folder=root / name: _keep_one(folder),  # type: ignore[misc]
        )
        for name in ("background", "blocking")
    }
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    whole_s = []
    pixels = torch.randn(2, 3, 224, 224, device=world.device)
    for _ in range(num_saves + 1):  # the first pair warms up
        for name, saver in savers.items():
            for _ in range(num_steps):
                engine.step(engine(pixels))
            _synchronize(world)
            begin = time.perf_counter()
            saver.save(engine, {})
            stalls[name].append(time.perf_counter() - begin)
            saver.wait()
            if name == "background":
                whole_s.append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(stalls["background"][1:], stalls["blocking"][1:], strict=True)]
    return {
        "architecture": architecture,
        "device": world.device.type,
        "million_parameters": round(sum(p.ds_numel for p in engine.module.parameters()) / 1e6, 1),
        "stall_s": {name: _summary(seconds[1:]) for name, seconds in stalls.items()},
        "background_save_stands_after_s": _summary(whole_s[1:]),
        "ratio": _summary(ratios),
    }


def _keep_one(folder: Path) -> None:
    saving.retain(folder, keep_last=1, keep_every_steps=None)


def _synchronize(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="vit_base_patch16")
    parser.add_argument("--saves", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fd-saving-") as folder:
        results = measure(asked.architecture, asked.saves, asked.steps, Path(folder))
    print(results)
    print(record.write(f"saving-{results['device']}", results))


if __name__ == "__main__":
    main()
