"""Which shards make up a folder's data set, and are they all there?

``index.json`` lists them (``shardlist`` of url, nsamples, filesize, as wids-style readers expect). Beside it
``index.npz`` holds the same as arrays, so that a hundred thousand shards open in a fraction of a second; it
names the digest of the JSON that it was made from, and is passed over when that has changed.
``excluded.jsonl`` takes samples or whole shards out of the set; ``verify`` writes it. How a sample is read is
left to ``index``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fd_scale.errors import ShardError

MANIFEST = "index.json"
ARRAYS = "index.npz"
EXCLUDED = "excluded.jsonl"
FORMAT_VERSION = 1
MAX_LISTED = 50
"""Longest list of faulty shards in one message."""
_STATTERS = 32
"""Threads that ask for file sizes where each answer takes long."""
_PROBED = 64
"""Files that are looked at one by one first, to see how long an answer takes."""
_MANY = 2000
"""Tables from which listing their folder beats asking for each."""
_NEAR_S = 100e-6
"""Longest mean answer of a file system that needs no threads."""


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    url: str
    """Path of the tar, relative to the index where it lies inside its folder; or a URL."""
    num_samples: int
    file_size: int
    """Bytes."""
    offsets: str
    """Path of the table of offsets, relative to the index."""
    sha256: str | None = None
    """Of the tar; known where this package wrote it."""


@dataclass(frozen=True, eq=False)
class Manifest:
    """The shards of one folder, column by column, without what is excluded."""

    folder: Path
    urls: tuple[str, ...]
    num_samples: np.ndarray
    """int64 per shard, as indexed."""
    file_sizes: np.ndarray
    """int64 per shard, bytes."""
    offsets: tuple[str, ...]
    classes: tuple[str, ...] | None
    fingerprint: str
    """SHA-256 over ordered file names, counts, sizes and exclusions: equal wherever the same shards lie."""
    excluded: Mapping[int, Mapping[int, str] | None] = field(default_factory=dict)
    """By shard: index -> key of the samples that are left out, or ``None`` for the whole shard."""

    @property
    def counts(self) -> np.ndarray:
        """int64 per shard: the samples that take part."""
        counts = self.num_samples.copy()
        for shard, samples in self.excluded.items():
            counts[shard] -= counts[shard] if samples is None else len(samples)
        return counts

    def faults(self, part: int = 0, of: int = 1) -> dict[int, str]:
        """What is wrong with the files of every ``of``-th shard, from shard ``part`` on, by shard.

        A local tar must have the size it was indexed with, and every table must be there. The size of remote
        shards is the business of ``remote``; shards that are excluded need not exist.
        """
        gone = {shard for shard, samples in self.excluded.items() if samples is None}
        mine = [n for n in range(part, len(self.urls), of) if n not in gone]
        folders = {os.path.dirname(self.offsets[n]) for n in mine}
        tables = _names_below(self.folder, folders) if len(mine) > _MANY else None
        sizes = self.file_sizes.tolist()
        place = os.open(self.folder, os.O_RDONLY)

        def look(shards: Sequence[int]) -> list[tuple[int, str]]:
            return [(n, fault) for n in shards if (fault := self._fault(place, n, sizes[n], tables))]

        try:
            first, rest = mine[:_PROBED], mine[_PROBED:]
            begin = time.perf_counter()
            found = look(first)
            # Threads help against the latency of a network; where files are near they only fight over Python.
            threads = 1 if time.perf_counter() - begin < _PROBED * _NEAR_S else _STATTERS
            with ThreadPoolExecutor(threads) as pool:
                pieces = pool.map(look, [rest[n::threads] for n in range(threads)])
                return dict(itertools.chain(found, *pieces))
        finally:
            os.close(place)

    def _fault(self, place: int, shard: int, expected: int, tables: set[str] | None) -> str:
        url = self.urls[shard]
        try:
            size = expected if is_remote(url) else os.stat(url, dir_fd=place).st_size
        except OSError as error:
            return f"{url}: {error.strerror}"
        if size != expected:
            return f"{url}: {size:,} bytes, {expected:,} when it was indexed"
        table = self.offsets[shard]
        if not (_is_there(place, table) if tables is None else table in tables):
            return f"{url}: its table {self.offsets[shard]} is missing"
        return ""


def is_remote(url: str) -> bool:
    """Whether a shard is named by a URL or a ``pipe:`` command, not by a path of this machine."""
    return "://" in url or url.startswith("pipe:")


def write(folder: Path, shards: Sequence[Shard], classes: Sequence[str] | None) -> None:
    """Write ``index.json``, in one motion, and its arrays; with it a folder becomes a set of shards."""
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
    raw = (json.dumps(content, indent=1) + "\n").encode()
    _write_arrays(folder, raw, shards, classes)
    _replace(folder / MANIFEST, raw)


def read(folder: str | Path) -> Manifest:
    """The manifest of a folder; raises ``ShardError`` when there is none, or a foreign one."""
    if is_remote(str(folder)):
        raise ShardError(
            f"data.shards={str(folder)!r} is remote, but the index of a data set must be local: "
            "fd-scale shards index URLS... --out FOLDER makes one whose shards stay where they are"
        )
    folder = Path(folder)
    raw = _raw(folder)
    found = _read_arrays(folder, raw) or of_shards(folder, *_parse(folder / MANIFEST, raw))
    return _without_excluded(found)


def read_shards(folder: Path) -> tuple[list[Shard], tuple[str, ...] | None]:
    """The lines of a manifest with all they hold, and the classes; for tools that look at every shard."""
    return _parse(folder / MANIFEST, _raw(folder))


def of_shards(folder: Path, shards: Sequence[Shard], classes: Sequence[str] | None) -> Manifest:
    """The same as columns."""
    return Manifest(
        folder=folder,
        urls=tuple(shard.url for shard in shards),
        num_samples=np.array([shard.num_samples for shard in shards], dtype=np.int64),
        file_sizes=np.array([shard.file_size for shard in shards], dtype=np.int64),
        offsets=tuple(shard.offsets for shard in shards),
        classes=tuple(classes) if classes is not None else None,
        fingerprint=_fingerprint(shards),
    )


def listed(title: str, lines: Sequence[str]) -> str:
    """A title and its lines, the longest lists cut."""
    rest = [f"... and {len(lines) - MAX_LISTED:,} more"] if len(lines) > MAX_LISTED else []
    return "\n  ".join([title, *lines[:MAX_LISTED], *rest])


def _raw(folder: Path) -> bytes:
    if not folder.is_dir():
        raise ShardError(
            f"{str(folder)!r} is not a folder of shards; fd-scale shards pack makes one from images"
        )
    path = folder / MANIFEST
    if not path.is_file():
        tars = len(list(folder.glob("*.tar")))
        how = (
            f"index its {tars} tar files with fd-scale shards index"
            if tars
            else "make it with fd-scale shards pack"
        )
        raise ShardError(f"{folder} has no {MANIFEST}, so it is not a set of shards: {how}")
    return path.read_bytes()


def _parse(path: Path, raw: bytes) -> tuple[list[Shard], tuple[str, ...] | None]:
    try:
        content = json.loads(raw)
        version = content["fd_scale_version"]
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{path} has version {version}, this program reads {FORMAT_VERSION}: index the shards again"
            )
        shards = [
            Shard(str(n["url"]), int(n["nsamples"]), int(n["filesize"]), str(n["offsets"]), n.get("sha256"))
            for n in content["shardlist"]
        ]
        classes = content.get("classes")
        return shards, tuple(classes) if classes is not None else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"{path} is not an index of this program ({type(error).__name__}: {error}): "
            "make it with fd-scale shards index"
        ) from None


def _write_arrays(folder: Path, raw: bytes, shards: Sequence[Shard], classes: Sequence[str] | None) -> None:
    columns = of_shards(folder, shards, classes)
    facts = {"fingerprint": columns.fingerprint, "classes": columns.classes, "version": FORMAT_VERSION}
    partial = folder / (ARRAYS + ".partial")
    with partial.open("wb") as file:
        np.savez(
            file,
            digest=np.frombuffer(hashlib.sha256(raw).digest(), np.uint8),
            num_samples=columns.num_samples,
            file_sizes=columns.file_sizes,
            urls=_blob(columns.urls),
            offsets=_blob(columns.offsets),
            facts=_blob([json.dumps(facts)]),
        )
    partial.replace(folder / ARRAYS)


def _read_arrays(folder: Path, raw: bytes) -> Manifest | None:
    """The manifest from its arrays; ``None`` when they are absent, damaged, or those of another JSON."""
    try:
        with np.load(folder / ARRAYS, allow_pickle=False) as arrays:
            if arrays["digest"].tobytes() != hashlib.sha256(raw).digest():
                return None
            (text,) = _names(arrays["facts"])
            facts = json.loads(text)
            if facts["version"] != FORMAT_VERSION:
                return None
            return Manifest(
                folder=folder,
                urls=_names(arrays["urls"]),
                num_samples=arrays["num_samples"],
                file_sizes=arrays["file_sizes"],
                offsets=_names(arrays["offsets"]),
                classes=tuple(facts["classes"]) if facts["classes"] is not None else None,
                fingerprint=facts["fingerprint"],
            )
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError):
        return None


def _blob(names: Sequence[str]) -> np.ndarray:
    return np.frombuffer("\0".join(names).encode("utf-8", "surrogateescape"), np.uint8)


def _names(blob: np.ndarray) -> tuple[str, ...]:
    return tuple(blob.tobytes().decode("utf-8", "surrogateescape").split("\0")) if len(blob) else ()


def _replace(path: Path, raw: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(raw)
    partial.replace(path)


def _is_there(place: int, path: str) -> bool:
    try:
        os.stat(path, dir_fd=place)
    except OSError:
        return False
    return True


def _names_below(folder: Path, parents: set[str]) -> set[str]:
    """The files of some folders, by path from ``folder``; one listing is a thousand times fewer questions."""
    names: set[str] = set()
    for parent in parents:
        try:
            names.update(os.path.join(parent, name) for name in os.listdir(folder / parent))
        except OSError:
            continue  # then its files are missing, which is said file by file
    return names


def _fingerprint(shards: Sequence[Shard]) -> str:
    lines = (f"{os.path.basename(shard.url)}\0{shard.num_samples}\0{shard.file_size}\n" for shard in shards)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _without_excluded(found: Manifest) -> Manifest:
    path = found.folder / EXCLUDED
    if not path.is_file():
        return found
    number = {url: shard for shard, url in enumerate(found.urls)}
    excluded: dict[int, dict[int, str] | None] = {}
    raw = path.read_bytes()
    try:
        for line in raw.decode("utf-8", "surrogateescape").splitlines():
            entry = json.loads(line)
            shard, index = number[entry["shard"]], entry["index"]
            if index is None:
                excluded[shard] = None
            elif not 0 <= index < found.num_samples[shard]:
                raise ValueError(f"{entry['shard']} has no sample {index}")
            elif (samples := excluded.setdefault(shard, {})) is not None:
                samples[index] = entry["key"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} does not fit {MANIFEST} ({type(error).__name__}: {error}): make it again with "
            f"fd-scale shards verify --exclude {found.folder}, or delete it to take all samples"
        ) from None
    if not excluded:
        return found
    mark = json.dumps([[s, i and sorted(i)] for s, i in sorted(excluded.items())])
    fingerprint = hashlib.sha256((found.fingerprint + mark).encode()).hexdigest()
    return Manifest(
        found.folder,
        found.urls,
        found.num_samples,
        found.file_sizes,
        found.offsets,
        found.classes,
        fingerprint,
        excluded,
    )
