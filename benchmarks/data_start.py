"""How long does a rank take to open a very large data set, and to go on deep inside it?

    python -m benchmarks.data_start      writes results/data_start.json; needs no GPU, about a minute

An index of 100,000 shards of 10,000 samples is made up, its tars sparse files, and opened in a process of
its own as a rank of 128 does it: the index read, the files' sizes checked, the plan drawn up, the samples of
the first step located. Then a fresh plan is asked for the samples of a step at the end of its fifth epoch.
Seconds are wall time unless named ``cpu``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from fd_scale.data import manifest
from fd_scale.data.manifest import Shard

SAMPLES_PER_SHARD, SHARD_BYTES = 10_000, 10**9
RANKS, GLOBAL_BATCH = 128, 4096
ROUNDS = 3

RANK = """
import json, sys, time
from fd_scale.data.index import ShardSet
from fd_scale.data.plan import Plan
folder, batch, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
begin, cpu = time.perf_counter(), time.process_time()
shards = ShardSet.open(folder, check=False)
shards.refuse_faults(shards.faults(3, ranks))  # the ranks of a run share the look at the files
opened_s = time.perf_counter() - begin
plan = Plan(shards.counts, seed=0, global_batch=batch, fingerprint=shards.fingerprint)
plan.samples(0, 3, ranks)
start_s, start_cpu_s = time.perf_counter() - begin, time.process_time() - cpu
resumed = Plan(shards.counts, seed=0, global_batch=batch, fingerprint=shards.fingerprint)
begin = time.perf_counter()
resumed.samples(5 * resumed.steps_per_epoch - 7, 3, ranks)
resume_s = time.perf_counter() - begin
peak_kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
found = {"start_s": start_s, "start_cpu_s": start_cpu_s, "opened_s": opened_s, "resume_s": resume_s}
found |= {"peak_mib": peak_kib / 1024, "samples": plan.num_samples, "torch": "torch" in sys.modules}
print(json.dumps(found))
"""


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="fd_scale-bench-") as scratch:
        folder = made_up(Path(scratch), asked.shards)
        rounds = [rank(folder) for _ in range(ROUNDS)]
    names = ("start_s", "start_cpu_s", "opened_s", "resume_s", "peak_mib")
    results = {
        "shards": asked.shards,
        "samples": rounds[0]["samples"],
        "ranks": RANKS,
        "global_batch": GLOBAL_BATCH,
        "median": {name: statistics.median(found[name] for found in rounds) for name in names},
        "worst": {name: max(found[name] for found in rounds) for name in names},
    }
    path = record.write("data_start", results)
    print(json.dumps(results["worst"]), path)
    return 0


def made_up(folder: Path, num_shards: int) -> Path:
    """The index of so many shards, and files of the right sizes that take no room."""
    (folder / "offsets").mkdir(parents=True)
    shards = [
        Shard(f"shard-{n:06d}.tar", SAMPLES_PER_SHARD, SHARD_BYTES, f"offsets/{n:06d}", f"{n:064x}")
        for n in range(num_shards)
    ]
    for shard in shards:
        with open(folder / shard.url, "wb") as file:
            file.truncate(shard.file_size)
        open(folder / shard.offsets, "wb").close()
    manifest.write(folder, shards, None)
    return folder


def rank(folder: Path) -> dict[str, float]:
    """What one rank measures."""
    command = [sys.executable, "-c", RANK, str(folder), str(GLOBAL_BATCH), str(RANKS)]
    root = Path(__file__).parents[1]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
