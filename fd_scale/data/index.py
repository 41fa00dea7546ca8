"""How is one sample of a folder of tar shards read?

The manifest says which shards there are, a table of offsets per shard where each sample lies. The tars may
lie in the same folder, elsewhere on this machine, or behind URLs (``remote``). Only the image and the label
of a sample are ever read: nothing in a shard is unpickled, run or written.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fd_scale.data import manifest, offsets
from fd_scale.data.cache import Cache
from fd_scale.data.faults import LabelError, LostShardError
from fd_scale.data.manifest import EXCLUDED, MANIFEST, Manifest, is_remote
from fd_scale.data.offsets import Table
from fd_scale.data.plan import Need
from fd_scale.data.remote import Patience, Remote
from fd_scale.data.ring import Span
from fd_scale.data.stream import Place, Stream
from fd_scale.errors import ShardError


class RawSample(NamedTuple):
    """The bytes of one sample, as they lie in the shard."""

    key: str
    shard: str
    image: bytes
    label: int | None


class _Descriptor:
    """An open file that is closed when nobody refers to it any more."""

    def __init__(self, path: str | Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True)
class Access:
    """How remote shards are reached: by copies in a cache, or else streamed through memory."""

    cache: Path | None = None
    cache_bytes: int | None = None
    allow_pipe: bool = False
    patience: Patience = field(default_factory=Patience)


class ShardSet:
    """One or several folders of shards, open for reading by (shard, index in shard); see ``ShardSet.open``.

    The shards of all folders are numbered through. Files and tables are opened when first needed and kept
    while there is room. One thread at a time; processes may share a set by fork or pickle.
    """

    def __init__(self, folders: Sequence[Manifest], access: Access = Access()) -> None:
        self.folders, self.access = tuple(folders), access
        self.classes = folders[0].classes
        self.shards_per_folder = tuple(len(folder.urls) for folder in folders)
        one = len(folders) == 1
        self.names = tuple(
            url if one or is_remote(url) else f"{f.folder}/{url}" for f in folders for url in f.urls
        )
        self.counts = np.concatenate([folder.counts for folder in folders])
        self.num_samples = int(self.counts.sum())
        prints = [folder.fingerprint for folder in folders]
        self.fingerprint = prints[0] if one else hashlib.sha256("".join(prints).encode()).hexdigest()
        # A table takes a descriptor too; half of what a process may have is left for everyone else.
        room = max(8, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 8192) // 4)
        self._table = functools.lru_cache(maxsize=room)(self._load_table)
        self._descriptor = functools.lru_cache(maxsize=room)(self._open_file)
        self._kept = self._find_kept()
        self._remote = Remote(access.patience, allow_pipe=access.allow_pipe)
        far = [name for name in self.names if is_remote(name)]
        self._remote.check(far)
        self._cache: Cache | None = None
        self._stream: Stream | None = None
        if far and access.cache is not None:
            self._cache = Cache(access.cache, access.cache_bytes, self._remote)
        elif far:
            self._stream = Stream(self._remote, self._locate_span)

    @classmethod
    def open(cls, *folders: str | Path, access: Access = Access(), check: bool = True) -> ShardSet:
        """Read the manifests of folders; check that every shard is there with the size it had when indexed.

        Raises ``ShardError``: no such folder, no or a foreign manifest, no samples, and all missing or
        changed shards at once. Servers are asked for the sizes of remote shards. ``check=False`` leaves all
        this to ``refuse_faults``.
        """
        found = [manifest.read(folder) for folder in folders]
        for one in found:
            if not one.counts.any():
                raise ShardError(
                    f"the {len(one.urls)} shards of {one.folder} hold no samples: "
                    "give data.shards another folder"
                )
        shards = cls(found, access)
        if check:
            shards.refuse_faults(shards.faults())
        return shards

    def faults(self, part: int = 0, of: int = 1) -> list[dict[int, str]]:
        """By folder and shard, what is wrong with the files of every ``of``-th shard, from ``part`` on.

        Processes may share the work and refuse the sum of what they found.
        """
        return [self._far_faults(folder, part, of) | folder.faults(part, of) for folder in self.folders]

    def refuse_faults(self, *parts: Sequence[Mapping[int, str]]) -> None:
        """Raise one ``ShardError`` with all that ``faults`` found in each part, if it found anything."""
        for number, folder in enumerate(self.folders):
            found = {shard: line for part in parts for shard, line in part[number].items()}
            if found:
                count = f"{len(found)} of {len(folder.urls)} shards of {folder.folder}"
                title = f"{count} are missing or have changed; restore them, or index again:"
                raise ShardError(manifest.listed(title, [line for _, line in sorted(found.items())]))

    def key(self, shard: int, index: int) -> str:
        """The key of a sample; raises ``ShardError`` when the shard's table of offsets cannot be used."""
        return self._table(shard).key(self._place(shard, index))

    def read(self, shard: int, index: int, *, label: bool = True) -> RawSample:
        """The image bytes of a sample and, if asked for, its label (``None`` where it has none).

        Raises ``SampleError`` when the bytes cannot be read or the label is not a whole number.
        """
        if self._kept:
            index = self._place(shard, index)
        table = self._table(shard)
        image = self._bytes(shard, *table.image(index))
        found = self._label(shard, index) if label else None
        return RawSample(table.key(index), self.names[shard], image, found)

    def members(self, shard: int, index: int) -> list[tuple[str, int, int]]:
        """(extension, offset, length) of each member of a sample, the image first."""
        return self._table(shard).members(self._place(shard, index))

    def read_members(self, shard: int, index: int) -> dict[str, bytes]:
        """All members of a sample by extension, the image first; raises ``SampleError``."""
        members = self.members(shard, index)
        return {name: self._bytes(shard, offset, length) for name, offset, length in members}

    def verify_command(self, name: str) -> str:
        """How to look into the shard of this name."""
        for folder in self.folders:
            url = name.removeprefix(f"{folder.folder}/")
            if url in folder.urls:
                return f"fd-scale shards verify --decode --only {url} {folder.folder}"
        return "fd-scale shards verify --decode"

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return int(sum(folder.file_sizes.sum() for folder in self.folders))

    @property
    def largest_remote_bytes(self) -> int:
        """Size of the largest remote shard, 0 where there is none."""
        far = [
            folder.file_sizes[[is_remote(url) for url in folder.urls]].max(initial=0)
            for folder in self.folders
        ]
        return int(max(far))

    @property
    def needs_telling(self) -> bool:
        """Whether ``hold`` must say ahead what will be read, as there is no random access."""
        return self._stream is not None

    def hold(self, need: Need) -> None:
        """Have these samples at hand for the ``read``s that follow; others are let go."""
        if self._stream is not None:
            self._stream.hold(need)

    def close(self) -> None:
        """Let go of all files; the set can still be read, and opens them again."""
        self._table.cache_clear()
        self._descriptor.cache_clear()

    def _find_kept(self) -> dict[int, np.ndarray]:
        """Of every shard that has excluded samples: the places of the others."""
        kept = {}
        for first, folder in zip(self._first_shards(), self.folders, strict=True):
            for shard, samples in folder.excluded.items():
                everything = np.arange(folder.num_samples[shard])
                kept[first + shard] = np.delete(everything, sorted(samples or everything))
        return kept

    def _first_shards(self) -> list[int]:
        return [sum(self.shards_per_folder[:number]) for number in range(len(self.folders))]

    def _locate(self, shard: int) -> tuple[Manifest, int]:
        """The folder that a shard belongs to, and its number there."""
        number = int(np.searchsorted(np.cumsum(self.shards_per_folder), shard, side="right"))
        return self.folders[number], shard - self._first_shards()[number]

    def _place(self, shard: int, index: int) -> int:
        """Where a sample stands in the table of its shard, excluded ones counted."""
        return int(self._kept[shard][index]) if shard in self._kept else index

    def _load_table(self, shard: int) -> Table:
        folder, number = self._locate(shard)
        path = folder.folder / folder.offsets[number]
        table = offsets.load(path)
        expected = int(folder.num_samples[number]), int(folder.file_sizes[number])
        if (table.num_samples, table.file_size) != expected:
            raise ShardError(
                f"{path} describes {table.num_samples} samples in {table.file_size:,} bytes, {MANIFEST} "
                f"{expected[0]} in {expected[1]:,} for {folder.urls[number]}: index the shards again"
            )
        for index, key in (folder.excluded.get(number) or {}).items():
            if table.key(index) != key:
                raise ShardError(
                    f"{folder.folder / EXCLUDED} excludes sample {index} of {folder.urls[number]} as {key}, "
                    f"but its key is {table.key(index)}: make it again with fd-scale shards verify --exclude"
                )
        return table

    def _open_file(self, shard: int) -> _Descriptor:
        folder, number = self._locate(shard)
        url = folder.urls[number]
        if self._cache is not None and is_remote(url):
            return _Descriptor(self._cache.path(url, int(folder.file_sizes[number])))
        return _Descriptor(os.path.join(folder.folder, url))

    def _far_faults(self, folder: Manifest, part: int, of: int) -> dict[int, str]:
        gone = {shard for shard, samples in folder.excluded.items() if samples is None}
        mine = [n for n in range(part, len(folder.urls), of) if n not in gone and is_remote(folder.urls[n])]
        sizes = [int(folder.file_sizes[n]) for n in mine]
        faults = self._remote.faults([folder.urls[n] for n in mine], sizes)
        return {n: fault for n, fault in zip(mine, faults, strict=True) if fault}

    def _far_place(self, shard: int, begin: int, end: int) -> Place:
        folder, number = self._locate(shard)
        return Place(folder.urls[number], begin, end, int(folder.file_sizes[number]))

    def _locate_span(self, span: Span) -> Place:
        """The bytes of all samples of a span, and of what lies between them."""
        first, last = self._place(span.shard, span.first), self._place(span.shard, span.stop - 1)
        return self._far_place(span.shard, *self._table(span.shard).extent(first, last))

    def _bytes(self, shard: int, offset: int, length: int) -> bytes:
        if self._stream is not None and is_remote(self.names[shard]):
            return self._stream.read(shard, self._far_place(shard, offset, offset + length))
        try:
            content = os.pread(self._descriptor(shard).number, length, offset)
        except OSError as error:
            raise LostShardError(f"{self.names[shard]}: {error.strerror}") from None
        if len(content) != length:  # pread is short only at the end of a file, or beyond 2 GiB
            raise LostShardError(
                f"{self.names[shard]} ends inside the sample: it has changed since it was indexed"
            )
        return content

    def _label(self, shard: int, index: int) -> int | None:
        found: int | None = None
        for extension, offset, length in self._table(shard).members(index)[1:]:
            if extension == "cls" or (extension == "json" and found is None):
                found = _label_in(extension, self._bytes(shard, offset, length))
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardSet, (self.folders, self.access)


def _label_in(extension: str, content: bytes) -> int | None:
    try:
        record = int(content) if extension == "cls" else json.loads(content)
    except ValueError:
        raise LabelError(f".{extension} holds {content[:40]!r}, not a whole number") from None
    if extension == "json":
        record = record.get("label") if isinstance(record, dict) else None
    if record is not None and (type(record) is not int or abs(record) >= 2**63):
        raise LabelError(f"the label in .{extension} is {record!r}, not a whole number of 64 bits")
    return record
