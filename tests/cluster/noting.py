"""The real program, which also notes what every rank saw, and stands still where a test wants to meet it.

    PAUSES="4 8" noting.py python -m fd_scale distill ...

Every rank writes the keys of each micro-batch, with step and start, to ``seen-RANK.jsonl`` in the folder of
the submission. Before the steps named in PAUSES it waits until it is asked to stop; nothing else is changed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fd_scale import cli, distill
from fd_scale.run.world import StopRequest

PAUSES = [int(step) for step in os.environ.get("PAUSES", "").split()]
SEEN = Path(f"seen-{os.environ['SLURM_PROCID']}.jsonl").absolute()


class Noting(distill.Run):
    """A run that notes its batches before it uses them."""

    request: StopRequest

    def train(self, stop: StopRequest, *arguments: Any) -> int:
        self.request = stop
        return super().train(stop, *arguments)

    def losses(self, batch: Any) -> Any:
        step = self.engine.step_number
        with SEEN.open("a") as file:
            start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            row = {"start": start, "step": step, "time": time.time(), "keys": batch.keys}
            file.write(json.dumps(row) + "\n")
        if step in PAUSES:
            print(f"pausing before step {step}", flush=True)
            while not self.request._received:
                time.sleep(0.05)
        return super().losses(batch)


if __name__ == "__main__":
    distill.Run = Noting  # type: ignore[misc]
    sys.argv[1:] = sys.argv[4:]  # without the interpreter, -m and the package
    cli.main()
