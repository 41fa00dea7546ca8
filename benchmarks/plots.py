"""How do the measurements look? The figures of docs/performance.md, drawn from the results files.

    python -m benchmarks.plots    docs/performance-parts.svg and docs/performance-pieces.svg

A figure whose results are not there is not drawn. A GPU's come before a CPU's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks import tables

FOLDER = tables.PAGE.parent
DEVICES = ("cuda", "cpu")
WIDTH_IN = 7.5
STYLE: dict[Any, Any] = {"svg.hashsalt": "fd_scale", "svg.fonttype": "none", "font.size": 9}
"""The same file from the same numbers, with text that can be searched."""


def parts() -> Figure | None:
    """The share of each part of a step, a bar for each network and variant."""
    rows = [row for device in DEVICES for row in tables.measured_steps(device)]
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH_IN, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['model']}, {row['variant']}" for row in rows]
    left = [0.0] * len(rows)
    for part in rows[0]["part_share"]:
        widths = [100 * row["part_share"][part] for row in rows]
        axes.barh(labels, widths, left=left, label=part)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("share of a step's time, %")
    axes.set_xlim(0, 100)
    figure.legend(loc="outside upper center", ncols=len(rows[0]["part_share"]), frameon=False)
    return figure


def pieces() -> Figure | None:
    """What the loss in pieces saves and costs, a line for each case from whole maps on."""
    rows = next((found for device in DEVICES if (found := tables.rows_of(f"loss_chunked-{device}"))), [])
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH_IN, 3.2), layout="constrained")
    axes = figure.subplots()
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        time, memory = ([row[f"{what}_over_whole"] for row in own] for what in ("time", "memory"))
        axes.plot(memory, time, "o", label=case)
        for row, x, y in zip(own, memory, time, strict=True):
            said = "whole" if row["chunk_tokens"] is None else f"{row['chunk_tokens']:,}"
            axes.annotate(said, (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("memory beyond inputs and weights, whole maps = 1 (points: tokens of a piece)")
    axes.set_ylabel("time, whole maps = 1")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.15 * max(row["time_over_whole"] for row in rows))
    axes.legend(frameon=False, loc="lower left")
    return figure


def main() -> int:
    """Draw what there are results for."""
    for name, draw in (("parts", parts), ("pieces", pieces)):
        with matplotlib.rc_context(STYLE):
            figure = draw()
            if figure is not None:
                path: Path = FOLDER / f"performance-{name}.svg"
                figure.savefig(path, metadata={"Date": None})
                print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
