"""fd_scale.run.world under srun on two nodes: one group, and one decision to stop."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

from tests.cluster.cluster import NODES, Cluster, wait_until

REPOSITORY = Path(__file__).parents[2]


def found(folder: Path, name: str) -> list[dict]:
    """What ranks 0 and 1 wrote under this name, once both have."""
    paths = [folder / f"{name}-{rank}.json" for rank in (0, 1)]
    wait_until(name, lambda: all(path.exists() and path.stat().st_size for path in paths), 90)
    return [json.loads(path.read_text()) for path in paths]


def test_two_nodes_form_one_group_and_stop_at_one_step(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    environment = {
        "FD_SCALE_EXEC": shlex.join([sys.executable, str(Path(__file__).with_name("ranks.py"))]),
        "PYTHONPATH": str(REPOSITORY),
    }
    size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1"]
    job = cluster.submit(tmp_path, *size, "slurm/fd_swinv2g.sbatch", environment=environment)

    joined = found(tmp_path, "joined-0")
    assert [rank["mean"] for rank in joined] == [0.5, 0.5]
    assert joined[0]["places"] == joined[1]["places"] == [[0, 0, "srun", NODES[0]], [1, 0, "srun", NODES[1]]]
    job.warn()
    first, second = found(tmp_path, "stopped-0")
    assert first == second
    assert first["said"] == signal.SIGUSR2

    joined = found(tmp_path, "joined-1")  # requeued, in the same directory
    os.kill(joined[1]["pid"], signal.SIGUSR2)  # one rank alone hears it
    first, second = found(tmp_path, "stopped-1")
    assert first == second
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
