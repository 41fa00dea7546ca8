"""Is every shard still what was indexed, and can every sample be used?

Three depths: sizes and headers always, the SHA-256 of each file and the decoding of each image when asked.
What is found can be left out of the data set by a list beside the index (``manifest.EXCLUDED``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.progress import Progress

from fd_scale.data import decode, manifest, offsets
from fd_scale.data.cache import Cache
from fd_scale.data.faults import LostShardError, SampleError
from fd_scale.data.index import Access, ShardSet
from fd_scale.data.manifest import EXCLUDED, Shard, is_remote
from fd_scale.data.offsets import Table
from fd_scale.data.plan import Need
from fd_scale.data.pool import bar, each
from fd_scale.data.remote import Remote
from fd_scale.data.ring import Span
from fd_scale.errors import ShardError

_HELD = 256
"""Samples of a remote shard that are fetched at once."""
_ACCESS = Access()


@dataclass(frozen=True)
class Finding:
    """A shard, or a sample of it, that cannot be used."""

    shard: str
    index: int | None
    """Of the sample in its shard; ``None`` for the whole shard."""
    key: str | None
    stage: str
    error: str


@dataclass(frozen=True)
class Verdict:
    """What was looked at, and what was found."""

    num_shards: int
    num_samples: int
    without_hash: int
    """Shards whose checksum was asked for and that have none in the index."""
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Depth:
    """What is looked at beside sizes and headers."""

    decode: bool = False
    """Every image is decoded whole."""
    labels: bool = False
    """With the images, their labels are read."""
    hash: bool = False
    """Every file is read whole and compared with its SHA-256."""


def verify(
    folder: Path,
    *,
    depth: Depth = Depth(),
    only: Sequence[str] = (),
    access: Access = _ACCESS,
    workers: int = 1,
    progress: Progress | None = None,
) -> Verdict:
    """Look at the shards of a folder, or at those named by ``only``; raises ``ShardError`` for wrong input.

    Samples that are excluded already are looked at again. Remote shards are read whole when their images or
    checksums are asked for, through the cache if there is one; else the server is asked for their size.
    """
    shards, _ = manifest.read_shards(folder)
    if unknown := sorted(set(only) - {shard.url for shard in shards}):
        raise ShardError(manifest.listed(f"{folder} has no such shards:", unknown))
    numbers = [n for n, shard in enumerate(shards) if not only or shard.url in only]
    work = _Look(folder, depth, access)
    findings: list[Finding] = []
    samples = without_hash = 0
    with bar(progress, f"verifying {folder}", sum(shards[n].num_samples for n in numbers)) as advance:
        for number, found in zip(
            numbers, each(work, [(n, shards[n]) for n in numbers], workers), strict=True
        ):
            advance(shards[number].num_samples)
            samples += shards[number].num_samples
            without_hash += depth.hash and shards[number].sha256 is None
            findings += found
    return Verdict(len(numbers), samples, without_hash, tuple(findings))


def exclude(folder: Path, verdict: Verdict, only: Sequence[str] = ()) -> int:
    """Leave what was found out of the data set; the number of lines in its list now.

    What an earlier look said of the shards that were looked at is forgotten, the rest is kept.
    """
    path = folder / EXCLUDED
    kept = []
    if only and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        kept = [line for line in lines if json.loads(line)["shard"] not in only]
    lines = [*kept, *(json.dumps(asdict(finding)) for finding in verdict.findings)]
    if not lines:
        path.unlink(missing_ok=True)
        return 0
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="surrogateescape")
    partial.replace(path)
    return len(lines)


@dataclass(frozen=True)
class _Look:
    """Looks at one shard, in whichever process."""

    folder: Path
    depth: Depth
    access: Access

    def __call__(self, numbered: tuple[int, Shard]) -> list[Finding]:
        shard = numbered[1]
        try:
            table = offsets.load(self.folder / shard.offsets)
            if is_remote(shard.url):
                return list(self._far(shard, table))
            return list(self._near(shard, table, self.folder / shard.url))
        except (ShardError, LostShardError) as error:
            return [_whole(shard, "shard", str(error))]

    def _far(self, shard: Shard, table: Table) -> Iterator[Finding]:
        remote = Remote(self.access.patience, allow_pipe=self.access.allow_pipe)
        remote.check([shard.url])
        if self.access.cache is not None and (self.depth.decode or self.depth.hash):
            cache = Cache(self.access.cache, self.access.cache_bytes, remote)
            yield from self._near(shard, table, cache.path(shard.url, shard.file_size))
            return
        if fault := remote.faults([shard.url], [shard.file_size])[0]:
            yield _whole(shard, "size", fault)
            return
        if self.depth.hash and shard.sha256:
            digest = hashlib.sha256()
            for piece in remote.stream(shard.url, 0, shard.file_size, shard.file_size):
                digest.update(piece)
            yield from _hash_finding(shard, digest.hexdigest())
        if self.depth.decode:
            yield from self._samples(shard)

    def _near(self, shard: Shard, table: Table, path: Path) -> Iterator[Finding]:
        try:
            size = path.stat().st_size
        except OSError as error:
            yield _whole(shard, "shard", f"{path}: {error.strerror}")
            return
        if size != shard.file_size:
            yield _whole(shard, "size", f"{size:,} bytes, {shard.file_size:,} when it was indexed")
            return
        found, _ = offsets.scan(path)
        if not _equal(found, table):
            yield _whole(shard, "headers", "its members are not those that were indexed")
            return
        if self.depth.hash and shard.sha256:
            with path.open("rb") as file:
                yield from _hash_finding(shard, hashlib.file_digest(file, "sha256").hexdigest())
        if self.depth.decode:
            yield from self._samples(shard)

    def _samples(self, shard: Shard) -> Iterator[Finding]:
        """Every sample of a shard, read as a run reads it."""
        alone = manifest.of_shards(self.folder, [shard], None)
        samples = ShardSet([alone], self.access)
        for index in range(shard.num_samples):
            if index % _HELD == 0:
                samples.hold(Need((Span(0, index, min(index + _HELD, shard.num_samples)),), ()))
            try:
                decode.decode(samples.read(0, index, label=self.depth.labels).image)
            except SampleError as error:
                yield Finding(shard.url, index, samples.key(0, index), error.stage, str(error))


def _hash_finding(shard: Shard, digest: str) -> Iterator[Finding]:
    if digest != shard.sha256:
        yield _whole(shard, "hash", f"its SHA-256 is {digest}, {shard.sha256} when it was written")


def _whole(shard: Shard, stage: str, error: str) -> Finding:
    return Finding(shard.url, None, None, stage, error)


def _equal(found: Table, table: Table) -> bool:
    columns = ("offsets", "lengths", "first_members", "key_ends", "extension_ids")
    same = all(np.array_equal(getattr(found, name), getattr(table, name)) for name in columns)
    return same and found.extensions == table.extensions and bytes(found.keys) == bytes(table.keys)
