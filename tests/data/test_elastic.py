"""A real run of two processes: killed with -9, resumed, and resumed with another number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from multiprocessing import get_context, set_start_method
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fd_scale.data.index import Access, ShardSet
from fd_scale.data.loader import TrainLoader
from fd_scale.data.pack import pack
from fd_scale.data.plan import Plan
from fd_scale.run import recipe
from tests.data.pictures import image_folder
from tests.data.server import HASTE, serving
from tests.data.test_stream import index_of
from tests.spawn import free_port

GLOBAL_BATCH, STEPS, KILLED_AT = 8, 8, 4


def train(folder: str, out: str, rank: int, world_size: int, port: int, die_at: int | None) -> None:
    """What a training process does with its data: go on from the saved state, write each global batch."""
    torch.set_num_threads(1)
    set_start_method("fork", force=True)  # of the data workers, as under torchrun
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    shards = ShardSet.open(folder, access=Access(patience=HASTE))
    plan = Plan(shards.counts, seed=3, global_batch=GLOBAL_BATCH, block=3, fingerprint=shards.fingerprint)
    state, start = Path(out, "state.json"), 0
    if state.exists():
        saved = json.loads(state.read_text())
        plan, start = plan.resumed(saved), saved["step"]
    loader = TrainLoader(
        shards, plan, recipe.View(), [24], rank=rank, world_size=world_size, accumulation=1,
        micro_batch=GLOBAL_BATCH // world_size, start_step=start, stop_step=STEPS, workers=1,
    )  # fmt: skip
    for step, batch in enumerate(loader, start):
        pixels = batch.pixels[24].contiguous()
        parts = [torch.empty_like(pixels) for _ in range(world_size)]
        dist.all_gather(parts, pixels)
        if step == die_at and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 0:
            whole = hashlib.sha256(torch.cat(parts).numpy().tobytes()).hexdigest()
            with Path(out, "batches.jsonl").open("a") as file:
                file.write(json.dumps([step, whole]) + "\n")
            if step % 2:  # a checkpoint after every second step
                state.write_text(json.dumps(plan.state(step + 1)))
        dist.barrier()
    os._exit(0)


def run(folder: Path, out: Path, world_size: int, die_at: int | None = None) -> list[int | None]:
    """Exit codes of the ranks; a rank that waits for a dead one is ended, as a launcher would."""
    out.mkdir(exist_ok=True)
    port = free_port()
    arguments = [(str(folder), str(out), rank, world_size, port, die_at) for rank in range(world_size)]
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by every rank
    ranks = [context.Process(target=train, args=each) for each in arguments]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + 120
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
        time.sleep(0.05)
    for process in ranks:
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def batches(out: Path) -> dict[int, str]:
    """The hash of every global batch; one that was made twice must have been the same twice."""
    made: dict[int, str] = {}
    for step, whole in map(json.loads, (out / "batches.jsonl").read_text().splitlines()):
        assert made.setdefault(step, whole) == whole
    return made


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("elastic")
    pack(image_folder(folder / "in", 29), folder / "set", max_count=7)
    return ShardSet.open(folder / "set")


@pytest.fixture(scope="module")
def whole(local, tmp_path_factory) -> dict[int, str]:
    out = tmp_path_factory.mktemp("whole")
    assert run(local.folders[0].folder, out, 1) == [0]
    return batches(out)


@pytest.mark.parametrize("reader", ["indexed", "streamed"])
def test_a_run_killed_with_9_goes_on_as_if_nothing_had_been(local, whole, tmp_path, reader):
    assert list(whole) == list(range(STEPS))
    with serving(local.folders[0].folder) as server:
        folder = local.folders[0].folder
        if reader == "streamed":
            folder = index_of(local, tmp_path / "far", server.url + "/{}")
        out = tmp_path / "out"
        assert -signal.SIGKILL in run(folder, out, 2, die_at=KILLED_AT)
        # The other rank may still have written this batch, before it saw that it was alone; it is made again.
        assert list(batches(out)) in (list(range(KILLED_AT)), list(range(KILLED_AT + 1)))
        if reader == "indexed":
            assert -signal.SIGKILL in run(folder, out, 2, die_at=7)
        assert run(folder, out, 4) == [0] * 4
        assert batches(out) == whole
