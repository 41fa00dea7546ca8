"""How are remote shards read without a scratch disk? By blocks in memory, the next while one lasts.

Who asks says which neighbouring samples will be needed now and which soon (``plan.Need``); each such span is
one ranged request, made by a thread while others decode. What is needed no longer is let go. Which bytes a
span covers, and what is done with them, is the business of ``index``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from fd_scale.data.plan import Need
from fd_scale.data.remote import Remote
from fd_scale.data.ring import Span

_FETCHERS = 8
"""Spans that a process fetches at a time."""


class Place(NamedTuple):
    """Bytes ``begin`` .. ``end - 1`` of a shard."""

    url: str
    begin: int
    end: int
    file_size: int


class Stream:
    """The spans that one process holds. ``locate`` tells where the bytes of a span lie."""

    def __init__(self, remote: Remote, locate: Callable[[Span], Place]) -> None:
        self.remote, self._locate = remote, locate
        self._begin()

    def hold(self, need: Need) -> None:
        """Fetch what is needed and not here, first what is needed first; let go of everything else."""
        if self._process != os.getpid():
            self._begin()  # a fork has no threads
        wanted = dict.fromkeys((*need.now, *need.soon))
        for span in [span for span in self._held if span not in wanted]:
            self._held.pop(span)[1].cancel()
        for span in wanted:
            if span not in self._held:
                place = self._locate(span)
                self._held[span] = place, self._pool.submit(self.remote.read, *place)
        self._of_shard.clear()
        for span, held in self._held.items():
            self._of_shard.setdefault(span.shard, []).append(held)

    def read(self, shard: int, place: Place) -> bytes:
        """The bytes of a place in a span that is held, or else fetched now; raises ``LostShardError``."""
        for held, coming in self._of_shard.get(shard, ()):
            if held.begin <= place.begin and place.end <= held.end:
                return coming.result()[place.begin - held.begin : place.end - held.begin]
        return self.remote.read(*place)

    def _begin(self) -> None:
        self._process = os.getpid()
        self._held: dict[Span, tuple[Place, Future[bytes]]] = {}
        self._of_shard: dict[int, list[tuple[Place, Future[bytes]]]] = {}
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
