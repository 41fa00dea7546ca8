"""How do samples become a tar shard that is whole, indexed, and the same bytes every time?

Which samples, and in which order, is the business of ``pack`` and of whoever makes samples up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from rich.progress import Progress
from webdataset import TarWriter

from fd_scale.data import indexing, manifest, offsets
from fd_scale.data.pool import bar
from fd_scale.errors import ShardError

MAX_COUNT = 10_000
MAX_BYTES = 2**30

_BLOCK, _RECORD = 512, 10_240

Sample = tuple[str, Mapping[str, bytes]]
"""A key without a dot, and the members of the sample by extension."""


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    max_count: int = MAX_COUNT,
    max_bytes: int = MAX_BYTES,
    classes: Sequence[str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> list[manifest.Shard]:
    """Write samples, in their order, as shards with an index into ``out``; returns the lines of the manifest.

    Keys must be unique and have no dot, and each sample one image member. ``out`` is new or empty, or left by
    a call that was not finished: ``index.json`` comes last, so that such a folder is not taken for a set.
    """
    refuse_limits(max_count, max_bytes)
    make_room(out, kept=0)
    shards: list[manifest.Shard] = []
    with bar(progress, f"packing into {out}", total) as advance:
        for number, group in enumerate(_by_size(samples, max_count, max_bytes)):
            shards.append(write_shard(out, number, group))
            advance(len(group))
    manifest.write(out, shards, classes)
    return shards


def write_shard(out: Path, number: int, samples: Iterable[Sample]) -> manifest.Shard:
    """One tar and its table of offsets, each renamed to its name when it is whole, the table last."""
    tar = out / tar_name(number)
    partial = tar.with_name(tar.name + ".partial")
    try:
        with partial.open("wb") as file:
            hashing = _Hashing(file)
            with TarWriter(hashing, user="", group="", mtime=0, encoder=False) as writer:
                for key, members in samples:
                    writer.write({"__key__": key, **members})
            file.flush()
            os.fsync(file.fileno())
        # The headers are read back, so what is indexed is what another reader will find.
        table, ignored = offsets.scan(partial)
        if ignored:
            raise ValueError(f"samples that no reader would find: {ignored[:3]}")
        partial.replace(tar)
    finally:
        partial.unlink(missing_ok=True)
    line = indexing.describe(table, tar, out, number, hashing.sha256.hexdigest())
    offsets.save(table, out / line.offsets)
    return line


def tar_name(number: int) -> str:
    """The name of a shard."""
    return f"shard-{number:06d}.tar"


def table_name(number: int) -> str:
    """The path of its table of offsets, from the folder."""
    return f"offsets/{number:06d}"


def refuse_limits(max_count: int, max_bytes: int) -> None:
    """Raise ``ShardError`` for limits that leave a shard nothing."""
    if max_count < 1 or max_bytes < 1:
        raise ShardError(f"max_count={max_count} and max_bytes={max_bytes} must be at least 1")


def make_room(out: Path, *, kept: int, besides: Sequence[str] = ()) -> None:
    """Make the folder, or clear it of what an unfinished call left, but for its first ``kept`` shards.

    Raises ``ShardError`` when it holds anything else (``besides`` names what may be there).
    """
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file; the shards need a folder of their own")
    out.mkdir(parents=True, exist_ok=True)
    staying = {tar_name(number) for number in range(kept)} | {"offsets", *besides}
    others = sorted(path.name for path in out.iterdir() if path.name not in besides and not _is_ours(path))
    if others:
        raise ShardError(f"{out} is not empty ({', '.join(others[:3])}): choose a new folder for the shards")
    for path in out.iterdir():
        if path.name not in staying:
            path.unlink()
    (out / "offsets").mkdir(exist_ok=True)
    tables = {Path(table_name(number)).name for number in range(kept)}
    for path in (out / "offsets").iterdir():
        if path.name not in tables:
            path.unlink()


def _is_ours(path: Path) -> bool:
    name = path.name.removesuffix(".partial")
    is_shard = name.startswith("shard-") and name.endswith(".tar") and name[6:-4].isdigit()
    return is_shard or name in ("offsets", manifest.ARRAYS) or path.name == f"{manifest.MANIFEST}.partial"


def tar_bytes(lengths: Iterable[int]) -> int:
    """What members of these lengths take up in a tar, bytes."""
    return sum(_BLOCK + _rounded(length, _BLOCK) for length in lengths)


def is_full(count: int, size: int, added: int, max_count: int, max_bytes: int) -> bool:
    """Whether a shard of ``count`` samples and ``size`` bytes has no room for another of ``added`` bytes."""
    return count == max_count or _rounded(size + added + 2 * _BLOCK, _RECORD) > max_bytes


def _by_size(samples: Iterable[Sample], max_count: int, max_bytes: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one shard; a shard is closed before its tar would exceed ``max_bytes``."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        added = tar_bytes(len(content) for content in sample[1].values())
        if group and is_full(len(group), size, added, max_count, max_bytes):
            yield group
            group, size = [], 0
        group.append(sample)
        size += added
    if group:
        yield group


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


class _Hashing:
    """A file that knows the SHA-256 of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)
