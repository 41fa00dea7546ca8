"""Workers of the loader: deaf to the signals of a job, gone with the process that reads from them."""

import itertools
import multiprocessing
import os
import select
import signal
import time
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_scale.data.index import ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.run import recipe
from tests.data.pictures import image_folder

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pack(image_folder(folder / "in", 29), folder / "out", max_count=7)
    return folder / "out"


def loader_of(folder: Path, **options: Any) -> TrainLoader:
    shards = ShardSet.open(folder)
    plan = Plan(shards.counts, seed=1, global_batch=GLOBAL_BATCH, fingerprint=shards.fingerprint)
    return TrainLoader(
        shards, plan, recipe.View(), [16], rank=0, world_size=1, micro_batch=GLOBAL_BATCH, accumulation=1,
        workers=2, **options,
    )  # fmt: skip


def consume(folder: Path, pipe: Connection) -> None:
    """A main process with two workers that is told to end while it reads."""
    os.setsid()
    told = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGINT, lambda number, _: told.append(number))
    batches = iter(loader_of(folder))
    next(batches)
    pipe.send("ready")
    pipe.recv()
    pipe.send((sum(len(next(batches)) for _ in range(20)), sorted(told)))
    # The loader is still open here, and the process must end at once all the same.


def test_signals_to_workers_are_left_to_the_main_process(folder):
    ours, theirs = Pipe()
    process = get_context("fork").Process(target=consume, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(30)
        assert ours.recv() == "ready"
        os.killpg(process.pid, signal.SIGTERM)  # what a batch system does
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        ours.send("go on")
        assert ours.poll(30)
        assert ours.recv() == (20 * GLOBAL_BATCH, [signal.SIGINT, signal.SIGTERM])
        process.join(30)
        assert process.exitcode == 0
    finally:
        process.kill()


_viewed = itertools.count()


def stall(views: dict, key: np.ndarray) -> dict:
    """Make the worker hang after its first batch, as an image or a file system might."""
    if next(_viewed) >= GLOBAL_BATCH:
        time.sleep(600)
    return views


def tell_one(folder: Path, pipe: Connection) -> None:
    """A main process with two workers that hang, which ends one and is killed before it ends the other."""
    multiprocessing.set_forkserver_preload([__name__])  # imported once, not by every worker
    batches = iter(loader_of(folder, change=stall))
    next(batches)
    told, other = multiprocessing.active_children()
    told.terminate()  # as PyTorch does when a loader is closed
    told.join(10)
    pipe.send((told.exitcode, other.pid))
    pipe.recv()


@pytest.mark.skipif(
    not hasattr(os, "pidfd_open"), reason="needs Linux, whose pidfds tell of a stranger's end"
)
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_worker_that_hangs_leaves_when_told_and_with_its_process(folder, method):
    ours, theirs = Pipe()
    process = get_context(method).Process(target=tell_one, args=(folder, theirs))
    process.start()
    try:
        assert ours.poll(60)
        exitcode, pid = ours.recv()
        assert exitcode == 0
        worker = os.pidfd_open(pid)
        assert not select.select([worker], [], [], 0)[0]
    finally:
        process.kill()
        process.join()
    gone = select.select([worker], [], [], 10)[0]
    if not gone:
        signal.pidfd_send_signal(worker, signal.SIGKILL)
    os.close(worker)
    assert gone
