"""The figures about attention: distances, similarity of heads, average maps and their patterns.

Each function draws what it is given and returns a ``Drawing``, or None where no network has such a thing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fd_scale.diagnose.anatomy import evenly_spaced
from fd_scale.diagnose.distance import uniform_distance
from fd_scale.diagnose.drawing import (
    LIGHT,
    Drawing,
    columns_of,
    legend,
    panels,
    picture_axes,
    series,
    styled,
    wrapped,
)
from fd_scale.diagnose.results import Results, Side

MAX_MAPS = 8
"""Layers whose average maps are shown, evenly spaced."""
MAP_COLOURS = "magma"


def distance_figure(results: Results) -> Drawing | None:
    """Heads as dots by layer, one panel per network, and their spread."""
    sides = _with_attention(results)
    if not sides:
        return None
    with styled():
        figure, axes = panels(1, len(sides) + 1, height=3.1)
        for side, panel in zip(sides, axes, strict=False):
            _heads(panel, side)
        windowed = {side.anatomy.is_windowed for side in sides}
        for panel in axes[1 : len(sides)] if len(windowed) == 1 else ():
            panel.set_ylabel("")
        _share_range(axes[: len(sides)])
        spread = axes[-1]
        for side in sides:
            _line(spread, side, [answer.spread_px for answer in side.survey.distance.values()])
        spread.set_ylim(bottom=0)
        spread.set_title("Spread of heads")
        spread.set_ylabel("standard deviation, px")
        legend(spread)
    rows = [
        (side.name, layer, head, float(px), float(raw))
        for side in sides
        for layer, answer in side.survey.distance.items()
        for head, (px, raw) in enumerate(zip(answer.per_head_px, answer.raw_px, strict=True))
    ]
    headings = ("network", "layer", "head", "distance, px", "raw distance, px")
    return Drawing(
        "attention-distance",
        figure,
        columns_of(headings, rows),
        "Mean attention distance of every head by layer, and the spread of heads per layer.",
    )


def head_similarity_figure(results: Results) -> Drawing | None:
    """Mean cosine between heads by layer, for three meanings of what is compared."""
    sides = [side for side in _with_attention(results) if _has_pairs(side)]
    if not sides:
        return None
    kinds = {"columns": "By key: columns", "rows": "By query: rows", "maps": "Whole maps"}
    with styled():
        figure, axes = panels(1, len(kinds), height=2.8, sharey=True)
        for (kind, title), panel in zip(kinds.items(), axes, strict=True):
            for side in sides:
                values = [getattr(answer, kind) for answer in side.survey.head_similarity.values()]
                _line(panel, side, values)
            panel.set_title(title)
            panel.set_ylim(0, 1.02)
        axes[0].set_ylabel("mean cosine of two heads")
        legend(axes[0])
    rows = [
        (side.name, layer, answer.columns, answer.rows, answer.maps)
        for side in sides
        for layer, answer in side.survey.head_similarity.items()
    ]
    headings = ("network", "layer", *kinds)
    table = columns_of(headings, rows)
    return Drawing("head-similarity", figure, table, "Similarity of attention heads by layer.")


def average_map_figure(results: Results) -> Drawing | None:
    """The mean maps as images, a row per network, a column per layer."""
    sides = _with_attention(results)
    if not sides:
        return None
    shown = {side.name: evenly_spaced(list(side.survey.average_map.items()), MAX_MAPS) for side in sides}
    columns = max(len(maps) for maps in shown.values())
    with styled():
        figure, axes = panels(len(sides), columns, height=min(10.0 / columns, 2.4) + 0.35)
        for place, panel in enumerate(axes):
            row, column = divmod(place, columns)
            side = sides[row]
            picture_axes(panel)
            if column >= len(shown[side.name]):
                panel.set_visible(False)
                continue
            layer, answer = shown[side.name][column]
            pixels = answer.map_QK.numpy()
            panel.imshow(pixels, cmap=MAP_COLOURS, vmin=0, vmax=np.quantile(pixels, 0.995) or 1)
            number = list(side.survey.average_map).index(layer) + 1
            panel.set_title(f"layer {number}", fontweight="normal", fontsize=8.5)
            scores = f"diagonal {answer.diagonality:.2f}\ncolumn {answer.column_dominance:.2f}"
            panel.set_xlabel(scores, fontsize=8)
            if column == 0:
                panel.set_ylabel(side.name, color=LIGHT[side.role], fontweight="bold")
    rows = [
        (side.name, layer, answer.diagonality, answer.column_dominance, answer.prefix_share)
        for side in sides
        for layer, answer in side.survey.average_map.items()
    ]
    headings = ("network", "layer", "diagonality", "column dominance", "share to prefix tokens")
    table = columns_of(headings, rows)
    words = "Average attention maps by layer: queries downwards, keys across, bright where attention is."
    return Drawing("average-maps", figure, table, words)


def pattern_figure(results: Results) -> Drawing | None:
    """Diagonality, column dominance and the share of the class token by layer."""
    sides = _with_attention(results)
    if not sides:
        return None
    kinds = {
        "diagonality": "Diagonality",
        "column_dominance": "Column dominance",
        "prefix_share": "Share to class token and registers",
    }
    with styled():
        figure, axes = panels(1, len(kinds), height=2.8)
        for (kind, title), panel in zip(kinds.items(), axes, strict=True):
            for side in sides:
                _line(panel, side, [getattr(answer, kind) for answer in side.survey.average_map.values()])
            panel.set_title(title)
            panel.set_ylim(-0.02, 1.02)
        axes[0].set_ylabel("share of the map's variance")
        axes[2].set_ylabel("share of a patch's attention")
        legend(axes[0])
    rows = [
        (side.name, layer, *(getattr(answer, kind) for kind in kinds))
        for side in sides
        for layer, answer in side.survey.average_map.items()
    ]
    table = columns_of(("network", "layer", *kinds), rows)
    return Drawing("attention-patterns", figure, table, "Patterns of the average attention maps by layer.")


def _with_attention(results: Results) -> list[Side]:
    return [side for side in results.sides if side.survey.distance]


def _has_pairs(side: Side) -> bool:
    return any(layer.num_heads > 1 for layer in side.anatomy.attention)


def _heads(panel: Axes, side: Side) -> None:
    colour = LIGHT[side.role]
    answers = list(side.survey.distance.values())
    for number, answer in enumerate(answers, start=1):
        heads = answer.per_head_px.numpy()
        panel.plot([number] * len(heads), heads, "o", color=colour, alpha=0.45, markersize=5, mew=0)
    panel.plot(range(1, len(answers) + 1), [answer.mean_px for answer in answers], color=colour)
    if not side.anatomy.is_windowed:
        layer = side.anatomy.attention[0]
        even = uniform_distance(layer.grid, layer.patch_px)
        panel.axhline(even, color=LIGHT["muted"], linewidth=1, linestyle=":")
    panel.set_title(wrapped(side.name, 30), color=colour)
    _layers(panel, len(answers))
    if not side.anatomy.is_windowed:
        panel.set_xlabel("layer (dotted: even attention)")
    inside = ", inside windows" if side.anatomy.is_windowed else ""
    panel.set_ylabel(f"attention distance{inside}, px")


def _share_range(axes: Sequence[Axes]) -> None:
    """One range for all, wide enough for the dots at its ends."""
    low = min(panel.get_ylim()[0] for panel in axes)
    high = max(panel.get_ylim()[1] for panel in axes)
    room = 0.03 * (high - low)  # a narrow panel's own margin is less than a dot of the shared range
    for panel in axes:
        panel.set_ylim(max(low - room, 0), high + room)


def _line(panel: Axes, side: Side, values: Sequence[float]) -> None:
    series(panel, values, role=side.role, label=side.name)
    _layers(panel, len(values))


def _layers(panel: Axes, count: int) -> None:
    last = max(panel.get_xlim()[1] - 0.5, count) if panel.lines else count
    panel.set_xlim(0.5, last + 0.5)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    panel.set_xlabel("layer")
