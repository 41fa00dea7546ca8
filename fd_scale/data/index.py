"""What is in a folder of tar shards, and how is one sample of it read?

``index.json`` lists the shards (``shardlist`` of url, nsamples, filesize, as wids-style readers expect); a
table of offsets per shard lies in ``offsets/``. The tars may lie in the same folder or anywhere else on this
machine. Only the image and the label of a sample are ever read: nothing in a shard is unpickled, run or
written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fd_scale.data import offsets
from fd_scale.data.faults import LabelError, ReadError
from fd_scale.data.offsets import Ignored, Table
from fd_scale.errors import ShardError

MANIFEST = "index.json"
FORMAT_VERSION = 1
MAX_LISTED = 50
"""Longest list of faulty shards in one message."""


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    url: str
    """Path of the tar, relative to the index where it lies inside its folder."""
    num_samples: int
    file_size: int
    """Bytes."""
    offsets: str
    """Path of the table of offsets, relative to the index."""
    sha256: str | None = None
    """Of the tar; known where this package wrote it."""


@dataclass(frozen=True)
class RawSample:
    """The bytes of one sample, as they lie in the shard."""

    key: str
    shard: str
    image: bytes
    label: int | None


@dataclass(frozen=True)
class IndexReport:
    """What was indexed, and every member that was left out."""

    folder: Path
    num_shards: int
    num_samples: int
    ignored: tuple[Ignored, ...]


class _Descriptor:
    """An open file that is closed when nobody refers to it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class ShardSet:
    """A folder of shards, open for reading by (shard, index in shard); see ``ShardSet.open``.

    Files and tables are opened when first needed and kept while there is room. One thread at a time;
    processes may share a set by fork or pickle.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], classes: tuple[str, ...] | None) -> None:
        self.folder, self.classes = folder, classes
        self.names = tuple(shard.url for shard in shards)
        self.counts = np.array([shard.num_samples for shard in shards], dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.fingerprint = _fingerprint(shards)
        self._shards = tuple(shards)
        # A table takes a descriptor too; half of what a process may have is left for everyone else.
        room = max(8, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8192) // 4)
        self._table = functools.lru_cache(maxsize=room)(self._load_table)
        self._descriptor = functools.lru_cache(maxsize=room)(self._open_file)

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Read the manifest of a folder; check that every shard is there with the size it had when indexed.

        Raises ``ShardError``: no such folder, no or a foreign manifest, no samples, and all missing or
        changed shards at once.
        """
        folder = Path(folder)
        shards, classes = _read_manifest(folder)
        _check_files(folder, shards)
        if not any(shard.num_samples for shard in shards):
            raise ShardError(
                f"the {len(shards)} shards of {folder} hold no samples: give data.shards another folder"
            )
        return cls(folder, shards, classes)

    def key(self, shard: int, index: int) -> str:
        """The key of a sample; raises ``ShardError`` when the shard's table of offsets cannot be used."""
        return self._table(shard).key(index)

    def read(self, shard: int, index: int, *, label: bool = True) -> RawSample:
        """The image bytes of a sample and, if asked for, its label (``None`` where it has none).

        Raises ``SampleError`` when the bytes cannot be read or the label is not a whole number.
        """
        table = self._table(shard)
        (_, offset, length), *others = table.members(index)
        image = self._bytes(shard, offset, length)
        found: int | None = None
        for extension, offset, length in others if label else ():
            if extension == "cls" or (extension == "json" and found is None):
                found = _label(extension, self._bytes(shard, offset, length))
        return RawSample(table.key(index), self.names[shard], image, found)

    def close(self) -> None:
        """Let go of all files; the set can still be read, and opens them again."""
        self._table.cache_clear()
        self._descriptor.cache_clear()

    def _load_table(self, number: int) -> Table:
        shard = self._shards[number]
        table = offsets.load(self.folder / shard.offsets)
        if (table.num_samples, table.file_size) != (shard.num_samples, shard.file_size):
            raise ShardError(
                f"{self.folder / shard.offsets} describes {table.num_samples} samples in {table.file_size:,} "
                f"bytes, {MANIFEST} {shard.num_samples} in {shard.file_size:,} for {shard.url}: "
                "index the shards again"
            )
        return table

    def _open_file(self, number: int) -> _Descriptor:
        return _Descriptor(self.folder / self._shards[number].url)

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        try:
            content = os.pread(self._descriptor(shard).number, length, offset)
        except OSError as error:
            raise ReadError(f"{self.names[shard]}: {error.strerror}") from None
        if len(content) != length:  # pread is short only at the end of a file, or beyond 2 GiB
            raise ReadError(
                f"{self.names[shard]} ends inside the sample: it has changed since it was indexed"
            )
        return content

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.folder, self._shards, self.classes)


def find_tars(folder: Path) -> list[Path]:
    """The tar files directly in a folder, by name; raises ``ShardError`` when there is none."""
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not tars:
        raise ShardError(f"no .tar files in {folder}")
    return tars


def build_index(tars: Sequence[Path], folder: Path, *, classes: Sequence[str] | None = None) -> IndexReport:
    """Index existing tar files, in this order, by their headers, and write the manifest into ``folder``.

    Raises ``ShardError`` that lists every tar that is damaged, or when no sample has an image.
    """
    (folder / "offsets").mkdir(parents=True, exist_ok=True)
    shards: list[Shard] = []
    ignored: list[Ignored] = []
    damaged: list[str] = []
    for number, tar in enumerate(tars):
        try:
            table, left_out = offsets.scan(tar)
        except ShardError as error:
            damaged.append(str(error))
            continue
        ignored += left_out
        shards.append(describe(table, tar, folder, number))
        offsets.save(table, folder / shards[-1].offsets)
    if damaged:
        raise ShardError(_listed("damaged shards; replace them, or leave them out:", damaged))
    total = sum(shard.num_samples for shard in shards)
    if not total:
        raise ShardError(
            f"no sample with an image in {len(tars)} tar files; extensions looked for: "
            f"{', '.join(offsets.IMAGE_EXTENSIONS)}" + "".join(f"; {i.name}: {i.reason}" for i in ignored[:3])
        )
    write_manifest(folder, shards, classes)
    return IndexReport(folder, len(shards), total, tuple(ignored))


def describe(table: Table, tar: Path, folder: Path, number: int, sha256: str | None = None) -> Shard:
    """The manifest line of shard ``number``; its table of offsets is to be saved under the name there."""
    tar, folder = tar.resolve(), folder.resolve()
    url = str(tar.relative_to(folder)) if tar.is_relative_to(folder) else str(tar)
    return Shard(url, table.num_samples, table.file_size, f"offsets/{number:06d}", sha256)


def write_manifest(folder: Path, shards: Sequence[Shard], classes: Sequence[str] | None) -> None:
    """Write ``index.json`` in one motion; with it a folder becomes a set of shards."""
    lines = []
    for shard in shards:
        line: dict[str, Any] = {"url": shard.url, "nsamples": shard.num_samples, "filesize": shard.file_size}
        lines.append({**line, "offsets": shard.offsets, **({"sha256": shard.sha256} if shard.sha256 else {})})
    content = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "fd_scale_version": FORMAT_VERSION,
        "classes": list(classes) if classes is not None else None,
        "shardlist": lines,
    }
    partial = folder / (MANIFEST + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST)


def _read_manifest(folder: Path) -> tuple[list[Shard], tuple[str, ...] | None]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise ShardError(
            f"data.shards={str(folder)!r} is not a folder; fd-scale shards pack makes one from images"
        )
    if not path.is_file():
        tars = len(list(folder.glob("*.tar")))
        how = (
            f"index its {tars} tar files with fd-scale shards index"
            if tars
            else "make it with fd-scale shards pack"
        )
        raise ShardError(f"{folder} has no {MANIFEST}, so it is not a set of shards: {how}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["fd_scale_version"]
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has version {version}, this program reads {FORMAT_VERSION}: index the shards again"
            )
        shards = [_shard_of(line) for line in content["shardlist"]]
        classes = content.get("classes")
        return shards, tuple(classes) if classes is not None else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path} is not an index of this program ({type(error).__name__}: {error}): "
            "make it with fd-scale shards index"
        ) from None


def _shard_of(line: Mapping[str, Any]) -> Shard:
    if "://" in line["url"] or line["url"].startswith("pipe:"):
        raise ShardError(f"{MANIFEST} names the remote shard {line['url']}; only local files can be read")
    return Shard(
        line["url"], int(line["nsamples"]), int(line["filesize"]), line["offsets"], line.get("sha256")
    )


def _check_files(folder: Path, shards: Sequence[Shard]) -> None:
    """Every tar and table must be there, every tar in its size; one error lists all that are not."""

    def fault(shard: Shard) -> str:
        try:
            size = os.stat(folder / shard.url).st_size
        except OSError as error:
            return f"{shard.url}: {error.strerror}"
        if size != shard.file_size:
            return f"{shard.url}: {size:,} bytes, {shard.file_size:,} when it was indexed"
        return (
            ""
            if os.path.exists(folder / shard.offsets)
            else f"{shard.url}: its table {shard.offsets} is missing"
        )

    with ThreadPoolExecutor(32) as pool:  # a stat of a network file system is mostly waiting
        faults = [text for text in pool.map(fault, shards, chunksize=256) if text]
    if faults:
        count = f"{len(faults)} of {len(shards)} shards"
        title = f"{count} of {folder} are missing or have changed; restore them, or index again:"
        raise ShardError(_listed(title, faults))


def _listed(title: str, lines: Sequence[str]) -> str:
    rest = [f"... and {len(lines) - MAX_LISTED:,} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([title, *lines[:MAX_LISTED], *rest])


def _fingerprint(shards: Sequence[Shard]) -> str:
    """SHA-256 over the ordered file names, counts and sizes; equal wherever the same shards lie."""
    lines = (f"{os.path.basename(shard.url)}\0{shard.num_samples}\0{shard.file_size}\n" for shard in shards)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _label(extension: str, content: bytes) -> int | None:
    try:
        if extension == "cls":
            return int(content)
        record = json.loads(content)
    except ValueError:
        raise LabelError(f".{extension} holds {content[:40]!r}, not a whole number") from None
    label = record.get("label") if isinstance(record, dict) else None
    if label is not None and type(label) is not int:
        raise LabelError(f'"label" in .json is {label!r}, not a whole number')
    return label
