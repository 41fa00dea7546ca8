"""What can be packed: a folder of images, a list of files, a set of shards, a Hugging Face dataset?

Each gives entries, small enough to list millions of them, and a function that reads one. In which order they
are written, and whether images are changed on the way, is the business of ``pack``.
"""

from __future__ import annotations

import collections
import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd_scale.data import manifest
from fd_scale.data.faults import SampleError
from fd_scale.data.index import Access, ShardSet
from fd_scale.data.offsets import IMAGE_EXTENSIONS
from fd_scale.data.writer import tar_bytes
from fd_scale.errors import ShardError

KEY_LENGTH = 80
"""Longest key, characters, so that every member name fits the plain tar header of 100."""
LISTS = (".csv", ".tsv", ".jsonl")
"""Extensions of lists of files."""
HUGGING_FACE = "hf:"
"""Beginning of the name of a Hugging Face dataset."""


@dataclass(frozen=True)
class Entry:
    """One sample to be packed."""

    key: str
    """Letters, digits, ``_``, ``-`` and ``/`` alone; no other entry has it."""
    place: Any
    """Where it lies, for ``Source.read``."""
    size: int
    """Bytes that it takes up in a tar; 0 where that is not known ahead."""
    stamp: int = 0
    """Changes when the file is written again."""
    label: int | None = None


@dataclass(frozen=True)
class Source:
    """Samples that can be packed."""

    name: str
    entries: Sequence[Entry]
    read: Callable[[Entry], Mapping[str, bytes]]
    """The members of an entry by extension; must pickle. Raises ``ShardError``."""
    classes: tuple[str, ...] | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)
    """What was left out, and how often: files by extension, columns of a list."""


def open_source(
    name: str,
    *,
    classes: Sequence[str] | None = None,
    root: Path | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
) -> Source:
    """The source of this name: a folder of images, a folder of shards with an index, a list of files
    (``LISTS``), or ``hf:NAME``.

    ``classes`` fixes which label a class name gets. ``root`` is where the paths of a list begin, the folder
    of the list by default; the rest is for Hugging Face datasets. Raises ``ShardError``.
    """
    if name.startswith(HUGGING_FACE):
        from fd_scale.data.hugging_face import dataset  # needs a package that few have

        return dataset(name.removeprefix(HUGGING_FACE), split, image_column, label_column)
    path = Path(name)
    if path.suffix.lower() in LISTS:
        return file_list(path, classes=classes, root=root)
    if (path / manifest.MANIFEST).is_file():
        return shard_set(path)
    return image_folder(path, classes=classes)


def image_folder(source: Path, *, classes: Sequence[str] | None = None) -> Source:
    """The images of a folder: flat, or one folder per class (ImageFolder), whose sorted names give labels."""
    if not source.is_dir():
        raise ShardError(f"{source} is not a folder of images")
    found, skipped = _images_below(source)
    inside = _class_folders(source, found)
    known = None if inside is None else tuple(classes or inside)
    labels = _labels([path.parts[0] for path in found], known, source) if known else [None] * len(found)
    return Source(str(source), _entries(source, found, labels), _read_file, known, skipped)


def file_list(source: Path, *, classes: Sequence[str] | None = None, root: Path | None = None) -> Source:
    """The files that a list names: CSV or TSV with a header, or one JSON object per line.

    ``path`` is relative to ``root``; ``label``, if there, a whole number or the name of a class: the sorted
    names are numbered, unless ``classes`` says how. Other columns are left out, and said to be.
    """
    rows = list(_rows(source))
    if not rows:
        raise ShardError(f"{source} lists no files")
    paths = [_path_of(row, number, source) for number, row in enumerate(rows, 1)]
    given = [row.get("label") for row in rows]
    known, labels = _labels_of(given, classes, source)
    others = collections.Counter(name for row in rows for name in row if name not in ("path", "label"))
    skipped = {f"column {name}": count for name, count in others.items()}
    entries = _entries(root or source.parent, paths, labels)
    return Source(str(source), entries, _read_file, known, skipped)


def shard_set(source: Path) -> Source:
    """The samples of a set of shards, each with all its members."""
    shards = ShardSet.open(source, access=Access())
    places = [(shard, index) for shard, count in enumerate(shards.counts) for index in range(int(count))]
    keys = unique_keys([shards.key(*place) for place in places])
    entries = [
        Entry(key, place, tar_bytes(length for _, _, length in shards.members(*place)))
        for key, place in zip(keys, places, strict=True)
    ]
    return Source(f"{source} {shards.fingerprint}", entries, _ReadMembers(shards), shards.classes)


def unique_keys(names: Sequence[str]) -> list[str]:
    """A key for each name: letters, digits, ``_``, ``-`` and ``/`` alone, none twice."""
    keys: list[str] = []
    taken: set[str] = set()
    for number, name in enumerate(names):
        key = re.sub(r"[^A-Za-z0-9_/-]", "_", name)
        if len(key) > KEY_LENGTH or key in taken:
            mark = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
            key = f"{key[: KEY_LENGTH - 17]}_{mark}"
            if key in taken:  # the same name again
                key = f"{key[:-17]}_{number:016d}"
        taken.add(key)
        keys.append(key)
    return keys


def _images_below(source: Path) -> tuple[list[Path], dict[str, int]]:
    """Images by relative path, sorted, and other files counted by suffix."""
    found: list[Path] = []
    skipped: collections.Counter[str] = collections.Counter()
    for folder, names in _walk(source):
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
        tars = "; index tar files where they lie with fd-scale shards index" if ".tar" in skipped else ""
        raise ShardError(
            f"no images in {source}: it holds {there}; extensions looked for: "
            f"{', '.join(IMAGE_EXTENSIONS)}{tars}"
        )
    found.sort(key=lambda path: path.as_posix())
    return found, dict(skipped)


def _walk(source: Path) -> Iterator[tuple[Path, list[str]]]:
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
        yield Path(folder), names


def _class_folders(source: Path, images: Sequence[Path]) -> tuple[str, ...] | None:
    inside = sorted({path.parts[0] for path in images if len(path.parts) > 1})
    if not inside:
        return None
    if beside := [path for path in images if len(path.parts) == 1]:
        raise ShardError(
            f"{source} has {len(beside)} images beside its {len(inside)} folders of images "
            f"({beside[0]}, {inside[0]}/): put all images in class folders, or all in one folder"
        )
    return tuple(inside)


def _labels(names: Iterable[str], classes: Sequence[str], source: Path) -> list[int]:
    number = {name: place for place, name in enumerate(classes)}
    names = list(names)
    if unknown := sorted({name for name in names if name not in number}):
        raise ShardError(
            f"{source} has {len(unknown)} classes that the class map of {len(classes)} does not name: "
            f"{', '.join(unknown[:5])}; add them to it"
        )
    return [number[name] for name in names]


def _labels_of(
    given: Sequence[Any], classes: Sequence[str] | None, source: Path
) -> tuple[tuple[str, ...] | None, Sequence[int | None]]:
    """The class names and every row's label; all rows have one, or none has."""
    missing = sum(label in (None, "") for label in given)
    if missing == len(given):
        return None, [None] * len(given)
    if missing:
        raise ShardError(f"{source}: {missing:,} of {len(given):,} rows have no label; give all of them one")
    texts = [str(label) for label in given]
    if all(re.fullmatch(r"-?\d+", text) for text in texts) and not set(texts) & set(classes or ()):
        numbers = [int(text) for text in texts]
        if classes and not 0 <= min(numbers) <= max(numbers) < len(classes):
            raise ShardError(
                f"{source} has labels from {min(numbers)} to {max(numbers)}, the class map names "
                f"{len(classes)}: 0 to {len(classes) - 1}"
            )
        return tuple(classes) if classes else None, numbers
    known = tuple(classes or sorted(set(texts)))
    return known, _labels(texts, known, source)


def _rows(source: Path) -> Iterator[dict[str, Any]]:
    try:
        with source.open(newline="", encoding="utf-8") as file:
            if source.suffix.lower() == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
                return
            delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
            yield from csv.DictReader(file, delimiter=delimiter, restkey="beyond the header")
    except (OSError, ValueError, csv.Error) as error:
        raise ShardError(f"the list {source} cannot be read: {error}") from None


def _path_of(row: Any, number: int, source: Path) -> Path:
    path = row.get("path") if isinstance(row, dict) else None
    if not isinstance(path, str) or not path:
        raise ShardError(
            f"{source}, row {number} names no file: a list has a column 'path' and, if wanted, 'label'; "
            f"found {sorted(map(str, row)) if isinstance(row, dict) else row!r}"
        )
    suffix = Path(path).suffix[1:].lower()
    if suffix not in IMAGE_EXTENSIONS:
        raise ShardError(
            f"{source}, row {number}: {path} has no extension of an image; these are: "
            f"{', '.join(IMAGE_EXTENSIONS)}"
        )
    return Path(path)


def _entries(root: Path, paths: Sequence[Path], labels: Sequence[int | None]) -> list[Entry]:
    """An entry for each file; all that cannot be read are refused at once."""
    keys = unique_keys([path.with_suffix("").as_posix().lstrip("/") for path in paths])
    entries, absent = [], []
    for path, key, label in zip(paths, keys, labels, strict=True):
        try:
            status = (root / path).stat()
        except OSError as error:
            absent.append(f"{root / path} cannot be read: {error.strerror}")
            continue
        size = tar_bytes([status.st_size, *([] if label is None else [len(str(label))])])
        entries.append(Entry(key, str(root / path), size, status.st_mtime_ns, label))
    if absent:
        raise ShardError(manifest.listed(f"{len(absent):,} files cannot be read:", absent))
    return entries


def _read_file(entry: Entry) -> dict[str, bytes]:
    path = Path(entry.place)
    try:
        members = {path.suffix[1:].lower(): path.read_bytes()}
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror}") from None
    if entry.label is not None:
        members["cls"] = str(entry.label).encode()
    return members


@dataclass(frozen=True)
class _ReadMembers:
    """Reads entries of a set of shards."""

    shards: ShardSet

    def __call__(self, entry: Entry) -> dict[str, bytes]:
        try:
            return self.shards.read_members(*entry.place)
        except SampleError as error:
            raise ShardError(str(error)) from None
