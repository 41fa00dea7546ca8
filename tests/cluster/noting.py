"""The real program, which also notes what every rank saw, and stands still where a test wants to meet it.

    PAUSES="0:4 1:6:save" noting.py python -m fd_scale distill ...

Every rank writes the keys of each micro-batch, with step and start, to ``seen-RANK.jsonl`` in the folder of
the submission. Start 0 of the job waits before step 4 until it is asked to stop; start 1 waits while it saves
step 6, all files written and the commit to come, until it is killed. Nothing else is changed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fd_scale import cli, training
from fd_scale.engine.saving import Saver
from fd_scale.run.world import StopRequest

START = os.environ.get("SLURM_RESTART_COUNT", "0")
PAUSES = os.environ.get("PAUSES", "").split()
SEEN = Path(f"seen-{os.environ['SLURM_PROCID']}.jsonl").absolute()


class Noting(training.Run):
    """A run that notes its batches before it uses them."""

    request: StopRequest

    def train(self, stop: StopRequest, *arguments: Any) -> int:
        self.request, self.inner = stop, self.task.loss
        self.task.loss = self.loss  # type: ignore[method-assign]
        return super().train(stop, *arguments)

    def loss(self, engine: Any, batch: Any) -> Any:
        step = self.engine.step_number
        with SEEN.open("a") as file:
            row = {"start": int(START), "step": step, "time": time.time(), "keys": batch.keys}
            file.write(json.dumps(row) + "\n")
        if f"{START}:{step}" in PAUSES:
            print(f"pausing before step {step}", flush=True)
            while not self.request._received:
                time.sleep(0.05)
        return self.inner(engine, batch)

    def saver(self, resumed_at: int | None) -> Saver:
        saver = super().saver(resumed_at)
        saver._before_commit = self.before_commit
        return saver

    def before_commit(self) -> None:
        (partial,) = self.folder.checkpoints.glob("*.partial")
        step = int(partial.stem.removeprefix("step-"))
        if f"{START}:{step}:save" in PAUSES:
            print(f"pausing while step {step} is saved", flush=True)
            time.sleep(3600)
        self.lease.check()


if __name__ == "__main__":
    training.Run = Noting  # type: ignore[misc]
    sys.argv[1:] = sys.argv[4:]  # without the interpreter, -m and the package
    cli.main()
