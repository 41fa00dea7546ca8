"""Ranks that join a real process group under job.sh, step until asked to stop, and write what they found."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from fd_scale.run.world import StopRequest, World


def main() -> None:
    torch.set_num_threads(1)
    world = World.start()
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    request = StopRequest()
    mean = world.mean(torch.tensor(float(world.rank))).item()
    place = [world.rank, world.local_rank, world.launcher, os.environ["SLURMD_NODENAME"]]
    found = {"pid": os.getpid(), "mean": mean, "places": world.gather(place)}
    Path(f"joined-{start}-{world.rank}.json").write_text(json.dumps(found))

    step = 0
    while not (said := request.poll()):
        time.sleep(0.02)
        step += 1
    request.close()
    Path(f"stopped-{start}-{world.rank}.json").write_text(json.dumps({"step": step, "said": said}))
    if world.is_main:
        Path(os.environ["FD_SCALE_STATE"]).write_text(
            f"PREEMPTED step={step} from=0\n" if start == 0 else "DONE\n"
        )
    world.leave(0)


if __name__ == "__main__":
    main()
