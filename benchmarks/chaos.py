"""Does a run survive what a cluster does to it, and what does that cost?

    python -m benchmarks.chaos [--faults 20]     writes results/chaos.json; about 45 s per fault on two cores

A Slurm of two nodes is started on this machine (tests/cluster; Debian's packages, and root for the small file
system), and the shipped template is submitted twice with a small recipe, ZeRO-3 over both nodes. One run is
left alone. The other meets one fault after the other, in an order drawn from the seed, each after it has
saved something since the last one; job.sh alone brings it back. Measured per fault:

    steps_redone          steps begun at the fault that the next start began again
    seconds_to_recover    from the fault to the first batch of the next start: Slurm's wait, start, resume

and at the end whether every sample of every step was seen as in the run that was left alone, and whether the
final weights are the same bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import record
from fd_scale.engine.checkpoint import committed
from tests.cluster.cluster import Cluster, Job, absent, wait_until
from tests.cluster.program import (
    BATCH,
    curve,
    draw_shards,
    of_all_ranks,
    rows_seen,
    run_of,
    seen,
    student,
    submit,
)

STEPS_PER_FAULT = 6
SMALL_DISK_MIB = 256
PATIENCE_S = 300.0
"""Longest wait for a start to get on: many times what one takes."""


@dataclass(frozen=True)
class Target:
    """A running job, its folder, and where its checkpoints lie."""

    job: Job
    folder: Path
    draw: random.Random

    @property
    def checkpoints(self) -> Path:
        return run_of(self.folder) / "checkpoints"

    def ranks(self) -> list[psutil.Process]:
        """The job's training processes, without their helpers."""
        return self.processes("noting.py")

    def processes(self, word: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            # By folder: another cluster on this machine may have a job of the same number.
            with contextlib.suppress(psutil.Error):
                ours = process.cwd() == str(self.folder)
                if ours and any(word in part for part in process.cmdline()[:3]):
                    found.append(process)
        return found

    def one_rank(self) -> psutil.Process:
        return self.draw.choice(self.ranks())


def rank_killed(target: Target) -> float:
    """Signal 9 to a rank."""
    return _send(signal.SIGKILL, target.one_rank())


def rank_killed_in_a_save(target: Target) -> float:
    """Signal 9 to a rank while a partial checkpoint is there."""
    victim = target.one_rank()
    # Busy, since a save of this size takes some hundredths of a second.
    end = time.monotonic() + PATIENCE_S
    while not any(target.checkpoints.glob("*.partial")):
        if time.monotonic() > end:
            raise AssertionError(f"no save was seen\n{target.job.report()}")
    return _send(signal.SIGKILL, victim)


def srun_killed(target: Target) -> float:
    """Signal 9 to srun, whose ranks live on for a while."""
    return _send(signal.SIGKILL, *target.processes("srun"))


def step_daemon_killed(target: Target) -> float:
    """Signal 9 to the slurmstepd of rank 0, which is an orphan then, and ends at its next line of output.

    (The other rank's is not missed before the end of the start, and not by the ranks even then.)
    """
    (rank,) = (rank for rank in target.ranks() if rank.environ()["SLURM_PROCID"] == "0")
    return _send(signal.SIGKILL, next(parent for parent in rank.parents() if "slurmstepd" in parent.name()))


def rank_stopped(target: Target) -> float:
    """Signal STOP to a rank: it hangs, and the other one's watchdog must say so."""
    return _send(signal.SIGSTOP, target.one_rank())


def newest_checkpoint_truncated(target: Target) -> float:
    """Signal 9 to a rank, and the newest checkpoint loses half of a file before the next start."""
    struck = rank_killed(target)
    target.job.wait_for("PENDING", timeout_s=PATIENCE_S)
    truncate_newest(target)
    return struck


def truncate_newest(target: Target) -> None:
    """Cut off half of a file of the newest checkpoint."""
    file = target.draw.choice(sorted(committed(target.checkpoints)[-1].path.glob("*.safetensors")))
    os.truncate(file, file.stat().st_size // 2)


def disk_filled(target: Target) -> float:
    """The run's file system is full until the job has failed for it."""
    restarts = target.job.facts()["Restarts"]
    struck = time.time()
    filler = target.folder / "runs" / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):  # full, as was intended
        while True:
            file.write(b"x" * 65_536)
            file.flush()
    try:
        wait_until("an end", lambda: _is_over(target.job, restarts), PATIENCE_S, target.job.report)
    finally:
        filler.unlink()
    return struck


def _is_over(job: Job, restarts: str) -> bool:
    facts = job.facts()
    return facts["JobState"] != "RUNNING" or facts["Restarts"] != restarts


def _send(number: signal.Signals, *processes: psutil.Process) -> float:
    struck = time.time()
    for process in processes:
        process.send_signal(number)
    return struck


FAULTS: dict[str, Callable[[Target], float]] = {
    "a rank killed": rank_killed,
    "a rank killed in a save": rank_killed_in_a_save,
    "srun killed": srun_killed,
    "slurmstepd killed": step_daemon_killed,
    "a rank stopped": rank_stopped,
    "newest checkpoint truncated": newest_checkpoint_truncated,
    "disk filled": disk_filled,
}
"""What can happen to a job; each returns when it did, seconds since the epoch."""


def order(number: int, draw: random.Random) -> list[str]:
    """So many faults, each kind as often as the others, shuffled."""
    kinds = [list(FAULTS)[index % len(FAULTS)] for index in range(number)]
    draw.shuffle(kinds)
    return kinds


def storm(target: Target, kinds: list[str], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Strike the job with each fault in turn, and let it end; what each fault cost."""
    costs = []
    start = 0
    for kind in kinds:
        resumed = first_row(target, start)["step"]
        strike_after = resumed + target.draw.randint(1, 3)
        wait_until(
            f"a checkpoint after step {resumed}",
            lambda resumed=resumed, least=strike_after: _has_got_on(target, resumed, least),
            PATIENCE_S,
            target.job.report,
        )
        struck = FAULTS[kind](target)
        row = first_row(target, start + 1)
        begun = 1 + max(row["step"] for _, row in rows_seen(target.folder) if row["start"] == start)
        cost = {
            "fault": kind,
            "steps_begun": begun,
            "steps_redone": begun - row["step"],
            "seconds_to_recover": round(row["time"] - struck, 1),
        }
        start = row["start"]
        say(str(cost))
        costs.append(cost)
    if target.job.wait_for("COMPLETED", "FAILED", timeout_s=PATIENCE_S) != "COMPLETED":
        raise AssertionError(target.job.report())
    return costs


def _has_got_on(target: Target, resumed: int, least: int) -> bool:
    saved = committed(target.checkpoints)
    # Two, so that one may be damaged; and one of them new, so that the start was not for nothing.
    return len(saved) > 1 and saved[-1].step > resumed and curve(target.folder)[-1][0] >= least


def first_row(target: Target, start: int) -> dict[str, Any]:
    """The first row of a start or of a later one, once it is there."""

    def rows() -> list[dict[str, Any]]:
        return [row for _, row in rows_seen(target.folder) if row["start"] >= start]

    wait_until(f"start {start}", rows, PATIENCE_S, target.job.report)
    return min(rows(), key=lambda row: row["time"])


def compare(struck: Path, whole: Path) -> dict[str, Any]:
    """What the run that was struck has lost, measured on the one that was left alone."""
    ours, theirs = seen(struck, last_start_only=True), seen(whole)
    lost: Counter[str] = Counter()
    for step, ranks in theirs.items():
        lost += Counter(of_all_ranks(ranks)) - Counter(of_all_ranks(ours.get(step, {})))
    weights, expected = student(struck), student(whole)
    return {
        "samples": sum(len(of_all_ranks(ranks)) for ranks in theirs.values()),
        "samples_lost": lost.total(),
        "samples_in_the_same_place": ours == theirs,
        "loss_curve_equal": curve(struck) == curve(whole),
        "weights_equal": all(torch.equal(value, weights[name]) for name, value in expected.items()),
    }


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of its own at ``place``, which can be filled without harm."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "tmpfs", str(place)]
    subprocess.run(words, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def measure(root: Path, number: int, seed: int) -> dict[str, Any]:
    """The whole story below ``root``."""
    draw = random.Random(seed)
    steps = number * STEPS_PER_FAULT + 5
    shards = draw_shards(root, min(steps * BATCH, 2000))
    recipe = {
        "schedule.images": steps * BATCH,
        "data.shards": shards,
        "run.save_every_steps": 2,
        "run.watchdog_s": 20.0,
    }
    root.chmod(0o755)  # as munged wants it of every folder above its socket
    (root / "cluster").mkdir()
    cluster = Cluster(root / "cluster")
    whole, struck = root / "whole", root / "struck"
    try:
        cluster.start()
        whole.mkdir()
        undisturbed = submit(cluster, whole, recipe)
        began = time.monotonic()
        undisturbed.wait_for("COMPLETED", timeout_s=600)
        whole_s = time.monotonic() - began
        struck.mkdir()
        with small_disk(struck / "runs"):
            began = time.monotonic()
            job = submit(cluster, struck, recipe)
            costs = storm(
                Target(job, struck, draw), order(number, draw), functools.partial(print, flush=True)
            )
            struck_s = time.monotonic() - began
            outcome = compare(struck, whole)
    finally:
        cluster.stop()
    recoveries = [cost["seconds_to_recover"] for cost in costs]
    return {
        "steps": steps,
        "faults_survived": len(costs),
        "steps_redone": sum(cost["steps_redone"] for cost in costs),
        **outcome,
        "seconds_to_recover": {"median": statistics.median(recoveries), "worst": max(recoveries)},
        "seconds_undisturbed": round(whole_s, 1),
        "seconds_struck": round(struck_s, 1),
        "by_fault": costs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if reason := absent():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="fd-chaos-") as folder:
        results = measure(Path(folder), asked.faults, asked.seed)
    print(record.write("chaos", {"seed": asked.seed, **results}))


if __name__ == "__main__":
    main()
