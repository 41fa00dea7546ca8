"""Where do copies of remote shards lie on this machine, and which go when there are too many?

A copy's name comes from its whole URL, so that no two shards share one. It is written under another name,
checked against the size in the index, and renamed; what a killed process left is taken up again. The
processes of a machine share the folder: one fetches a shard while the others wait for it. How bytes get here
is the business of ``remote``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fd_scale.data.faults import LostShardError
from fd_scale.data.remote import Remote
from fd_scale.errors import ShardError


class Cache:
    """A folder of copies that holds ``limit`` bytes at most (``None``: no limit)."""

    def __init__(self, folder: Path, limit: int | None, remote: Remote) -> None:
        self.folder, self.limit, self.remote = Path(folder), limit, remote

    def path(self, url: str, file_size: int) -> Path:
        """The copy of a shard of ``file_size`` bytes, fetched if need be.

        Raises ``LostShardError`` when it cannot be had, and ``ShardError`` when it is larger than the cache.
        """
        copy = self.folder / name(url)
        if self._is_whole(copy, file_size):
            return copy
        if self.limit is not None and file_size > self.limit:
            raise ShardError(
                f"{url} has {file_size:,} bytes, the cache holds {self.limit:,}: raise run.cache_gib, or set "
                "run.cache=null to stream"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked(copy.name):
                if not self._is_whole(copy, file_size):  # another process may have been first
                    self._fetch(url, copy, file_size)
        except OSError as error:
            raise ShardError(f"the cache {self.folder} cannot be used: {error}") from None
        return copy

    def _is_whole(self, copy: Path, file_size: int) -> bool:
        try:
            if copy.stat().st_size != file_size:
                return False
            os.utime(copy)  # used just now
        except OSError:
            return False
        return True

    def _fetch(self, url: str, copy: Path, file_size: int) -> None:
        partial = copy.with_name(f"{copy.name}.{file_size}.partial")  # the size it will have is its claim
        have = min(partial.stat().st_size, file_size) if partial.exists() else 0
        with self._locked("room"):
            partial.touch()
            self._make_room()
        with partial.open("ab") as file:
            file.truncate(have)
            for piece in self.remote.stream(url, have, file_size, file_size):
                file.write(piece)
        if partial.stat().st_size != file_size:
            raise LostShardError(f"{url}: {partial.stat().st_size:,} bytes arrived, not {file_size:,}")
        partial.replace(copy)

    def _make_room(self) -> None:
        """Delete the copies used longest ago; one that is open stays readable for who has it open."""
        if self.limit is None:
            return
        copies = [(path.stat(), path) for path in self.folder.glob("*.tar")]
        total = sum(status.st_size for status, _ in copies)
        total += sum(int(path.suffixes[-2][1:]) for path in self.folder.glob("*.partial"))
        for status, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= status.st_size

    @contextlib.contextmanager
    def _locked(self, what: str) -> Iterator[None]:
        """Held by one process at a time; ends with the process, so that none is left behind."""
        locks = self.folder / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / what).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def name(url: str) -> str:
    """The file name of the copy of a URL: readable in part, different for every URL."""
    last = re.sub(r"[^A-Za-z0-9_-]", "_", re.split(r"[?#]", url)[0].rpartition("/")[2].removesuffix(".tar"))
    return f"{last[:40]}-{hashlib.sha256(url.encode()).hexdigest()[:32]}.tar"
