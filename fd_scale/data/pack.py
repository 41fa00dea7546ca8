"""How does a folder of images become shards?

Once, up front: the images are shuffled over the whole data set, written to tars with their bytes kept, and
indexed. The same folder and seed give the same bytes. Existing tars need no packing: ``index.build_index``
serves them.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset import TarWriter

from fd_scale.data import index, offsets, philox
from fd_scale.data.offsets import IMAGE_EXTENSIONS
from fd_scale.errors import ShardError

MAX_COUNT = 10_000
MAX_BYTES = 2**30
KEY_LENGTH = 80
"""Longest key, characters, so that every member name fits the plain tar header of 100."""

_BLOCK, _RECORD = 512, 10_240
_OURS = re.compile(r"shard-\d{6}\.tar(\.partial)?|index\.json\.partial|offsets")

Sample = tuple[str, Mapping[str, bytes]]
"""A key without a dot, and the members of the sample by extension."""


@dataclass(frozen=True)
class PackReport:
    """What was written, and what in the source was not an image."""

    folder: Path
    num_shards: int
    num_samples: int
    num_bytes: int
    classes: tuple[str, ...] | None
    skipped: dict[str, int]
    """Files by extension that were left out since they are no images."""


@dataclass(frozen=True)
class _Image:
    path: Path
    key: str
    label: int | None


def pack(
    source: Path,
    out: Path,
    *,
    max_count: int = MAX_COUNT,
    max_bytes: int = MAX_BYTES,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Write the images of ``source`` as shards into ``out``: new, empty, or left unfinished by a pack.

    ``source`` is flat, or has one folder per class (ImageFolder), whose sorted names give the labels. A shard
    has at most ``max_count`` samples and, unless one sample is larger, ``max_bytes`` bytes. ``seed`` decides
    the order; ``limit`` keeps that many images, the first in that order. Raises ``ShardError``: no images,
    images both beside and inside class folders, an unreadable image, an ``out`` that holds something else.
    """
    images, classes, skipped = _find(Path(source))
    order = philox.permutation(philox.key("fd.pack", seed), len(images))[:limit]
    samples = (_read(images[number]) for number in order.tolist())
    shards = write_shards(
        samples,
        Path(out),
        max_count=max_count,
        max_bytes=max_bytes,
        classes=classes,
        total=len(order),
        progress=progress,
    )
    num_bytes = sum(shard.file_size for shard in shards)
    return PackReport(Path(out), len(shards), len(order), num_bytes, classes, skipped)


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    max_count: int = MAX_COUNT,
    max_bytes: int = MAX_BYTES,
    classes: Sequence[str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> list[index.Shard]:
    """Write samples, in their order, as shards with an index into ``out``; returns the lines of the manifest.

    Keys must be unique and have no dot, and each sample one image member. ``index.json`` comes last, so a
    folder that was not finished is not taken for a set of shards; the next call starts it again.
    """
    if max_count < 1 or max_bytes < 1:
        raise ShardError(f"max_count={max_count} and max_bytes={max_bytes} must be at least 1")
    _make_room(out)
    shards: list[index.Shard] = []
    with _bar(progress, f"packing into {out}", total) as advance:
        for number, group in enumerate(_by_size(samples, max_count, max_bytes)):
            shards.append(_write_shard(out, number, group))
            advance(len(group))
    index.write_manifest(out, shards, classes)
    return shards


def _find(source: Path) -> tuple[list[_Image], tuple[str, ...] | None, dict[str, int]]:
    """The images of a folder by relative path, their classes if any, and other files counted by suffix."""
    if not source.is_dir():
        raise ShardError(f"{source} is not a folder of images")
    found: list[Path] = []
    skipped: collections.Counter[str] = collections.Counter()
    for folder, _, names in _walk(source):
        for name in names:
            path = folder / name
            suffix = path.suffix.lower()
            if suffix[1:] in IMAGE_EXTENSIONS and not name.startswith("."):
                found.append(path.relative_to(source))
            else:
                skipped[suffix or name] += 1
    if not found:
        there = (
            ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(5)) or "no files at all"
        )
        raise ShardError(
            f"no images in {source}: it holds {there}; extensions looked for: {', '.join(IMAGE_EXTENSIONS)}"
        )
    found.sort(key=lambda path: path.as_posix())
    classes = _classes(source, found)
    label = {name: number for number, name in enumerate(classes or ())}
    keys = _keys(found)
    images = [
        _Image(source / path, key, label.get(path.parts[0])) for path, key in zip(found, keys, strict=True)
    ]
    return images, classes, dict(skipped)


def _walk(source: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Every folder once, through links too, as class folders are often links."""

    def refuse(error: OSError) -> None:
        raise ShardError(f"{error.filename} cannot be read: {error.strerror}")

    visited: set[str] = set()
    for folder, folders, names in os.walk(source, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        yield Path(folder), folders, names


def _classes(source: Path, images: Sequence[Path]) -> tuple[str, ...] | None:
    inside = sorted({path.parts[0] for path in images if len(path.parts) > 1})
    if not inside:
        return None
    if beside := [path for path in images if len(path.parts) == 1]:
        raise ShardError(
            f"{source} has {len(beside)} images beside its {len(inside)} folders of images "
            f"({beside[0]}, {inside[0]}/): put all images in class folders, or all in one folder"
        )
    return tuple(inside)


def _keys(paths: Sequence[Path]) -> list[str]:
    """A key for each relative path: letters, digits, ``_``, ``-`` and ``/`` alone, none twice."""
    keys: list[str] = []
    taken: set[str] = set()
    for path in paths:
        key = re.sub(r"[^A-Za-z0-9_/-]", "_", path.with_suffix("").as_posix())
        if len(key) > KEY_LENGTH or key in taken:
            key = f"{key[: KEY_LENGTH - 17]}_{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}"
        taken.add(key)
        keys.append(key)
    return keys


def _read(image: _Image) -> Sample:
    try:
        members = {image.path.suffix[1:].lower(): image.path.read_bytes()}
    except OSError as error:
        raise ShardError(f"{image.path} cannot be read: {error.strerror}") from None
    if image.label is not None:
        members["cls"] = str(image.label).encode()
    return image.key, members


def _make_room(out: Path) -> None:
    """Make the folder, or clear it of what an unfinished pack left; anything else is a reason to stop."""
    if out.exists() and not out.is_dir():
        raise ShardError(f"{out} is a file; the shards need a folder of their own")
    out.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in out.iterdir() if not _OURS.fullmatch(path.name))
    if others:
        raise ShardError(f"{out} is not empty ({', '.join(others[:3])}): choose a new folder for the shards")
    for path in [*out.glob("shard-*"), *out.glob("offsets/*")]:
        path.unlink()
    (out / "offsets").mkdir(exist_ok=True)


def _by_size(samples: Iterable[Sample], max_count: int, max_bytes: int) -> Iterator[list[Sample]]:
    """Consecutive samples of one shard; a shard is closed before its tar would exceed ``max_bytes``."""
    group: list[Sample] = []
    size = 0
    for sample in samples:
        added = sum(_BLOCK + _rounded(len(content), _BLOCK) for content in sample[1].values())
        full = len(group) == max_count or _rounded(size + added + 2 * _BLOCK, _RECORD) > max_bytes
        if group and full:
            yield group
            group, size = [], 0
        group.append(sample)
        size += added
    if group:
        yield group


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _write_shard(out: Path, number: int, samples: Sequence[Sample]) -> index.Shard:
    """One tar and its table of offsets, each renamed to its name when it is whole."""
    tar = out / f"shard-{number:06d}.tar"
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
    line = index.describe(table, tar, out, number, hashing.sha256.hexdigest())
    offsets.save(table, out / line.offsets)
    return line


class _Hashing:
    """A file that knows the SHA-256 of what went through it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        return self.file.write(content)


@contextlib.contextmanager
def _bar(
    progress: Progress | None, title: str, total: int | None
) -> Iterator[collections.abc.Callable[[int], None]]:
    """A function that advances a task of the progress display handed in, or of one of our own."""
    if progress is None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as own:
            task = own.add_task(title, total=total)
            yield lambda count: own.advance(task, count)
    else:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
