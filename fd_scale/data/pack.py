"""How do images become shards?

Once, up front: the samples of a source are shuffled over the whole data set and written to tars, their bytes
kept unless smaller pictures are asked for. The same source and seed give the same bytes, by any number of
processes, in one go or in several. Existing tars need no packing: ``indexing`` serves them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from fd_scale.data import decode, indexing, manifest, offsets, philox
from fd_scale.data.offsets import IMAGE_EXTENSIONS
from fd_scale.data.pool import bar, each
from fd_scale.data.sources import Entry, Source, image_folder
from fd_scale.data.writer import (
    MAX_BYTES,
    MAX_COUNT,
    is_full,
    make_room,
    refuse_limits,
    table_name,
    tar_name,
    write_shard,
)
from fd_scale.errors import ShardError

QUALITY = 95
"""Of JPEGs that are written because pictures were made smaller."""
_JOB = "pack.json"
"""Says of an unfinished folder what was being packed; gone once it is finished."""
_VERSION = 1


@dataclass(frozen=True)
class Encoding:
    """What is done to the bytes of an image: nothing, unless asked."""

    short_side: int | None = None
    """Larger pictures are shrunk so that their short side has so many pixels, and written as JPEG."""
    quality: int | None = None
    """All pictures are written as JPEG of this quality; ``None`` writes those that are shrunk, at 95."""

    @property
    def keeps(self) -> bool:
        """Whether all bytes stay as they are."""
        return self.short_side is None and self.quality is None


@dataclass(frozen=True)
class PackReport:
    """What was written, and what of the source was not."""

    folder: Path
    num_shards: int
    num_samples: int
    num_bytes: int
    classes: tuple[str, ...] | None
    skipped: Mapping[str, int]
    """What the source left out, and how often."""
    unreadable: tuple[str, ...]
    """Samples left out since they had to be decoded and could not be, with the reason."""
    num_resumed: int
    """Shards that an earlier call had finished."""


@dataclass(frozen=True)
class _Written:
    shard: manifest.Shard
    unreadable: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Task:
    """One shard to write; what travels to a process that packs."""

    number: int
    entries: Sequence[Entry]


def pack(
    source: Source | Path,
    out: Path,
    *,
    max_count: int = MAX_COUNT,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    limit: int | None = None,
    encoding: Encoding = Encoding(),
    workers: int = 1,
    progress: Progress | None = None,
) -> PackReport:
    """Write a source (a path is a folder of images) as shards into ``out``: new, empty, or left unfinished.

    A shard has at most ``max_count`` samples and, unless one sample is larger, ``max_bytes`` bytes, counted
    before pictures are made smaller. ``seed`` decides the order; ``limit`` keeps that many samples, the first
    in that order. What an earlier call for the same had finished is kept. Raises ``ShardError``: nothing to
    pack, an unreadable file, an ``out`` that holds something else.
    """
    found = source if isinstance(source, Source) else image_folder(Path(source))
    out = Path(out)
    refuse_limits(max_count, max_bytes)
    order = philox.permutation(philox.key("fd.pack", seed), len(found.entries))[:limit]
    tasks = _tasks([found.entries[number] for number in order.tolist()], max_count, max_bytes)
    kept = _resume(out, _job(found, tasks, encoding), tasks)
    written: list[_Written] = [_Written(shard) for shard in kept]
    with bar(progress, f"packing into {out}", len(order)) as advance:
        advance(sum(shard.num_samples for shard in kept))
        write = _Write(found, out, encoding)
        for task, one in zip(tasks[len(kept) :], each(write, tasks[len(kept) :], workers), strict=True):
            written.append(one)
            advance(len(task.entries))
    shards = [one.shard for one in written]
    total = sum(shard.num_samples for shard in shards)
    unreadable = tuple(line for one in written for line in one.unreadable)
    if not total:
        raise ShardError(manifest.listed(f"none of the samples of {found.name} can be decoded:", unreadable))
    manifest.write(out, shards, found.classes)
    (out / _JOB).unlink()
    return PackReport(
        out,
        len(shards),
        total,
        sum(shard.file_size for shard in shards),
        found.classes,
        found.skipped,
        unreadable,
        len(kept),
    )


def _tasks(entries: Iterable[Entry], max_count: int, max_bytes: int) -> list[_Task]:
    """Consecutive entries of one shard; a shard is closed before its tar would exceed ``max_bytes``."""
    groups: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not groups or is_full(len(groups[-1]), size, entry.size, max_count, max_bytes):
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.size
    return [_Task(number, group) for number, group in enumerate(groups)]


def _job(source: Source, tasks: Sequence[_Task], encoding: Encoding) -> str:
    """Hex digits of all that decides the bytes of the shards."""
    digest = hashlib.sha256(f"{_VERSION} {source.classes} {encoding}".encode("utf-8", "surrogateescape"))
    for task in tasks:
        digest.update(f"shard {task.number}\n".encode())
        for entry in task.entries:
            line = (entry.key, entry.place, entry.size, entry.stamp, entry.label)
            digest.update(repr(line).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _resume(out: Path, job: str, tasks: Sequence[_Task]) -> list[manifest.Shard]:
    """The first shards, if an earlier call for the same job finished them; the rest of the folder is cleared.

    Shards are written in order, but for the few that were under way at a time.
    """
    kept = list(_finished(out, tasks)) if _recorded(out) == job else []
    make_room(out, kept=len(kept), besides=[_JOB])
    (out / _JOB).write_text(json.dumps({"job": job}) + "\n")
    return kept


def _recorded(out: Path) -> str | None:
    try:
        found = json.loads((out / _JOB).read_text())
    except (OSError, ValueError):
        return None
    return found.get("job") if isinstance(found, dict) else None


def _finished(out: Path, tasks: Sequence[_Task]) -> Iterator[manifest.Shard]:
    """The shards that are whole, up to the first that is not."""
    for task in tasks:
        tar, path = out / tar_name(task.number), out / table_name(task.number)
        try:
            table = offsets.load(path)
            if table.file_size != tar.stat().st_size:
                return
            with tar.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (ShardError, OSError):
            return
        yield indexing.describe(table, tar, out, task.number, digest)


@dataclass(frozen=True)
class _Write:
    """Writes the shard of a task, in whichever process."""

    source: Source
    out: Path
    encoding: Encoding

    def __call__(self, task: _Task) -> _Written:
        unreadable: list[str] = []
        shard = write_shard(self.out, task.number, self._samples(task.entries, unreadable))
        return _Written(shard, tuple(unreadable))

    def _samples(
        self, entries: Sequence[Entry], unreadable: list[str]
    ) -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for entry in entries:
            members = self.source.read(entry)
            try:
                yield entry.key, members if self.encoding.keeps else _encoded(members, self.encoding)
            except decode.DecodeError as error:
                unreadable.append(f"{entry.place}: {error}")

    def __reduce__(self) -> tuple[object, ...]:
        # The entries stay behind: each process gets those of its own tasks.
        source = Source(self.source.name, (), self.source.read, self.source.classes)
        return _Write, (source, self.out, self.encoding)


def _encoded(members: Mapping[str, bytes], encoding: Encoding) -> dict[str, bytes]:
    """The members with the image as asked; what need not change keeps its bytes."""
    (extension,) = [name for name in members if name in IMAGE_EXTENSIONS]
    content = members[extension]
    picture = decode.read(content)
    scale = (encoding.short_side or 0) / min(picture.height, picture.width)
    shrinks = 0 < scale < 1
    if not shrinks and encoding.quality is None:
        return dict(members)
    image = Image.fromarray(picture.whole())
    if shrinks:
        size = (max(1, round(side * scale)) for side in (picture.width, picture.height))
        image = image.resize(tuple(size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    written = BytesIO()
    exif = {"exif": found} if (found := _exif(content)) else {}  # its orientation is the reader's business
    image.save(written, "JPEG", quality=encoding.quality or QUALITY, **exif)
    others = {name: member for name, member in members.items() if name != extension}
    return {"jpg": written.getvalue(), **others}


def _exif(content: bytes) -> bytes | None:
    """The metadata of a JPEG, as they are."""
    if not content.startswith(b"\xff\xd8"):
        return None
    with Image.open(BytesIO(content), formats=["JPEG"]) as opened:
        found = opened.info.get("exif")
    return found if isinstance(found, bytes) else None
