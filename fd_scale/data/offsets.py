"""Where does every member of one tar shard begin, and how long is it?

Found by reading the headers alone, kept in a small binary table beside the index, and mapped into memory when
a sample of the shard is first asked for. A table also knows the sample keys. Which member is the image and
which the label, and the list of shards, are the business of ``index``.

Names are understood as WebDataset does: key and extension part at the first dot of the file name, and the
members of a sample stand side by side.
"""

from __future__ import annotations

import mmap
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fd_scale.errors import ShardError

IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2",
)  # fmt: skip
"""Lower-case extensions of what is taken for an image; its content decides how it is read."""

_MAGIC = b"fdscale1"
_HEADER = struct.Struct("<8s5Q")
_BLOCK = 512


@dataclass(frozen=True)
class Ignored:
    """A member or sample of a shard that the index leaves out, and why."""

    shard: str
    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Table:
    """The members of one shard, sample by sample, the image of each first."""

    file_size: int
    """Bytes of the tar that the table describes."""
    offsets: np.ndarray
    """uint64 per member: where its bytes begin in the tar."""
    lengths: np.ndarray
    """uint64 per member, bytes."""
    first_members: np.ndarray
    """uint32, samples + 1: the members of sample i are first_members[i] .. first_members[i + 1] - 1."""
    key_ends: np.ndarray
    """uint32 per sample: where its key ends in ``keys``."""
    extension_ids: np.ndarray
    """uint8 per member, into ``extensions``."""
    extensions: tuple[str, ...]
    keys: bytes | memoryview
    """All keys end to end, UTF-8."""

    @property
    def num_samples(self) -> int:
        return len(self.key_ends)

    def key(self, sample: int) -> str:
        """The key of a sample."""
        begin = self.key_ends.item(sample - 1) if sample else 0
        return str(self.keys[begin : self.key_ends.item(sample)], "utf-8", "surrogateescape")

    def image(self, sample: int) -> tuple[int, int]:
        """Offset and length of the image of a sample."""
        member = self.first_members.item(sample)
        return self.offsets.item(member), self.lengths.item(member)

    def extent(self, first: int, last: int) -> tuple[int, int]:
        """Where the bytes of samples ``first`` .. ``last`` begin, and where they end."""
        span = slice(int(self.first_members[first]), int(self.first_members[last + 1]))
        return int(self.offsets[span].min()), int((self.offsets[span] + self.lengths[span]).max())

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, length) of each member of a sample, the image first."""
        members = range(self.first_members.item(sample), self.first_members.item(sample + 1))
        return [
            (self.extensions[self.extension_ids.item(n)], self.offsets.item(n), self.lengths.item(n))
            for n in members
        ]


def scan(path: Path) -> tuple[Table, list[Ignored]]:
    """Read the headers of a tar: its table, and what was left out of it.

    Raises ``ShardError`` when the file is no uncompressed, complete tar: a truncated or damaged one is never
    indexed.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples, ignored = _group(path.name, _regular_members(tar, path))
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, UnicodeError) as error:
        raise ShardError(f"{path} is not a complete, uncompressed tar file: {error}") from None
    return _table(path.stat().st_size, samples), ignored


def save(table: Table, path: Path) -> None:
    """Write a table to its final name in one motion."""
    extensions, keys = ",".join(table.extensions).encode(), bytes(table.keys)
    sizes = (table.file_size, table.num_samples, len(table.offsets), len(extensions), len(keys))
    arrays = (table.offsets, table.lengths, table.first_members, table.key_ends, table.extension_ids)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(
        _HEADER.pack(_MAGIC, *sizes) + b"".join(a.tobytes() for a in arrays) + extensions + keys
    )
    partial.replace(path)


def load(path: Path) -> Table:
    """Map a table into memory; raises ``ShardError`` when it is missing or not whole."""
    try:
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _unusable(path, str(error)) from None
    if len(view) < _HEADER.size:
        raise _unusable(path, "it is cut short")
    magic, file_size, samples, members, extension_bytes, key_bytes = _HEADER.unpack_from(view)
    if magic != _MAGIC:
        raise _unusable(path, "it is no table of offsets, or of another version")
    if len(view) != _HEADER.size + 17 * members + 4 * (2 * samples + 1) + extension_bytes + key_bytes:
        raise _unusable(path, "its size is not the one it should have")
    position = _HEADER.size

    def part(dtype: str, count: int) -> np.ndarray:
        nonlocal position
        array = np.frombuffer(view, dtype, count, position)
        position += array.nbytes
        return array

    return Table(
        file_size=file_size,
        offsets=part("<u8", members),
        lengths=part("<u8", members),
        first_members=part("<u4", samples + 1),
        key_ends=part("<u4", samples),
        extension_ids=part("u1", members),
        extensions=tuple(part("u1", extension_bytes).tobytes().decode().split(",")),
        keys=view[position:],
    )


def _unusable(path: Path, reason: str) -> ShardError:
    return ShardError(
        f"the table of offsets {path} cannot be used: {reason}. Index the shards again: fd-scale shards index"
    )


def _regular_members(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, int, int, str]]:
    """(name, offset, length, reason to ignore it or '') of every member but folders."""
    size = path.stat().st_size
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all; a shard may hold a million
        if member.isdir():
            continue
        if member.offset_data + member.size > size:
            raise tarfile.ReadError(f"member {member.name} ends beyond the file")
        plain = member.isreg() and not member.issparse()
        yield member.name, member.offset_data, member.size, "" if plain else "not a plain file"


def _check_end(path: Path, offset: int) -> None:
    """A tar ends in zero blocks; anything else where reading stopped is damage that tarfile passes over."""
    with path.open("rb") as file:
        file.seek(offset)
        end = file.read(_BLOCK)
        if len(end) < _BLOCK:
            raise tarfile.ReadError(f"it stops at byte {offset + len(end):,} without the end mark of a tar")
        while end:
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header, or data after the end mark, near byte {offset:,}")
            offset += len(end)
            end = file.read(1 << 20)


@dataclass
class _Sample:
    key: str
    members: dict[str, tuple[int, int]]


def _group(shard: str, members: Iterator[tuple[str, int, int, str]]) -> tuple[list[_Sample], list[Ignored]]:
    """Neighbouring members of one key become a sample; what cannot is listed with the reason."""
    samples: list[_Sample] = []
    ignored: list[Ignored] = []
    seen: set[str] = set()
    repeated = ""
    for name, offset, length, reason in members:
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        key, extension = (f"{folder}/{stem}" if folder else stem), extension.lower()
        fresh = not samples or samples[-1].key != key
        if reason or not stem or not dot or not extension or "," in extension:
            ignored.append(Ignored(shard, name, reason or "its name is not of the form key.extension"))
        elif fresh and (key in seen or key == repeated):
            repeated = key
            ignored.append(Ignored(shard, name, "its key stood earlier in the shard, apart from here"))
        elif not fresh and extension in samples[-1].members:
            ignored.append(Ignored(shard, name, "its name stood before"))
        elif fresh:
            seen.add(key)
            samples.append(_Sample(key, {extension: (offset, length)}))
        else:
            samples[-1].members[extension] = (offset, length)
    usable = []
    for sample in samples:
        images = [extension for extension in sample.members if extension in IMAGE_EXTENSIONS]
        if len(images) == 1:
            usable.append(sample)
        else:
            which = f"several image members ({', '.join(images)})" if images else "no image member"
            ignored.append(Ignored(shard, sample.key, f"{which} among: {', '.join(sample.members)}"))
    return usable, ignored


def _table(file_size: int, samples: list[_Sample]) -> Table:
    rows = [
        (extension, *place)
        for sample in samples
        for extension, place in sorted(sample.members.items(), key=lambda m: m[0] not in IMAGE_EXTENSIONS)
    ]
    extensions = tuple(sorted({extension for extension, _, _ in rows}))
    if len(extensions) > 256:
        raise ShardError(
            f"a shard with {len(extensions)} different extensions is no set of samples; at most 256"
        )
    number = {extension: position for position, extension in enumerate(extensions)}
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    return Table(
        file_size=file_size,
        offsets=np.array([offset for _, offset, _ in rows], dtype="<u8"),
        lengths=np.array([length for _, _, length in rows], dtype="<u8"),
        first_members=np.cumsum([0, *(len(sample.members) for sample in samples)]).astype("<u4"),
        key_ends=np.cumsum([len(key) for key in keys]).astype("<u4"),
        extension_ids=np.array([number[extension] for extension, _, _ in rows], dtype="u1"),
        extensions=extensions,
        keys=b"".join(keys),
    )
