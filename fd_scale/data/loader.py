"""How do batches reach the training process, in order and in time?

Worker processes read ahead; a worker makes whole micro-batches, and they arrive in the order of the plan, so
their number changes nothing but speed. Bad samples are booked here, in the process that consumes them.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fd_scale.data.decode import Exif
from fd_scale.data.faults import Fault, Ledger
from fd_scale.data.index import ShardSet
from fd_scale.data.plan import Plan, Samples
from fd_scale.data.reader import Batch, Views, read_batch
from fd_scale.data.view import centre_view, training_view
from fd_scale.errors import ScaleError, UserError
from fd_scale.run import recipe

PREFETCH = 2
"""Micro-batches that each worker makes ahead."""


class TrainLoader:
    """The micro-batches of one rank, from ``start_step`` on, in the order of the plan.

    Iterating gives ``accumulation`` batches of ``micro_batch`` samples per step, without end or up to
    ``stop_step`` (not included). ``workers=0`` reads in this process. ``seen`` and ``bad`` count samples as
    they are consumed.

    Raises ``ScaleError`` when the numbers do not make up the plan's global batch; while iterating,
    ``ShardError`` once more samples are bad than ``max_bad_fraction`` bears (see ``faults.Ledger``).
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: Plan,
        view: recipe.View,
        sizes: Sequence[int],
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        start_step: int = 0,
        stop_step: int | None = None,
        workers: int = 0,
        max_bad_fraction: float = 1e-3,
        quarantine_path: Path | None = None,
        labels: bool = False,
        pin_memory: bool = False,
    ) -> None:
        plan.samples(start_step, rank, world_size)  # names the world sizes that work
        if micro_batch * accumulation * world_size != plan.global_batch:
            raise ScaleError(
                f"micro-batch {micro_batch} x accumulation {accumulation} x {world_size} processes is "
                f"{micro_batch * accumulation * world_size}, not the global batch of {plan.global_batch}"
            )
        self._plan, self._rank, self._world_size, self._accumulation = plan, rank, world_size, accumulation
        self._start_step, self._stop_step = start_step, stop_step
        self._workers, self._pin_memory = workers, pin_memory
        sizes = tuple(sorted(set(sizes)))
        views = functools.partial(training_view, view=view, sizes=sizes)
        self._dataset = _Batches(shards, views, sizes, labels, view.exif)
        self._ledger = Ledger(quarantine_path, max_bad_fraction=max_bad_fraction, rank=rank)

    @property
    def seen(self) -> int:
        """Samples consumed by this loader."""
        return self._ledger.seen

    @property
    def bad(self) -> int:
        """Samples among them that could not be used."""
        return self._ledger.bad

    def __iter__(self) -> Iterator[Batch]:
        return _produce(
            self._dataset, _Requests(self._requests), self._ledger, self._workers, self._pin_memory
        )

    def _requests(self) -> Iterator[Samples]:
        steps = (
            itertools.count(self._start_step)
            if self._stop_step is None
            else range(self._start_step, self._stop_step)
        )
        for step in steps:
            for which in range(self._accumulation):
                yield self._plan.samples(step, self._rank, self._world_size, (which, self._accumulation))


def evaluation_batches(
    shards: ShardSet,
    *,
    size: int,
    crop_pct: float,
    batch: int,
    rank: int = 0,
    world_size: int = 1,
    labels: bool = True,
    workers: int = 0,
    max_bad_fraction: float = 1e-3,
) -> Iterator[Batch]:
    """Every sample exactly once, in the order of the shards, seen through ``view.centre_view``.

    A rank has one contiguous part of the data set, so the parts of all ranks end to end are the whole; they
    differ by one sample at most, and the last batch of a rank may be smaller. Bad samples are not valid and
    have label -1. Raises ``ShardError`` as ``TrainLoader`` does, and so when labels are asked for and there
    are none.
    """
    first, last = (shards.num_samples * part // world_size for part in (rank, rank + 1))
    views = functools.partial(_one_size, size=size, crop_pct=crop_pct)
    dataset = _Batches(shards, views, (size,), labels, "ignore")
    requests = _Requests(functools.partial(_in_order, shards.counts, first, last, batch))
    return _produce(
        dataset, requests, Ledger(None, max_bad_fraction=max_bad_fraction, rank=rank), workers, False
    )


def _one_size(image_HWC: np.ndarray, _: np.ndarray, *, size: int, crop_pct: float) -> dict[int, Tensor]:
    return {size: centre_view(image_HWC, size=size, crop_pct=crop_pct)}


def _in_order(counts: np.ndarray, first: int, last: int, batch: int) -> Iterator[Samples]:
    ends = np.cumsum(counts)
    for number, begin in enumerate(range(first, last, batch)):
        place = np.arange(begin, min(begin + batch, last), dtype=np.int64)
        shard = np.searchsorted(ends, place, side="right")
        index = place - (ends - counts)[shard]
        yield Samples(0, number, shard, index, np.zeros((len(place), 2), dtype=np.uint64))


@dataclass(frozen=True)
class _Requests:
    """What the DataLoader takes for a sampler: each element asks for one micro-batch."""

    make: Callable[[], Iterator[Samples]]

    def __iter__(self) -> Iterator[Samples]:
        return self.make()


@dataclass(frozen=True)
class _Made:
    """What a worker sends back; a user's error travels as a value, so its message arrives as written."""

    batch: Batch | None
    faults: Sequence[Fault]
    error: UserError | None = None

    def pin_memory(self) -> _Made:
        return _Made(self.batch.pin_memory() if self.batch else None, self.faults, self.error)


@dataclass(frozen=True)
class _Batches(Dataset):
    """What the DataLoader takes for a data set: a request gives a micro-batch."""

    shards: ShardSet
    views: Views
    sizes: tuple[int, ...]
    labels: bool
    exif: Exif

    def __getitem__(self, samples: Samples) -> _Made:
        try:
            return _Made(
                *read_batch(self.shards, samples, self.views, self.sizes, labels=self.labels, exif=self.exif)
            )
        except UserError as error:
            return _Made(None, (), error)


def _produce(
    dataset: _Batches, requests: _Requests, ledger: Ledger, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    loader: DataLoader = DataLoader(
        dataset,
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        pin_memory=pin_memory,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=_on_worker_start if workers else None,
        generator=torch.Generator(),  # its own: the training process's random numbers are not touched
    )
    for made in loader:
        if made.error:
            raise made.error
        ledger.record(len(made.batch), made.faults)
        yield made.batch


def _as_it_is(made: _Made) -> _Made:
    return made


def _on_worker_start(_: int) -> None:
    """Leave Ctrl-C and SIGTERM to the main process, which saves and then ends its workers itself.

    A terminal and a batch system send them to every process of a job; a worker that vanished would break the
    save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_parent_says, daemon=True).start()


def _leave_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    os._exit(0)
