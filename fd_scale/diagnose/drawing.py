"""What do all figures look like, and how do they come onto a page that may be light, dark or paper?

A figure is drawn once, in the colours of the light page. In the SVG that stands in the page those colours are
replaced by names of CSS variables, so that the page decides; files beside the page keep the colours. Each
figure brings its numbers as a table.
"""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fd_scale.diagnose.parts import plain
from fd_scale.run.folder import as_json, write_atomically

LIGHT: Mapping[str, str] = {
    "paper": "#fefefe",
    "ink": "#18212b",
    "muted": "#5f6d7b",
    "rule": "#dbe1e8",
    "before": "#2b6ca3",
    "after": "#c8502a",
}
DARK: Mapping[str, str] = {
    "paper": "#12171d",
    "ink": "#e6ebf0",
    "muted": "#98a5b3",
    "rule": "#303a45",
    "before": "#74b6e8",
    "after": "#f2936c",
}
"""Blue before and orange after: told apart by the colour-blind, and in both modes of the page."""

WIDTH_INCHES = 10.0
PNG_DPI, RASTER_DPI = 150, 144
TRANSPARENT = "none"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": TRANSPARENT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": LIGHT["ink"],
    "figure.facecolor": LIGHT["paper"],
    "savefig.facecolor": LIGHT["paper"],
    "svg.fonttype": "none",
    "svg.hashsalt": "fd_scale",
    "image.interpolation": "none",
}


@dataclass(frozen=True, eq=False)
class Drawing:
    """A finished figure and its numbers."""

    name: str
    """Of its files."""
    figure: Figure
    table: Mapping[str, Sequence[Any]]
    """Columns of equal length, by heading with unit."""
    words: str
    """What is on it, for those who cannot see it."""

    def __post_init__(self) -> None:
        if len({len(column) for column in self.table.values()}) > 1:
            raise ValueError(f"columns of {self.name} are not of equal length")

    @cached_property
    def svg(self) -> str:
        """The figure as an SVG document. Its layout, half of the work, is found here and kept."""
        content = _rendered(self.figure, "svg", RASTER_DPI)
        self.figure.set_layout_engine("none")
        return content.decode()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table by rows, plain values."""
        values = zip(*self.table.values(), strict=True)
        return [dict(zip(self.table, plain(list(row)), strict=True)) for row in values]


@contextmanager
def styled() -> Iterator[None]:
    """The look of all figures; what is drawn and saved inside has it."""
    with mpl.rc_context(STYLE):
        yield


def panels(
    rows: int, columns: int, *, height: float = 3.0, width: float = WIDTH_INCHES, **more: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``rows x columns`` axes, row by row; ``height`` of a row and ``width`` in inches."""
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **more)
    return figure, list(axes.flat)


def series(panel: Axes, values: Sequence[float], *, role: str, label: str) -> None:
    """A line over 1, 2, ... in the colour of a role, with dots where there are few."""
    dots = "o" if len(values) <= 26 else ""
    panel.plot(range(1, len(values) + 1), values, color=LIGHT[role], marker=dots, markersize=4, label=label)


def legend(panel: Axes) -> None:
    """Names, where there is more than one."""
    if len(panel.get_legend_handles_labels()[1]) > 1:
        panel.legend(loc="best")


def wrapped(name: str, width: int) -> str:
    """A network's name in lines of so many characters at the most, where its column is no wider."""
    return "\n".join(textwrap.wrap(name, width))


def columns_of(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """The table of a ``Drawing`` from its rows."""
    return dict(zip(headings, zip(*rows, strict=True), strict=True))


def picture_axes(axes: Axes) -> None:
    """Without scales: for images and maps."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(drawing: Drawing, folder: Path) -> None:
    """Write ``<name>.svg``, ``.png``, ``.csv`` and ``.json`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{drawing.name}.svg", drawing.svg)
    write_atomically(folder / f"{drawing.name}.png", _rendered(drawing.figure, "png", PNG_DPI))
    write_atomically(folder / f"{drawing.name}.csv", as_csv(drawing))
    write_atomically(folder / f"{drawing.name}.json", as_json({"about": drawing.words, "rows": drawing.rows}))


def as_csv(drawing: Drawing) -> str:
    """The table, headings first; what is not a finite number is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(drawing.table), lineterminator="\n")
    writer.writeheader()
    writer.writerows(drawing.rows)
    return text.getvalue()


def inline(drawing: Drawing) -> str:
    """The SVG element for the page: scalable, in the page's colours and font, its ids its own."""
    svg = drawing.svg[drawing.svg.index("<svg") :]
    size = re.search(r'width="([\d.]+)pt"', svg)
    width = float(size.group(1)) if size else 72 * WIDTH_INCHES
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{drawing.name}-", svg)
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, TRANSPARENT if name == "paper" else f"var(--{name})")
    label = drawing.words.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # No larger than its text can bear, and on a phone no smaller: the page scrolls it sideways.
    opening = f'<svg role="img" aria-label="{label}" style="max-width:{width * 1.4:.0f}px;'
    opening += f'min-width:{width * 0.85:.0f}px"'
    return svg.replace("<svg", opening, 1)


def _rendered(figure: Figure, form: str, dpi: int) -> bytes:
    content = io.BytesIO()
    with styled():
        figure.savefig(content, format=form, dpi=dpi, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()
