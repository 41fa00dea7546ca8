"""Two processes that share the images give what one gives, to 1e-6: all questions, heads and landscapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fd_scale.data.index import ShardSet
from fd_scale.diagnose import tasks
from fd_scale.diagnose.images import Images
from fd_scale.diagnose.landscape import Grid, measure
from fd_scale.diagnose.parts import Parts
from fd_scale.run.world import World
from tests.diagnose.test_survey import assert_equal, surveyed
from tests.diagnose.tiny import SMALL, timm_subject
from tests.spawn import spawn

GRID = Grid(points=3, directions=2)


def everything(world: World, shards: Path, parts: Path) -> dict[str, Any]:
    subject = timm_subject("vit_tiny_patch16_224", **SMALL)
    images = Images(ShardSet.open(shards), 11, batch=4 - world.size)
    batches = list(images.batches(32, world))
    labelled = Images(images.shards, 40, batch=4)
    data = tasks.fit_head(subject, labelled, 8, world)
    landscapes = [
        measure(task, pixels, GRID, world, Parts(parts)).curves
        for task, pixels in (
            (tasks.shift(subject, batches, {}), batches),
            (tasks.head(subject, data, {}), data.batches),
        )
    ]
    return {
        "surveys": {name: surveyed(name, 4 - world.size, world).record() for name in ("vit", "swin")},
        "landscapes": {f"{n}/{name}": v for n, curves in enumerate(landscapes) for name, v in curves.items()},
        "head": data.classifier.weight,
    }


def test_two_processes_find_what_one_finds(shards: Path, world: World, tmp_path: Path) -> None:
    one, two = spawn(everything, 2, shards, tmp_path / "two")
    alone = everything(world, shards, tmp_path / "one")
    assert_equal(one, two)
    # The head is a fit to its optimum, whose tolerance is 1e-7 of the gradient; landscapes are built on it.
    torch.testing.assert_close(one.pop("head"), alone.pop("head"), rtol=0, atol=1e-5)
    assert_equal(alone, one)
