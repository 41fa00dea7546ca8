"""One small run, made as a user makes it, for all tests that need checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from fd_scale.data.pack import pack
from fd_scale.run.world import World
from tests.data.pictures import image_folder

CHANGES = {
    "student.arguments": {"embed_dim": 32, "depth": 3, "num_heads": 2},
    "student.input_size": 32,
    "teacher.weights": "random",
    "teacher.input_size": 32,
    "teacher.arguments": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "schedule.images": 48,
    "schedule.warmup_images": 8,
    "global_batch": 8,
    "optim.average_decay": 0.8,
    "run.log_every_steps": 1,
    "run.save_every_steps": 2,
    "run.keep_last": 3,
}
STEPS = 6


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty labelled pictures of three classes, in shards of 7."""
    folder = tmp_path_factory.mktemp("pictures")
    pack(image_folder(folder / "images", 40, classes=3), folder / "shards", max_count=7)
    return folder / "shards"


@pytest.fixture(scope="session")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of 6 steps, with checkpoints of steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("runs")
    scale = root / "scale.json"
    scale.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 0}}))
    asked = CHANGES | {"data.shards": shards, "run.root": root, "scale": scale}
    command = [sys.executable, "-m", "fd_scale", "distill", "--recipe", "demo"]
    command += [word for key, value in asked.items() for word in ("--set", f"{key}={value}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = root.glob("demo-*")
    return folder


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A world of one process with a process group."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # Set first, so that what World.start writes there is taken back.
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    found = World.start()
    yield found
    dist.destroy_process_group()
