"""How do batches reach the training process, in order and in time?

Worker processes read ahead; a worker makes whole micro-batches, or where shards are streamed the same piece
of every one, and they arrive in the order of the plan, so their number changes nothing but speed. Bad samples
are booked here, in the process that consumes them, and a worker that dies or hangs is reported with the
sample it was at.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fd_scale.data import color, jpeg, worker
from fd_scale.data.decode import Picture
from fd_scale.data.faults import Budget, Fault, Ledger, Totals
from fd_scale.data.index import ShardSet
from fd_scale.data.jpeg import Decoder
from fd_scale.data.plan import Need, Plan, Samples
from fd_scale.data.reader import Batch, Sizes, Views, Wanted, joined, read_batch
from fd_scale.data.ring import Span
from fd_scale.data.sets import refuse_want_of_room
from fd_scale.data.view import centre_view, training_view
from fd_scale.data.watch import Watch
from fd_scale.errors import RecipeError, ScaleError, ShardError, UserError
from fd_scale.run import recipe

Change = Callable[[dict[int, Tensor], np.ndarray], dict[int, Tensor]]
"""Views by size, and the sample's key, to views changed by what is drawn from the key; must pickle."""

PREFETCH = 2
"""Micro-batches that each worker makes ahead."""
WORKER_TIMEOUT_S = 600
"""Longest wait for a worker's batch: more than the few minutes after which a remote shard out of reach is
given up, less than ``run.watchdog_s``, whose stacks would not name the sample."""
_NOTHING = Need((), ())


class TrainLoader:
    """The micro-batches of one rank, from ``start_step`` on, in the order of the plan.

    Iterating gives ``accumulation`` batches of ``micro_batch`` samples per step, without end or up to
    ``stop_step`` (not included), with a view of each of ``sizes`` (pixels; or a function of the step, for a
    schedule of sizes that changes no crop). ``change`` is made to the views of every sample. ``workers=0``
    reads in this process. ``seen`` and ``bad`` count samples as they are consumed.

    Raises ``ScaleError`` when the numbers do not make up the plan's global batch, and ``RecipeError`` for a
    decoder that is not installed or want of room for remote shards; while iterating, ``ShardError`` once more
    is bad than ``max_bad_fraction`` and ``max_bad_shards`` bear (see ``faults.Ledger``), and for a worker
    that died or was silent for ``timeout_s``.
    """

    def __init__(
        self,
        shards: ShardSet,
        plan: Plan,
        view: recipe.View,
        sizes: Sequence[int] | Sizes,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        accumulation: int,
        start_step: int = 0,
        stop_step: int | None = None,
        workers: int = 0,
        decoder: Decoder = "auto",
        max_bad_fraction: float = 1e-3,
        max_bad_shards: int = 0,
        quarantine_path: Path | None = None,
        labels: bool = False,
        change: Change | None = None,
        pin_memory: bool = False,
        timeout_s: float = WORKER_TIMEOUT_S,
    ) -> None:
        plan.samples(start_step, rank, world_size)  # names the world sizes that work
        if micro_batch * accumulation * world_size != plan.global_batch:
            raise ScaleError(
                f"micro-batch {micro_batch} x accumulation {accumulation} x {world_size} processes is "
                f"{micro_batch * accumulation * world_size}, not the global batch of {plan.global_batch}"
            )
        refuse_want_of_room(shards, plan, world_size)
        self._plan, self._rank, self._world_size, self._accumulation = plan, rank, world_size, accumulation
        self._start_step, self._stop_step = start_step, stop_step
        views: Views = functools.partial(training_view, view=view)
        if change is not None:
            views = functools.partial(_changed, views, change)
        self.decoder = _resolved(decoder)
        wanted = Wanted(
            views=views,
            sizes=sizes if callable(sizes) else functools.partial(_always, tuple(sorted(set(sizes)))),
            exif=view.exif,
            decoder=self.decoder,
            labels=labels,
            colors=functools.partial(color.draw, view.color) if view.color.is_on else None,
        )
        self._ledger = Ledger(
            quarantine_path,
            Budget(max_bad_fraction, max_bad_shards),
            rank=rank,
            world_size=world_size,
            verify_command=shards.verify_command,
        )
        self._workers = _Workers(shards, wanted, self._ledger, workers, pin_memory, timeout_s)

    @property
    def seen(self) -> int:
        """Samples consumed by this loader."""
        return self._ledger.totals.seen

    @property
    def bad(self) -> int:
        """Samples among them that could not be used."""
        return self._ledger.totals.bad

    def settle(self, gather: Callable[[Any], list[Any]]) -> Totals:
        """The totals of all ranks, judged and written down; collective, see ``Ledger.settle``."""
        return self._ledger.settle(gather)

    def __iter__(self) -> Iterator[Batch]:
        return self._workers.batches(_Requests(self._requests), self._pieces)

    @property
    def _pieces(self) -> int:
        """Requests per micro-batch: without random access, each worker reads streams of its own."""
        return max(1, self._workers.number) if self._workers.shards.needs_telling else 1

    def _requests(self) -> Iterator[_Request]:
        steps = (
            itertools.count(self._start_step)
            if self._stop_step is None
            else range(self._start_step, self._stop_step)
        )
        for step in steps:
            for which in range(self._accumulation):
                part = (step, self._rank, self._world_size, (which, self._accumulation))
                if self._workers.shards.needs_telling:
                    yield from (_Request(*chunk) for chunk in self._plan.chunks(*part, self._pieces))
                else:
                    yield _Request(self._plan.samples(*part), _NOTHING)


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
    decoder: Decoder = "auto",
    max_bad_fraction: float = 1e-3,
    limit: int | None = None,
    timeout_s: float = WORKER_TIMEOUT_S,
) -> Iterator[Batch]:
    """Every sample exactly once, or the first ``limit``, in the order of the shards, seen through
    ``view.centre_view``.

    A rank has one contiguous part of the data set, so the parts of all ranks end to end are the whole; they
    differ by one sample at most, and the last batch of a rank may be smaller. Bad samples are not valid and
    have label -1. Raises ``ShardError`` as ``TrainLoader`` does, and so when labels are asked for and there
    are none.
    """
    total = shards.num_samples if limit is None else min(limit, shards.num_samples)
    first, last = (total * part // world_size for part in (rank, rank + 1))
    wanted = Wanted(
        views=functools.partial(_centre, crop_pct=crop_pct),
        sizes=functools.partial(_always, (size,)),
        exif="ignore",
        decoder=_resolved(decoder),
        labels=labels,
    )
    ledger = Ledger(None, Budget(max_bad_fraction), rank=rank, verify_command=shards.verify_command)
    requests = _Requests(functools.partial(_in_order, shards.counts, first, last, batch))
    return _Workers(shards, wanted, ledger, workers, False, timeout_s).batches(requests)


def _changed(views: Views, change: Change, image: Any, key: np.ndarray, *rest: Any) -> dict[int, Tensor]:
    return change(views(image, key, *rest), key)


def _resolved(decoder: Decoder) -> Decoder:
    try:
        return jpeg.resolve(decoder)
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _always(sizes: tuple[int, ...], _: int) -> tuple[int, ...]:
    return sizes


def _centre(picture: Picture, _: np.ndarray, sizes: Sequence[int], *, crop_pct: float) -> dict[int, Tensor]:
    return {size: centre_view(picture.whole(), size=size, crop_pct=crop_pct) for size in sizes}


def _in_order(counts: np.ndarray, first: int, last: int, batch: int) -> Iterator[_Request]:
    ends = np.cumsum(counts)
    for number, begin in enumerate(range(first, last, batch)):
        place = np.arange(begin, min(begin + batch, last), dtype=np.int64)
        shard = np.searchsorted(ends, place, side="right")
        index = place - (ends - counts)[shard]
        keys = np.zeros((len(place), 2), dtype=np.uint64)
        samples = Samples(number, np.zeros_like(place), shard, index, keys)
        places = [(int(n), index[shard == n]) for n in np.unique(shard)]
        spans = tuple(Span(n, int(within[0]), int(within[-1]) + 1) for n, within in places)
        yield _Request(samples, Need(spans, ()))


@dataclass(frozen=True)
class _Request:
    """Samples to make, and what a reader without random access is told about them."""

    samples: Samples
    need: Need


@dataclass(frozen=True)
class _Requests:
    """What the DataLoader takes for a sampler: each element asks for one micro-batch, or a piece of one."""

    make: Callable[[], Iterator[_Request]]

    def __iter__(self) -> Iterator[_Request]:
        return self.make()


@dataclass(frozen=True)
class _Made:
    """What a worker sends back; a user's error travels as a value, so its message arrives as written."""

    batch: Batch
    faults: Sequence[Fault]
    error: UserError | None = None

    def pin_memory(self) -> _Made:
        return _Made(self.batch.pin_memory(), self.faults, self.error)


@dataclass(frozen=True)
class _Batches(Dataset):
    """What the DataLoader takes for a data set: a request gives its batch."""

    shards: ShardSet
    wanted: Wanted
    watch: Watch

    def __getitem__(self, request: _Request) -> _Made:
        try:
            self.shards.hold(request.need)
            return _Made(*read_batch(self.shards, request.samples, self.wanted, self.watch.note()))
        except UserError as error:
            return _Made(Batch({}, torch.zeros(0, dtype=torch.bool), []), (), error)


@dataclass(frozen=True)
class _Workers:
    """The processes that make batches, and the books of what they could not use."""

    shards: ShardSet
    wanted: Wanted
    ledger: Ledger
    number: int
    pin_memory: bool
    timeout_s: float

    def batches(self, requests: _Requests, pieces: int = 1) -> Iterator[Batch]:
        """The batches asked for, in their order, each of so many requests."""
        watch = Watch(self.number)
        loader: DataLoader = DataLoader(
            _Batches(self.shards, self.wanted, watch),
            sampler=requests,
            batch_size=None,
            num_workers=self.number,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
            pin_memory=self.pin_memory and pieces == 1,
            prefetch_factor=PREFETCH if self.number else None,
            worker_init_fn=worker.on_start if self.number else None,
            timeout=self.timeout_s if self.number else 0,
            generator=torch.Generator(),  # its own: the training process's random numbers are not touched
        )
        with worker.quiet_child_signal():
            arriving = iter(loader)
        try:
            while made := [one for one in (self._next(arriving, watch) for _ in range(pieces)) if one]:
                batch = made[0].batch if pieces == 1 else self._joined([one.batch for one in made])
                self.ledger.record(len(batch), [fault for one in made for fault in one.faults])
                yield batch
        finally:
            self.ledger.flush()

    def _next(self, arriving: Iterator[_Made], watch: Watch) -> _Made | None:
        """What a worker made; ``None`` at the end."""
        try:
            made = next(arriving, None)
        except RuntimeError as error:
            self._stop(arriving, watch, error)
            raise
        if made and made.error:
            raise made.error
        return made

    def _joined(self, parts: Sequence[Batch]) -> Batch:
        whole = joined(parts)
        return whole.pin_memory() if self.pin_memory else whole

    def _stop(self, arriving: Any, watch: Watch, error: RuntimeError) -> None:
        """Raise the report of a dead or silent worker, if that is what the error is about."""
        if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
            return
        for process in arriving._workers:
            process.kill()  # one that hangs would not leave when asked
            process.join()
        reason = str(error).partition("\n")[0]
        raise ShardError(
            f"{reason} (killed for want of memory? then lower run.workers). Samples that they were at:\n  "
            f"{watch.report(self._name)}\n"
            "one of these may be to blame: look into its shard with fd-scale shards verify --decode"
        ) from None

    def _name(self, shard: int, index: int) -> str:
        try:
            key = self.shards.key(shard, index)
        except UserError:
            key = f"number {index}"
        return f"shard {self.shards.names[shard]}, key {key}"


def _as_it_is(made: _Made) -> _Made:
    return made
