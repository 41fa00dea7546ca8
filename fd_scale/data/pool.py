"""How is the same work done on many shards at once? By processes, with the answers in order, and in sight."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2
"""Pieces of work per process that are handed out before they are asked for."""
_LINE_EVERY_S = 30.0


def processes(wanted: int | None) -> int:
    """How many processes: as many as wanted, or one per core that this one may use."""
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    """A function that says that so much more is done: to a progress display that was handed in, or else on
    the error stream, with a bar of its own on a terminal and with a plain line now and then elsewhere."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if progress is not None:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as own:
            task = own.add_task(title, total=total)
            yield lambda count: own.advance(task, count)
    else:
        yield _Lines(console, title, total).advance


@dataclass
class _Lines:
    """Progress as lines of a log: at the end, and every half minute before."""

    console: Console
    title: str
    total: int | None
    done: int = 0
    said_at: float = field(default_factory=lambda: time.monotonic())  # asked when made, not when imported

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self.done == self.total or now - self.said_at > _LINE_EVERY_S:
            whole = "" if self.total is None else f" of {self.total:,}"
            self.console.print(f"{self.title}: {self.done:,}{whole}", markup=False)
            self.said_at = now


def _leave_signals() -> None:
    """Ctrl-C is for the process that waits; it lets the others finish what they are at."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
