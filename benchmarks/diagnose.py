"""How long does a diagnosis take? The survey of many images by one network, and the whole command on a run.

    python -m benchmarks.diagnose [--network vit_base_patch16_224] [--images N] [--run RUN]

Survey: every question about attention and tokens, eigenvalues at the end included, of random weights and
random pixels that lie in memory, so that reading and decoding do not count; set against the plain forward
pass of the same images. By default 50,000 images on a GPU, the papers' number, in bfloat16 autocast and in
float32, and 16 on a CPU, in float32. With ``--run``, the wall and processor time of ``fd-scale diagnose RUN``
in a process of its own as well, into a new folder, so that nothing is found finished.
Writes results/diagnose-DEVICE.json.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from fd_scale.diagnose.anatomy import Anatomy, anatomy
from fd_scale.diagnose.subjects import Subject, load_pair
from fd_scale.diagnose.survey import survey
from fd_scale.run.world import Place, World

IMAGES = {"cuda": 50_000, "cpu": 16}
BATCH = {"cuda": 64, "cpu": 8}
PRECISIONS = {"cuda": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}


def measure(network: str, num_images: int | None) -> dict[str, Any]:
    """Rows by precision."""
    world = World(Place(0, 1, 0, "single process"))
    kind = world.device.type
    subject = load_pair(f"timm:{network}@random", None, device=world.device).subject
    found = anatomy(subject)
    count = IMAGES[kind] if num_images is None else num_images
    rows = [_row(subject, found, world, count, dtype) for dtype in PRECISIONS[kind]]
    return {"network": network, "device": kind, "num_images": count, "batch": BATCH[kind], "results": rows}


def batches(subject: Subject, count: int) -> Iterator[Tensor]:
    """One and the same random batch on the device, until there were ``count`` images."""
    device, side = subject.backbone.device, subject.backbone.input_size
    pixels = torch.randint(0, 256, (BATCH[device.type], 3, side, side), dtype=torch.uint8, device=device)
    for first in range(0, count, len(pixels)):
        yield pixels[: count - first]


def whole_command(run: Path) -> dict[str, Any]:
    """Wall and processor seconds of the command on a run."""
    with tempfile.TemporaryDirectory(prefix="fd-diagnose-") as folder:
        command = [sys.executable, "-m", "fd_scale", "diagnose", str(run), "--out", folder]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall_s, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "run": run.resolve().name,
        "shown": done.stdout.splitlines()[0],
        "wall_s": round(wall_s, 1),
        "processor_s": round(busy_s, 1),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average_at_the_end": round(os.getloadavg()[0], 1),
    }


def _row(subject: Subject, found: Anatomy, world: World, count: int, dtype: torch.dtype) -> dict[str, Any]:
    def plain() -> None:
        for pixels in batches(subject, count):
            subject.backbone.tokens(pixels)

    def surveyed() -> None:
        survey(subject, found, batches(subject, count), world)

    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        survey(subject, found, batches(subject, BATCH[world.device.type]), world)
        (forward_s, forward_busy_s), (survey_s, survey_busy_s) = (
            _seconds(work, world) for work in (plain, surveyed)
        )
    row = {
        "precision": str(dtype).removeprefix("torch."),
        "forward_s": round(forward_s, 2),
        "forward_processor_s": round(forward_busy_s, 2),
        "survey_s": round(survey_s, 2),
        "survey_processor_s": round(survey_busy_s, 2),
        "survey_images_per_s": round(count / survey_s, 2),
    }
    if world.device.type == "cuda":
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def _seconds(work: Callable[[], None], world: World) -> tuple[float, float]:
    """By the wall, and of this process's processors, which tell of a busy machine."""
    begin, busy = time.perf_counter(), time.process_time()
    work()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="vit_base_patch16_224", help="an architecture of timm")
    parser.add_argument("--images", type=int, help="of the survey")
    parser.add_argument("--run", type=Path, help="a run directory to time the whole command on")
    asked = parser.parse_args()
    results = measure(asked.network, asked.images)
    if asked.run is not None:
        results["whole_command"] = whole_command(asked.run)
    print(results)
    print(record.write(f"diagnose-{results['device']}", results))


if __name__ == "__main__":
    main()
