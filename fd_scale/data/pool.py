"""How is the same work done on many shards at once? By processes, with the answers in order."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2
"""Pieces of work per process that are handed out before they are asked for."""


def processes(wanted: int | None) -> int:
    """How many processes: as many as wanted, or one per core that this one may use."""
    return wanted or len(os.sched_getaffinity(0))


def each(work: Callable[[T], R], items: Sequence[T], workers: int) -> Iterator[R]:
    """``work`` of every item, in their order, by so many processes; by this one where that is 1.

    Work and items must pickle. An error of the work is raised here, and nothing new is begun after it.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(work, items)
        return
    # Not by fork: a progress display has threads, and locks that a fork would take along.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_leave_signals)
    waiting: collections.deque[Future[R]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def bar(progress: Progress | None, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A function that advances a task of the progress display handed in, or of one of our own."""
    if progress is None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as own:
            task = own.add_task(title, total=total)
            yield lambda count: own.advance(task, count)
    else:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)


def _leave_signals() -> None:
    """Ctrl-C is for the process that waits; it lets the others finish what they are at."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
