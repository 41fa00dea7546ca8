"""Run one function on n processes that form a gloo group, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fd_scale.run.world import free_port


def spawn(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 300
) -> list[Any]:
    """Results of ``function(world, *arguments)`` in rank order; a failure in any rank is raised with its
    traceback.

    The function must be importable by name. Each process has one OpenMP thread, as two on two cores fight.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(function, rank, world_size, port, folder, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            if process.is_alive():
                process.kill()
        outcomes = [_outcome(Path(folder), rank) for rank in range(world_size)]
    failures = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(outcomes) if not good]
    if hung or failures:
        raise AssertionError(f"ranks {hung} hung\n" * bool(hung) + "\n".join(failures))
    return [result for _, result in outcomes]


def _outcome(folder: Path, rank: int) -> tuple[bool, Any]:
    path = folder / f"{rank}.pickle"
    return pickle.loads(path.read_bytes()) if path.exists() else (False, "left without a result")


def _child(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    from fd_scale.run.world import World

    torch.set_num_threads(1)
    try:
        outcome = (True, function(World.start(), *arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(outcome))
    os._exit(0)
