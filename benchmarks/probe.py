"""What does it cost to ask "is it learning?" in the middle of a run?

A short distillation of the recipe ``demo`` with a probe runs through the command line; the share
is the time of one probe over that of the steps between two at the recipe's own interval. A probe shows its
images once to student and teacher, so that larger batches and longer intervals only lower the share.

    python -m benchmarks.probe [--images 1000] [--steps 24]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import write
from fd_scale.data.scenes import write_scenes
from fd_scale.run import recipes

SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=1000, help="labelled images of the probe")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of the trial")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(write("probe", measured(Path(folder), asked.images, asked.steps)))


def measured(folder: Path, images: int, steps: int) -> dict[str, Any]:
    """Seconds of a probe and of a step, and what share of the run the probes are."""
    recipe = recipes.get("demo")
    write_scenes(folder / "train", num_images=512, size=SIDE, seed=0)
    write_scenes(folder / "probe", num_images=images, size=SIDE, seed=1)
    changes = {
        "data.shards": folder / "train",
        "teacher.weights": "random",
        "schedule.images": steps * recipe.global_batch,
        "schedule.warmup_images": 0,
        "run.root": folder / "runs",
        "run.log_every_steps": 4,
        "run.probe": folder / "probe",
        "run.probe_every_steps": steps // 2,
    }
    command = [sys.executable, "-m", "fd_scale", "distill", "--recipe", "demo"]
    command += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (metrics,) = (folder / "runs").glob("*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    # The first probe also asks the teacher for its own yardstick, and the first steps warm up.
    probe_s = [row["probe_s"] for row in rows if "probe_s" in row and row["step"] > 0]
    speeds = [row["images_per_s"] for row in rows if row["step"] > 4 and "probe_s" not in row]
    step_s = recipe.global_batch / statistics.median(speeds)
    every = recipe.run.probe_every_steps
    return {
        "recipe": "demo, random teacher, float32, CPU",
        "probe_images": images,
        "global_batch": recipe.global_batch,
        "probe_every_steps": every,
        "probe_s": probe_s,
        "step_s": step_s,
        "share_of_the_run": statistics.median(probe_s) / (statistics.median(probe_s) + every * step_s),
    }


if __name__ == "__main__":
    main()
