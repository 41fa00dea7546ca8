"""How is a Hugging Face dataset packed? By its rows, the bytes of their images kept.

The package ``datasets`` is needed (extra ``datasets``), and imported here alone.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from fd_scale.data.sources import Entry, Source
from fd_scale.errors import ShardError, near_misses

_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif", "GIF": "gif", "BMP": "bmp"}
"""By what Pillow calls the format of the bytes."""


def dataset(name: str, split: str, image_column: str, label_column: str) -> Source:
    """A split of a dataset of the hub, or of a folder that ``save_to_disk`` wrote.

    Rows have no size ahead, so that shards are cut by their number alone. Class names come from the label
    column, if it has any.
    """
    try:
        import datasets
    except ImportError:
        raise ShardError(f"hf:{name} needs the package datasets: pip install 'fd-scale[datasets]'") from None
    rows = _load(datasets, name, split)
    if image_column not in rows.column_names:
        raise ShardError(
            f"hf:{name} has no column {image_column!r}{near_misses(image_column, rows.column_names)} "
            f"(columns: {', '.join(rows.column_names)}): give the images' one with --image-column"
        )
    has_label = label_column in rows.column_names
    rows = rows.select_columns([image_column, *([label_column] if has_label else [])])
    rows = rows.cast_column(image_column, datasets.Image(decode=False))
    classes = getattr(rows.features[label_column], "names", None) if has_label else None
    width = len(str(max(0, len(rows) - 1)))
    entries = [
        Entry(f"{split.partition('[')[0]}_{number:0{width}d}", number, 0) for number in range(len(rows))
    ]
    reader = _ReadRow(rows, image_column, label_column if has_label else None)
    found = tuple(classes) if classes else None
    return Source(f"hf:{name} {split} {rows._fingerprint}", entries, reader, found)


def _load(datasets: Any, name: str, split: str) -> Any:
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, dict) else found
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub, the disk and the script of a dataset may each raise anything
        raise ShardError(f"hf:{name}, split {split!r}: {type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class _ReadRow:
    """Reads a row."""

    rows: Any
    image_column: str
    label_column: str | None

    def __call__(self, entry: Entry) -> dict[str, bytes]:
        row = self.rows[entry.place]
        image = row[self.image_column]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        members = {_extension(content): content}
        if self.label_column is not None:
            members["cls"] = str(row[self.label_column]).encode()
        return members


def _extension(content: bytes) -> str:
    """Of the format that the bytes are in; those that nothing reads pass for JPEG, to be found out later."""
    try:
        with PIL.Image.open(io.BytesIO(content)) as opened:
            return _EXTENSIONS.get(opened.format or "", "jpg")
    except OSError:
        return "jpg"
