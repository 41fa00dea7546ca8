"""Stands in for the training program where a test is about the job script: it keeps the protocol, no more.

    STANDIN="stop:0:40 crash:40:60 done" standin.py COMMAND...

Each start of the job plays the next word. ``stop:F:S`` waits to be asked, then has saved step S after it
began at F; ``hang:F:S`` hears nothing; ``crash:F:S`` loses rank 1; ``failed`` gives a reason; ``done`` is
finished at once. Every rank writes what it saw to ``events-RANK.jsonl`` in the folder of the submission.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

RANK = int(os.environ["SLURM_PROCID"])
START = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + int(os.environ.get("SLURM_ARRAY_TASK_ID", "1")) - 1
SHOWN = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_LOCALID",
    "SLURM_CPUS_PER_TASK",
    "SLURMD_NODENAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "OMP_NUM_THREADS",
)


def note(**event: object) -> None:
    with Path(f"events-{RANK}.jsonl").open("a") as file:
        file.write(json.dumps({"start": START, **event}) + "\n")


def write_state(text: str) -> None:
    state = Path(os.environ["FD_SCALE_STATE"])
    partial = state.with_suffix(f".{RANK}")
    partial.write_text(f"{text}\n")
    partial.replace(state)


def main() -> None:
    ending, *steps = os.environ["STANDIN"].split()[START].split(":")
    asked: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        note(signal=signal.Signals(number).name)

    signal.signal(signal.SIGUSR2, hear)
    signal.signal(signal.SIGTERM, hear)
    begun = f"step={steps[1]} from={steps[0]}" if steps else ""
    if steps:
        write_state(f"RUNNING {begun}")
    note(argv=sys.argv[1:], environment={name: os.environ.get(name) for name in SHOWN})
    print("ready", flush=True)
    if ending == "crash":
        time.sleep(0.5)  # the other has written its state too
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if ending == "failed":
        write_state("FAILED loss is not finite: 10 steps in a row")
        sys.exit(2)
    if ending == "done":
        write_state("DONE step=100")
        return
    while ending != "stop" or not asked:
        time.sleep(0.05)
    write_state(f"PREEMPTED {begun}")


if __name__ == "__main__":
    main()
