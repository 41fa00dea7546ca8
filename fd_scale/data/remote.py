"""How do bytes of a remote shard get here, whole and unchanged, or not at all?

A transfer that breaks, stalls or crawls is taken up again where it stopped, after a pause that grows; what
the server says is forbidden or not there is not asked for again. ``http(s)`` and object stores are read,
``pipe:`` commands run only where that was allowed. Where the bytes are kept is the business of ``cache`` and
``stream``.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from fd_scale.data.faults import LostShardError
from fd_scale.errors import ShardError

_DICE = random.Random()
"""For jitter, so that a thousand workers do not come back at once; nothing else depends on it."""
_ASKERS = 32
"""Threads that ask servers for sizes."""
_MAX_TAPS = 64
"""Transfers that are kept open where a shard can only be read from its beginning."""


@dataclass(frozen=True)
class Limits:
    """What a connection may take before it counts as broken."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    """Longest silence."""
    slowest_bytes_per_s: float = 16_384.0
    """On average over ``read_timeout_s`` of waiting."""

    @property
    def progress_bytes(self) -> float:
        """An attempt that brought less has failed as if it had brought nothing."""
        return self.slowest_bytes_per_s * self.read_timeout_s


class GoneError(Exception):
    """What no further attempt will bring: forbidden, absent, of another size."""


class BrokenError(Exception):
    """What another attempt may bring; not before ``pause_s``, where the other side said so."""

    def __init__(self, reason: str, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


class WholeOnlyError(Exception):
    """A server that gives a file from its beginning only."""


class Opener(Protocol):
    """One way to reach remote bytes."""

    @property
    def has_ranges(self) -> bool:
        """Whether ``pieces`` can begin anywhere; otherwise ``begin`` must be 0."""
        ...

    def size(self, url: str) -> int | None:
        """Bytes of the whole; ``None`` where that cannot be asked."""
        ...

    def pieces(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """Bytes ``begin`` .. ``end - 1`` in order. Refuses a whole of another size, where that is told."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long a shard is fought for before it is given up."""

    attempts: int = 8
    """In a row without progress."""
    first_pause_s: float = 0.5
    """Doubled after every failure, up to ``longest_pause_s``; each is shortened at random by up to half."""
    longest_pause_s: float = 60.0
    limits: Limits = field(default_factory=Limits)

    def pause_s(self, failures: int, asked_s: float = 0.0) -> float:
        """Seconds to wait after so many failures in a row; what the server asked for, within reason."""
        longest = min(self.first_pause_s * 2 ** (failures - 1), self.longest_pause_s)
        return max(longest * _DICE.uniform(0.5, 1.0), min(asked_s, self.longest_pause_s))


class Remote:
    """Reads byte ranges of URLs; may be shared by threads, and travels to other processes."""

    def __init__(self, patience: Patience = Patience(), *, allow_pipe: bool = False) -> None:
        self.patience, self.allow_pipe = patience, allow_pipe
        self._forget()

    def check(self, urls: Sequence[str]) -> None:
        """Raise ``ShardError`` for a URL that may not be used here."""
        for url in urls:
            scheme = url.partition(":")[0]
            if scheme == "pipe" and not self.allow_pipe:
                raise ShardError(
                    f"the index names {url!r}, which would run that command on this machine; if you trust "
                    "the index, allow it with run.allow_pipe=true (fd-scale shards: --allow-pipe)"
                )
            if scheme in ("file", "local") or "::" in url:
                raise ShardError(f"the index names {url!r}: give a path, or a URL of http(s), s3, gs or az")

    def faults(self, urls: Sequence[str], sizes: Sequence[int]) -> list[str]:
        """What is wrong with remote shards, by asking for their sizes; in order, '' for nothing."""

        def fault(url: str, expected: int) -> str:
            try:
                size = self.size(url)
            except LostShardError as error:
                return str(error)
            if size in (None, expected):
                return ""
            return f"{url}: {size:,} bytes, {expected:,} when it was indexed"

        with ThreadPoolExecutor(max(1, min(_ASKERS, len(urls)))) as pool:
            return list(pool.map(fault, urls, sizes))

    def size(self, url: str) -> int | None:
        """Bytes of a shard, ``None`` where that cannot be asked; raises ``LostShardError``."""
        opener = self._opener(url)
        for failures in range(1, self.patience.attempts + 1):
            try:
                return opener.size(url)
            except GoneError as error:
                raise LostShardError(f"{url}: {error}") from None
            except BrokenError as error:
                self._wait(url, failures, error)
        raise AssertionError("the last failure raises")

    def read(self, url: str, begin: int, end: int, file_size: int) -> bytes:
        """Bytes ``begin`` .. ``end - 1`` of a shard of ``file_size`` bytes; raises ``LostShardError``."""
        return b"".join(self.stream(url, begin, end, file_size))

    def stream(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """The same in pieces, as they arrive."""
        self.check([url])
        at, failures = begin, 0
        while at < end:
            received = 0
            try:
                for piece in self._pieces(url, at, end, file_size):
                    at, received = at + len(piece), received + len(piece)
                    yield piece
            except GoneError as error:
                raise LostShardError(f"{url}: {error}") from None
            except BrokenError as error:
                failures = 1 if received >= self.patience.limits.progress_bytes else failures + 1
                self._wait(url, failures, error)

    def _wait(self, url: str, failures: int, error: BrokenError) -> None:
        if failures >= self.patience.attempts:
            raise LostShardError(f"{url}: given up after {failures} attempts: {error}") from None
        time.sleep(self.patience.pause_s(failures, error.pause_s))

    def _opener(self, url: str) -> Opener:
        from fd_scale.data import openers  # needs packages that a local data set can start without

        self.check([url])
        if url.startswith("pipe:"):
            return openers.Pipe(self.patience.limits)
        if url.startswith(("http://", "https://")):
            return openers.Http(self.patience.limits)
        return openers.Store()

    def _pieces(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        opener = self._opener(url)
        server = urlsplit(url).netloc
        if opener.has_ranges and server not in self._whole_only:
            try:
                yield from opener.pieces(url, begin, end, file_size)
                return
            except WholeOnlyError:
                self._whole_only.add(server)
        yield from self._from_tap(opener, url, begin, end, file_size)

    def _from_tap(self, opener: Opener, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """By the transfer of this shard that stands nearest before ``begin``, or a new one."""
        tap = self._take_tap(url, begin) or _Tap(url, opener.pieces(url, 0, file_size, file_size))
        try:
            yield from tap.draw(begin, end)
        except BaseException:
            tap.close()
            raise
        self._keep_tap(tap)

    def _take_tap(self, url: str, begin: int) -> _Tap | None:
        with self._lock:
            if self._process != os.getpid():  # a fork must not read from its parent's connections
                self._forget()
            fitting = [tap for tap in self._taps if tap.url == url and tap.at <= begin]
            nearest = max(fitting, key=lambda tap: tap.at, default=None)
            if nearest:
                self._taps.remove(nearest)
            return nearest

    def _keep_tap(self, tap: _Tap) -> None:
        with self._lock:
            self._taps.append(tap)
            if len(self._taps) > _MAX_TAPS:
                self._taps.pop(0).close()

    def _forget(self) -> None:
        self._process, self._lock = os.getpid(), threading.RLock()
        self._taps: list[_Tap] = []
        self._whole_only: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _remote, (self.patience, self.allow_pipe)


class _Tap:
    """A transfer from the beginning of a shard that is read bit by bit."""

    def __init__(self, url: str, pieces: Iterator[bytes]) -> None:
        self.url, self.at = url, 0
        self._pieces, self._rest = pieces, b""

    def draw(self, begin: int, end: int) -> Iterator[bytes]:
        """Bytes ``begin`` .. ``end - 1``, which must not lie before what was drawn already."""
        while self.at < end:
            piece = self._rest or next(self._pieces, b"")
            if not piece:
                raise BrokenError(f"it ended {end - self.at:,} bytes too early")
            used = piece[: (begin if self.at < begin else end) - self.at]
            self._rest = piece[len(used) :]
            self.at += len(used)
            if self.at > begin:
                yield used

    def close(self) -> None:
        """End the transfer."""
        self._pieces.close()  # type: ignore[attr-defined]  # it is a generator


def _remote(patience: Patience, allow_pipe: bool) -> Remote:
    return Remote(patience, allow_pipe=allow_pipe)
