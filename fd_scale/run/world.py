"""Which process this is among how many, on which device; and the few words that processes exchange.

Three launchers are recognised, in this order: torchrun and its kin (``RANK`` is set), ``srun`` (a Slurm job
step), and ``mpirun`` (an Open MPI, MPICH or Intel MPI environment, read through mpi4py). Without any, the run
is one process. Tensors of the model are none of its business; those belong to the engine.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fd_scale.errors import RunError, UserError

T = TypeVar("T")

log = logging.getLogger("fd_scale")

PROCESS_GROUP_TIMEOUT = timedelta(minutes=30)
"""Long enough for a first compile and for opening large data sets; a hung peer is then an error."""

SAME_REQUEST_S = 2.0
"""A terminal and a launcher both forward one Ctrl-C: signals this close together are one request."""


@dataclass(frozen=True)
class Place:
    """Where a launcher says that this process is."""

    rank: int
    size: int
    local_rank: int
    launcher: str


def place() -> Place:
    """Read the launcher's environment; raises ``RunError`` for one that contradicts itself."""
    if "RANK" in os.environ:
        return _from_environment("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        return _from_environment("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")):
        return _from_mpi()
    return Place(rank=0, size=1, local_rank=0, launcher="single process")


def _from_environment(launcher: str, rank: str, size: str, local_rank: str) -> Place:
    try:
        found = Place(
            rank=int(os.environ[rank]),
            size=int(os.environ[size]),
            local_rank=int(os.environ.get(local_rank, "0")),
            launcher=launcher,
        )
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{launcher} sets {rank}, {size} and {local_rank}, but here they are incomplete: {error}"
        ) from None
    if not 0 <= found.rank < found.size:
        raise RunError(f"{rank}={found.rank} is not below {size}={found.size}")
    return found


def _from_mpi() -> Place:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    address = world.bcast(socket.gethostname() if world.rank == 0 else None)
    port = world.bcast(free_port() if world.rank == 0 else None)
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    return Place(rank=world.rank, size=world.size, local_rank=local.rank, launcher="mpirun")


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rendezvous(where: Place) -> None:
    """Fill in MASTER_ADDR and MASTER_PORT where the launcher left them out."""
    if where.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(free_port()))
        return
    if where.launcher == "srun":
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_host()
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        # As in slurm/env.sh, which also looks whether it is free: job.sh gives up before the 101st start.
        port = 20_000 + (int(os.environ["SLURM_JOB_ID"]) * 101 + restart) % 12_000
        os.environ.setdefault("MASTER_PORT", str(port))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RunError(f"{where.launcher} started {where.size} processes without {name}")


def _meeting(where: Place) -> str:
    """What the ranks of one start have in common. One that comes to the port of another job then waits there
    in vain, where it would otherwise be taken for a rank of that job."""
    if where.launcher != "srun":
        return where.launcher
    return f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RunError(
            f"srun started this without MASTER_ADDR, and scontrol cannot name the first host of {nodes} "
            f"({error}): export MASTER_ADDR in the batch script, as slurm/env.sh does"
        ) from None
    return hosts.stdout.split()[0]


class World:
    """The processes of one run, seen from one of them. All methods but ``leave`` are collective: every rank
    must call them."""

    def __init__(self, where: Place) -> None:
        self.rank, self.size, self.local_rank, self.launcher = (
            where.rank,
            where.size,
            where.local_rank,
            where.launcher,
        )
        self.is_main = self.rank == 0
        self._group: Any = None  # the default one
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")

    @classmethod
    def start(cls) -> World:
        """Join the process group (NCCL on GPUs, gloo on CPUs) and return this process's place in it."""
        where = place()
        _rendezvous(where)
        os.environ.update(RANK=str(where.rank), WORLD_SIZE=str(where.size), LOCAL_RANK=str(where.local_rank))
        world = cls(where)
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://", timeout=PROCESS_GROUP_TIMEOUT))
        store = dist.PrefixStore(_meeting(where), store)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=PROCESS_GROUP_TIMEOUT
        )
        return world

    def aside(self) -> World:
        """The same processes with a line of their own, for the words of another thread. Collective."""
        other = copy.copy(self)
        other._group = dist.new_group(backend="gloo", timeout=PROCESS_GROUP_TIMEOUT)
        return other

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable ``value``, in rank order, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def on_main(self, action: Callable[[], T]) -> T:
        """The result of ``action`` on rank 0, for all; a ``UserError`` or ``OSError`` there is raised on
        every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except (UserError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, action: Callable[[], T]) -> T:
        """``action`` on every rank; when it fails on any with a ``UserError`` or ``OSError``, all raise the
        first one."""
        result: Any = None
        failure: UserError | OSError | None = None
        try:
            result = action()
        except (UserError, OSError) as error:
            failure = error
        failures = [error for error in self.gather(failure) if error is not None]
        if failures:
            raise failures[0]
        return result

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a scalar tensor, on its device."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def leave(self, status: int) -> None:
        """End the process without the teardown that sometimes aborts after all work is done; never returns.

        Status 0 waits for the other ranks first; after a failure nobody is waited for.
        """
        if dist.is_initialized() and status == 0:
            dist.barrier()
            dist.destroy_process_group()
        if self.launcher == "mpirun" and status == 0:
            from mpi4py import MPI

            MPI.Finalize()  # a rank that ends without it counts as crashed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def launch(action: Callable[[World], int]) -> None:
    """Join the other processes, do ``action``, and end this process with its status; never returns.

    Status 2 after a ``UserError``, with its message; 1 after anything else, with a traceback.
    """
    world = World.start()
    logging.basicConfig(level=logging.INFO if world.is_main else logging.ERROR, format="%(message)s")
    try:
        status = action(world)
    except UserError as error:
        if world.is_main:
            log.error("error: %s", error)
        status = 2
    except Exception:
        log.exception("rank %d failed", world.rank)
        status = 1
    world.leave(status)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generators of this process for one step, so that its randomness needs no saving.

    Stochastic depth of step ``step`` is then the same whether the run was interrupted before it or not.
    """
    value = random.Random(f"{seed}/{step}/{rank}").getrandbits(63)
    torch.manual_seed(value)
    random.seed(value)  # Python's and NumPy's are what timm mixes and erases by
    np.random.seed(value % 2**32)


class StopRequest:
    """A signal becomes a flag, and the flag becomes one decision that all ranks take at the same step.

    ``poll`` is collective. It returns what the ranks said at the previous poll while their present words
    travel, so that nobody waits for the slowest. A second request, later than ``SAME_REQUEST_S``, ends the
    process at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self._received = 0
        self._received_at = 0.0
        self._travelling: tuple[dist.Work, torch.Tensor] | None = None
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received and now - self._received_at > SAME_REQUEST_S and number != signal.SIGUSR2:
            os._exit(128 + number)
        if not self._received:
            self._received, self._received_at = number, now

    def poll(self) -> int:
        """The signal that some rank had received at the previous poll, or 0."""
        said = self._wait()
        flag = torch.tensor([self._received], dtype=torch.int64)
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        self._travelling = (work, flag)
        return said

    def _wait(self) -> int:
        if self._travelling is None:
            return 0
        work, flag = self._travelling
        work.wait()
        self._travelling = None
        return int(flag.item())

    def close(self) -> int:
        """Finish the exchange under way, give the signals back, and return the last decision."""
        said = self._wait()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        return said
