"""Which launcher started this process, as ``place`` reads it; ranks under a real ``mpirun``.

Real groups under torchrun and srun: tests/test_distill.py and tests/cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fd_scale.errors import RunError
from fd_scale.run.world import Place, free_port, place

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "6", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
MPI = {"OMPI_COMM_WORLD_SIZE": "3", "PMI_SIZE": "3"}
OURS = {
    *TORCHRUN,
    *SRUN,
    *MPI,
    "PMIX_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch):
    """``place()`` in an environment with these variables and no other launcher's."""

    def launched(variables: dict[str, str]) -> Place:
        for name in OURS:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return place()

    return launched


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Place(0, 1, 0, "single process")),
        (TORCHRUN, Place(1, 4, 1, "torchrun")),
        (TORCHRUN | SRUN | MPI, Place(1, 4, 1, "torchrun")),
        (SRUN, Place(2, 6, 0, "srun")),
        (SRUN | MPI, Place(2, 6, 0, "srun")),
        # The batch script itself and a shell of salloc: in a job, but not started by srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place(0, 1, 0, "single process")),
        # Some launchers of torchrun's kind leave LOCAL_RANK out where there is one rank per node.
        ({"RANK": "0", "WORLD_SIZE": "2"}, Place(0, 2, 0, "torchrun")),
    ],
)
def test_the_launcher_is_found_in_a_fixed_order(launched, variables, expected) -> None:
    assert launched(variables) == expected


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (
            {"RANK": "0"},
            "torchrun sets RANK, WORLD_SIZE and LOCAL_RANK, but here .* incomplete: 'WORLD_SIZE'",
        ),
        (SRUN | {"SLURM_PROCID": "two"}, "srun sets SLURM_PROCID, .* incomplete: .*'two'"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(launched, variables, said) -> None:
    with pytest.raises(RunError, match=said):
        launched(variables)


PROGRAM = """
import os, torch
from fd_scale.run.world import World
world = World.start()
places = world.gather((world.rank, world.local_rank, world.launcher, os.environ.get("SLURM_JOB_ID")))
print(places, world.mean(torch.tensor(float(world.rank))).item(), flush=True)
world.leave(0)
"""


def variables(**more: str) -> dict[str, str]:
    """An environment without a launcher, and with these."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return environment | {"CUDA_VISIBLE_DEVICES": ""} | more


def test_ranks_of_another_job_at_the_same_port_do_not_join() -> None:
    port = str(free_port())

    def start(rank: int, job: str) -> subprocess.Popen[str]:
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        meeting = {"SLURM_JOB_ID": job, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", PROGRAM]
        return subprocess.Popen(command, env=variables(**place, **meeting), stdout=subprocess.PIPE, text=True)

    def has_called(process: subprocess.Popen[str]) -> bool:
        calls = psutil.Process(process.pid).net_connections("tcp")
        return any(call.status == psutil.CONN_ESTABLISHED for call in calls)

    first, stranger = start(0, "7"), start(1, "8")
    try:
        end = time.monotonic() + 120
        while not has_called(stranger):
            assert time.monotonic() < end
            time.sleep(0.1)
        second = start(1, "7")
        for process in (first, second):
            output, _ = process.communicate(timeout=120)
            assert output == "[(0, 0, 'srun', '7'), (1, 0, 'srun', '7')] 0.5\n"
    finally:
        stranger.kill()
        stranger.communicate()


def test_ranks_under_mpirun_form_one_group() -> None:
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("no mpirun on this machine: run tests/cluster/install.sh as root")
    # More ranks than processors, and a user who is root, are what Open MPI asks about.
    allowed = ("ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe")
    environment = variables(**{f"OMPI_{name}": "1" for name in allowed})
    done = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    # mpirun may put the words of one rank between those of the other.
    assert done.stdout.count("[(0, 0, 'mpirun', None), (1, 1, 'mpirun', None)]") == 2
    assert done.stdout.count(" 0.5") == 2
