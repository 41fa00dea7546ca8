"""What is in a set of shards? Counts and sizes of all, formats and colours of some, pictures of a few."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
from rich.console import Group
from rich.progress import Progress
from rich.table import Table as RichTable

from fd_scale.data import decode, philox
from fd_scale.data.faults import SampleError
from fd_scale.data.index import ShardSet
from fd_scale.data.pool import bar
from fd_scale.data.view import centre_view

THUMBNAIL = 112
"""Side of a picture on a contact sheet, pixels."""
_CAPTION = 14
_QUANTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True)
class Looked:
    """Facts of the samples that were looked at."""

    num_samples: int
    unusable: Mapping[str, str]
    """By key: what is wrong."""
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    """As Pillow calls them: RGB, L, CMYK, P ..."""
    sides: np.ndarray
    """int64 (usable, 2): height, width, pixels."""
    bytes_per_image: np.ndarray
    """int64 (usable,)."""
    mean: tuple[float, ...]
    """Of each channel over all pixels of the images, 0 .. 1."""
    std: tuple[float, ...]
    labels: Mapping[int, int]
    """How many of each label."""
    oriented: int
    """Images with an EXIF orientation that turns or mirrors them."""


def chosen(shards: ShardSet, count: int, seed: int) -> list[tuple[int, int]]:
    """(shard, index) of ``count`` samples drawn from all, in the order of the shards."""
    ends = np.cumsum(shards.counts)
    if shards.num_samples <= 4 * count:
        drawn = philox.permutation(philox.key("fd.show", seed), shards.num_samples)[:count]
    else:  # with so many to draw from, a few words more than are needed give enough different ones
        words = philox.words(philox.key("fd.show", seed), 2 * count) % np.uint64(shards.num_samples)
        drawn = np.array(list(dict.fromkeys(words.tolist()))[:count], dtype=np.int64)
    places = np.sort(drawn).astype(np.int64)
    shard = np.searchsorted(ends, places, side="right")
    index = places - (ends - shards.counts)[shard]
    return list(zip(shard.tolist(), index.tolist(), strict=True))


def look(shards: ShardSet, places: Sequence[tuple[int, int]], progress: Progress | None = None) -> Looked:
    """Read and decode these samples."""
    unusable: dict[str, str] = {}
    formats: collections.Counter[str] = collections.Counter()
    modes: collections.Counter[str] = collections.Counter()
    labels: collections.Counter[int] = collections.Counter()
    sides, lengths, oriented = [], [], 0
    # Per channel: pixels, sum, sum of squares, in whole numbers, which do not round.
    sums = np.zeros((3, 3), dtype=np.float64)
    with bar(progress, "looking at samples", len(places)) as advance:
        for shard, index in places:
            advance(1)
            try:
                sample = shards.read(shard, index, label=False)
                pixels = decode.decode(sample.image)
            except SampleError as error:
                unusable[shards.key(shard, index)] = str(error)
                continue
            form, mode, turned = _header(sample.image)
            formats[form] += 1
            modes[mode] += 1
            oriented += turned
            sides.append(pixels.shape[:2])
            lengths.append(len(sample.image))
            sums += _sums(pixels)
            if (label := _label(shards, shard, index)) is not None:
                labels[label] += 1
    mean = sums[1] / np.maximum(sums[0], 1)
    std = np.sqrt(np.maximum(sums[2] / np.maximum(sums[0], 1) - mean**2, 0))
    return Looked(
        num_samples=len(places),
        unusable=unusable,
        formats=dict(formats.most_common()),
        modes=dict(modes.most_common()),
        sides=np.array(sides, dtype=np.int64).reshape(-1, 2),
        bytes_per_image=np.array(lengths, dtype=np.int64),
        mean=tuple((mean / 255).tolist()),
        std=tuple((std / 255).tolist()),
        labels=dict(labels.most_common()),
        oriented=oriented,
    )


def table(shards: ShardSet, found: Looked) -> Group:
    """What there is to say, for a terminal."""
    whole = _grid(f"All {shards.num_samples:,} samples")
    for name, text in _whole_rows(shards):
        whole.add_row(name, text)
    part = _grid(f"Of {found.num_samples:,} samples that were looked at")
    for name, text in _part_rows(shards, found):
        part.add_row(name, text)
    return Group(whole, "", part)


def contact_sheet(shards: ShardSet, places: Sequence[tuple[int, int]], path: Path) -> None:
    """A PNG with the central square of these samples, their keys and labels below; a cross for a bad one."""
    columns = max(1, math.ceil(math.sqrt(len(places) * 1.5)))
    rows = max(1, math.ceil(len(places) / columns))
    sheet = PIL.Image.new("RGB", (columns * THUMBNAIL, rows * (THUMBNAIL + _CAPTION)), "white")
    drawing = PIL.ImageDraw.Draw(sheet)
    for number, (shard, index) in enumerate(places):
        left, top = number % columns * THUMBNAIL, number // columns * (THUMBNAIL + _CAPTION)
        try:
            pixels = decode.decode(shards.read(shard, index, label=False).image)
            square = centre_view(pixels, size=THUMBNAIL - 4, crop_pct=1.0).permute(1, 2, 0).numpy()
            sheet.paste(PIL.Image.fromarray(np.ascontiguousarray(square)), (left + 2, top + 2))
        except SampleError:
            drawing.line((left + 2, top + 2, left + THUMBNAIL - 2, top + THUMBNAIL - 2), "red", 3)
            drawing.line((left + 2, top + THUMBNAIL - 2, left + THUMBNAIL - 2, top + 2), "red", 3)
        drawing.text((left + 3, top + THUMBNAIL), _caption(shards, shard, index), "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    sheet.save(partial, "PNG")
    partial.replace(path)


def _caption(shards: ShardSet, shard: int, index: int) -> str:
    label = _label(shards, shard, index)
    name = "" if label is None else f"{_class(shards, label)}: "
    text = name + shards.key(shard, index).rpartition("/")[2]
    longest = THUMBNAIL // 6 - 1
    return text if len(text) <= longest else text[: longest - 1] + "~"


def _whole_rows(shards: ShardSet) -> Iterator[tuple[str, str]]:
    counts = shards.counts
    yield "shards", f"{len(counts):,}, {shards.num_bytes / 2**30:,.2f} GiB"
    yield "samples per shard", f"{counts.min():,} to {counts.max():,}, median {int(np.median(counts)):,}"
    left_out = sum(int(folder.num_samples.sum() - folder.counts.sum()) for folder in shards.folders)
    if left_out:
        yield "excluded", f"{left_out:,} samples, by excluded.jsonl"
    if shards.classes:
        yield "classes", f"{len(shards.classes):,}: {', '.join(shards.classes[:6])} ..."
    yield "fingerprint", shards.fingerprint


def _part_rows(shards: ShardSet, found: Looked) -> Iterator[tuple[str, str]]:
    if found.unusable:
        worst = [f"{key}: {error}" for key, error in list(found.unusable.items())[:5]]
        yield "unusable", "\n".join([f"{len(found.unusable):,}", *worst])
    yield "formats", ", ".join(f"{name} {count:,}" for name, count in found.formats.items())
    yield "modes", ", ".join(f"{name} {count:,}" for name, count in found.modes.items())
    if len(found.sides):
        quantiles = ", ".join(f"{q} %" for q in _QUANTILES)
        for name, values in (
            ("height, pixels", found.sides[:, 0]),
            ("width, pixels", found.sides[:, 1]),
            ("bytes", found.bytes_per_image),
        ):
            at = " | ".join(f"{int(value):,}" for value in np.percentile(values, _QUANTILES))
            yield name, f"{at}   (at {quantiles})"
    yield "turned by EXIF", f"{found.oriented:,}"
    yield "channel mean", " ".join(f"{value:.4f}" for value in found.mean)
    yield "channel std", " ".join(f"{value:.4f}" for value in found.std)
    if found.labels:
        most = [f"{_class(shards, label)} {count:,}" for label, count in list(found.labels.items())[:6]]
        yield "labels", f"{len(found.labels):,} different; most frequent: {', '.join(most)}"


def _class(shards: ShardSet, label: int) -> str:
    known = shards.classes or ()
    return known[label] if 0 <= label < len(known) else str(label)


def _grid(title: str) -> RichTable:
    grid = RichTable(title=title, show_header=False, title_justify="left", box=None)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _label(shards: ShardSet, shard: int, index: int) -> int | None:
    try:
        return shards.read(shard, index).label
    except SampleError:
        return None


def _header(image: bytes) -> tuple[str, str, bool]:
    with PIL.Image.open(BytesIO(image)) as opened:
        return opened.format or "unknown", opened.mode, opened.getexif().get(0x0112, 1) not in (0, 1)


def _sums(pixels_HWC: np.ndarray) -> np.ndarray:
    """Per channel: how many pixels, their sum, the sum of their squares."""
    flat = pixels_HWC.reshape(-1, 3)
    levels = np.stack([np.bincount(flat[:, channel], minlength=256) for channel in range(3)], axis=1)
    values = np.arange(256)[:, None]
    return np.stack([levels.sum(0), (levels * values).sum(0), (levels * values**2).sum(0)]).astype(np.float64)
