"""The real program on the cluster: the shipped template, a small recipe, what can be read off its runs."""

from __future__ import annotations

import collections
import itertools
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image
from torch import Tensor

from fd_scale.data.pack import pack
from tests.cluster.cluster import Cluster, Job

REPOSITORY = Path(__file__).parents[2]
BATCH = 32
NOTING = shlex.join([sys.executable, str(Path(__file__).with_name("noting.py"))])
SMALL = {
    "student.architecture": "swinv2_micro",
    "student.input_size": 64,
    "student.drop_path": 0.0,
    "teacher.architecture": "swinv2_micro",
    "teacher.weights": "random",
    "teacher.input_size": 64,
    "teacher.arguments": {},
    "schedule.warmup_images": 2 * BATCH,
    "global_batch": BATCH,
    "scale": "cpu",
    "run.workers": 0,
    "run.log_every_steps": 1,
}


def draw_shards(folder: Path, num_images: int) -> Path:
    """Small JPEG pictures of smooth noise in shards of fifty; returns the folder of the shards."""
    images = folder / "images"
    images.mkdir()
    draw = np.random.default_rng(0)
    for index in range(num_images):
        coarse = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((72, 60), Image.Resampling.BICUBIC).save(images / f"{index:05d}.jpg", quality=90)
    pack(images, folder / "shards", max_count=50)
    return folder / "shards"


def submit(
    cluster: Cluster,
    folder: Path,
    recipe: dict[str, Any],
    *options: str,
    nodes: int = 2,
    program: str = NOTING,
    **environment: str,
) -> Job:
    """``sbatch slurm/fd_swinv2g.sbatch`` in ``folder``: ``SMALL`` with ``recipe`` on top, one rank a node."""
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    asked = SMALL | {"run.root": folder / "runs"} | recipe
    environment = {
        "FD_SCALE_SET": shlex.join(f"{key}={value}" for key, value in asked.items()),
        "FD_SCALE_PYTHON": sys.executable,
        "FD_SCALE_EXEC": program,
        "PYTHONPATH": str(REPOSITORY),
        **environment,
    }
    size = [f"--nodes={nodes}", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1"]
    return cluster.submit(folder, *size, *options, "slurm/fd_swinv2g.sbatch", environment=environment)


def run_of(folder: Path) -> Path:
    """The one run directory below ``folder``."""
    (run,) = (folder / "runs").glob("*-*")
    return run


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every logged step."""
    rows = map(json.loads, (run_of(folder) / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def rows_seen(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """What the ranks noted, as pairs of rank and row; a line that a kill cut off is left out."""
    found = []
    for path in sorted(folder.glob("seen-*.jsonl")):
        rank = int(path.stem.removeprefix("seen-"))
        for line in path.read_text().splitlines():
            try:
                found.append((rank, json.loads(line)))
            except json.JSONDecodeError:
                continue
    return found


def seen(folder: Path, *, last_start_only: bool = False) -> dict[int, dict[int, list[str]]]:
    """The keys of every step, by rank. A step that was made twice has too many, unless only its last start
    counts."""
    rows = rows_seen(folder)
    last: dict[int, int] = {}
    for _, row in rows:
        last[row["step"]] = max(last.get(row["step"], 0), row["start"])
    steps: dict[int, dict[int, list[str]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for rank, row in rows:
        if not last_start_only or row["start"] == last[row["step"]]:
            steps[row["step"]][rank] += row["keys"]
    return steps


def of_all_ranks(keys: dict[int, list[str]]) -> list[str]:
    """The keys of a step, sorted: which rank saw them depends on how many there are."""
    return sorted(itertools.chain.from_iterable(keys.values()))


def student(folder: Path) -> dict[str, Tensor]:
    """The exported weights."""
    (weights,) = (run_of(folder) / "exports").glob("*.safetensors")
    return safetensors.torch.load_file(weights)


def starts(folder: Path) -> list[list[str]]:
    """The lines of the record of starts as words, without the time."""
    (path,) = folder.glob("*.starts")
    return [line.split()[1:] for line in path.read_text().splitlines()]
