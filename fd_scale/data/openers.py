"""How is one attempt made to get bytes from far away: over HTTP, from an object store, from a command?

Each opener gives the bytes of a range in order, or says why not: ``BrokenError`` where another attempt may
help, ``GoneError`` where none will. Patience, and taking up a broken transfer where it stopped, is the
business of ``remote``.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
import requests
import urllib3

from fd_scale.data.remote import BrokenError, GoneError, Limits, WholeOnlyError

_PIECE = 1 << 20
_RANGE = 8 << 20
"""Bytes that are asked of an object store at once."""
_TRANSIENT = frozenset({408, 425, 429, *range(500, 600)})
"""HTTP answers after which asking again may help."""


@dataclass(frozen=True)
class Http:
    """``http`` and ``https``."""

    limits: Limits
    has_ranges = True

    def size(self, url: str) -> int | None:
        """From the answer to a request for one byte, which servers allow where they forbid HEAD."""
        with self._answer(url, 0, 1) as answer:
            if answer.status_code == 206:
                return _total(answer.headers.get("Content-Range", ""))
            length = answer.headers.get("Content-Length")
            return None if length is None else int(length)

    def pieces(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """Raises ``WholeOnlyError`` when the server sends the whole instead of a range within it."""
        with self._answer(url, begin, end) as answer:
            partly = answer.status_code == 206
            total = _total(answer.headers.get("Content-Range", "")) if partly else _length(answer)
            if total not in (None, file_size):
                raise GoneError(f"it has {total:,} bytes, {file_size:,} when it was indexed")
            if not partly and begin:
                raise WholeOnlyError
            # As they arrive: a full piece would be waited for, and lost with the connection.
            arriving = iter(lambda: answer.raw.read1(_PIECE), b"")
            yield from _window(_paced(arriving, self.limits), end - begin)

    @contextlib.contextmanager
    def _answer(self, url: str, begin: int, end: int) -> Iterator[requests.Response]:
        # Compressed content would have another length than the shard.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={begin}-{end - 1}"}
        timeouts = (self.limits.connect_timeout_s, self.limits.read_timeout_s)
        try:
            with _session().get(url, headers=headers, timeout=timeouts, stream=True) as answer:
                if answer.status_code in _TRANSIENT:
                    raise BrokenError(f"HTTP {answer.status_code} {answer.reason}", _asked_pause_s(answer))
                if answer.status_code not in (200, 206):
                    raise GoneError(f"HTTP {answer.status_code} {answer.reason}")
                yield answer
        except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
            raise BrokenError(_plain(error)) from None
        except requests.RequestException as error:
            raise GoneError(_plain(error)) from None


@dataclass(frozen=True)
class Store:
    """Whatever fsspec reaches by the scheme of the URL: s3, gs, az with their packages."""

    has_ranges = True

    def size(self, url: str) -> int | None:
        """As the store lists it."""
        with _store(url) as (system, path):
            return int(system.info(path)["size"])

    def pieces(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """One request per ``_RANGE`` bytes; the size of the whole is not told with them."""
        for first in range(begin, end, _RANGE):
            with _store(url) as (system, path):
                piece = system.cat_file(path, start=first, end=min(first + _RANGE, end))
            yield piece


@dataclass(frozen=True)
class Pipe:
    """The output of a command: runs whatever stands after ``pipe:``."""

    limits: Limits
    has_ranges = False

    def size(self, url: str) -> int | None:
        """Not known without running it."""
        return None

    def pieces(self, url: str, begin: int, end: int, file_size: int) -> Iterator[bytes]:
        """From the beginning. How the command ends matters only if bytes are missing."""
        process = subprocess.Popen(
            ["/bin/sh", "-c", url.removeprefix("pipe:")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield from _window(self._output(process), end)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.communicate()

    def _output(self, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
        place = process.stdout.fileno()  # type: ignore[union-attr]
        while select.select([place], [], [], self.limits.read_timeout_s)[0]:
            piece = os.read(place, _PIECE)
            if not piece:
                raise BrokenError(f"the command ended too early, with status {process.wait()}")
            yield piece
        raise BrokenError(f"the command was silent for {self.limits.read_timeout_s:g} s")


def _window(pieces: Iterable[bytes], length: int) -> Iterator[bytes]:
    """The first ``length`` bytes, no more; raises ``BrokenError`` when there are fewer."""
    for piece in pieces:
        yield piece[:length]
        length -= len(piece)
        if length <= 0:
            return
    if length > 0:
        raise BrokenError(f"the connection ended {length:,} bytes too early")


def _paced(pieces: Iterator[bytes], limits: Limits) -> Iterator[bytes]:
    """The same pieces, given up when they trickle."""
    waited_s, received = 0.0, 0
    while True:
        begin = time.monotonic()
        piece = next(pieces, None)
        waited_s += time.monotonic() - begin
        if piece is None:
            return
        received += len(piece)
        if waited_s > limits.read_timeout_s:
            if received < limits.slowest_bytes_per_s * waited_s:
                raise BrokenError(f"only {received / waited_s:,.0f} bytes/s")
            waited_s, received = 0.0, 0
        yield piece


def _length(answer: requests.Response) -> int | None:
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _total(content_range: str) -> int | None:
    """The size of the whole in ``bytes 0-9/1234``; ``None`` where it is not told."""
    found = re.fullmatch(r"bytes [\d*-]+/(\d+)", content_range)
    return int(found[1]) if found else None


def _asked_pause_s(answer: requests.Response) -> float:
    """``Retry-After``: seconds, or a date."""
    text = answer.headers.get("Retry-After", "")
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _plain(error: BaseException) -> str:
    """The innermost reason, without the objects that wrap it."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    reason = getattr(error, "reason", None)
    return _plain(reason) if isinstance(reason, BaseException) else f"{type(error).__name__}: {error}"


_LOCAL = threading.local()


def _session() -> requests.Session:
    """A session of this thread of this process: connections must not be shared."""
    if getattr(_LOCAL, "process", None) != os.getpid():
        _LOCAL.process, _LOCAL.session = os.getpid(), requests.Session()
    session: requests.Session = _LOCAL.session
    return session


@contextlib.contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; its errors as ours."""
    try:
        system = _system(url.partition("://")[0], os.getpid())
        yield system, system._strip_protocol(url)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise GoneError(f"{type(error).__name__}: {error}") from None
    except ImportError as error:
        raise GoneError(f"{error} (extra 's3': pip install 'fd-scale[s3]')") from None
    except (BrokenError, GoneError):
        raise
    except Exception as error:  # every store has errors of its own, which share no base class
        raise BrokenError(f"{type(error).__name__}: {error}") from None


@functools.lru_cache(maxsize=8)
def _system(scheme: str, _: int) -> Any:
    """The file system of a scheme for this process (its id)."""
    return fsspec.filesystem(scheme, skip_instance_cache=True)
