"""The picture of a study: every row by every measure, each seed as a dot."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
import numpy as np

from fd_scale.run.folder import write_atomically
from studies.outcome import Outcome

WIDTH, ROW_HEIGHT = 3.2, 0.42
"""Inches of a panel."""
DOT, MEAN, GIVEN = "#8fb3d9", "#1f4e8c", "#b35c1e"


def draw(found: Outcome, path: Path) -> None:
    """One panel per measure: a dot per fine-tuning or run, a bar at their mean; given networks in another
    colour."""
    # Figure without pyplot: nothing is registered, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        panels = found.measures
        height = 1.1 + ROW_HEIGHT * len(found.rows)
        figure = Figure(figsize=(1.6 + WIDTH * len(panels), height), layout="constrained")
        FigureCanvasAgg(figure)
        for place, axes in enumerate(np.atleast_1d(figure.subplots(1, len(panels), sharey=True))):
            for level, row in enumerate(reversed(found.rows)):
                if panels[place] not in row.measures:
                    continue
                is_share = row.is_share(panels[place])
                values = row.values(panels[place]) * (100 if is_share else 1)
                axes.set_xlabel("%" if is_share else "")
                colour = GIVEN if row.given else MEAN
                axes.plot(values.ravel(), np.full(values.size, level), "o", color=DOT, markersize=4)
                axes.plot([values.mean()], [level], "|", color=colour, markersize=14, markeredgewidth=2)
            axes.set_yticks(range(len(found.rows)), [row.name for row in reversed(found.rows)])
            axes.set_title(panels[place], fontsize=9)
            axes.grid(axis="x", alpha=0.3)
        figure.suptitle(found.question, fontsize=10)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
