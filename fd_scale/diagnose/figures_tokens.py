"""The figures about tokens: similarity of layers and of tokens, spectra, norms, and single images.

Each function draws what it is given and returns a ``Drawing``, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter, ScalarFormatter
from numpy.typing import NDArray

from fd_scale.diagnose.drawing import (
    LIGHT,
    WIDTH_INCHES,
    Drawing,
    columns_of,
    legend,
    panels,
    picture_axes,
    series,
    styled,
    wrapped,
)
from fd_scale.diagnose.norms import OUTLIER
from fd_scale.diagnose.results import Results, Side

HEAT = "viridis"


def cka_figure(results: Results) -> Drawing | None:
    """Similarity of every layer of the first network with every layer of the last."""
    if results.cka is None:
        return None
    before, after = results.sides[0], results.sides[-1]
    values = results.cka.numpy()
    rows, columns = _labels(before), _labels(after)
    with styled():
        figure, axes = panels(1, 1, height=4.2, width=5.6)
        image = axes[0].imshow(values, cmap=HEAT, vmin=0, vmax=1, origin="lower", aspect="auto")
        axes[0].grid(visible=False)
        _ticks(axes[0], rows, columns)
        axes[0].set_xlabel(after.name, color=LIGHT[after.role], fontweight="bold")
        axes[0].set_ylabel(before.name, color=LIGHT[before.role], fontweight="bold")
        if values.size <= 64:
            for (row, column), value in np.ndenumerate(values):
                # On colours that are the same in both modes of the page, so the numbers are as well.
                shade = "#ffffff" if value < 0.6 else "#000000"
                axes[0].text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=shade)
        bar = figure.colorbar(image, ax=axes[0], label="CKA")
        bar.outline.set_visible(False)
    names = list(before.survey.pooled), list(after.survey.pooled)
    table: dict[str, Sequence[Any]] = {
        f"layer of {before.name}": [name for name in names[0] for _ in names[1]],
        f"layer of {after.name}" + (" " if before is after else ""): names[1] * len(names[0]),
        "CKA": [float(value) for value in values.flatten()],
    }
    return Drawing("layer-similarity", figure, table, "Similarity (CKA) of all pairs of layers.")


def token_similarity_figure(results: Results) -> Drawing | None:
    """Mean cosine between the patches of an image, by layer."""
    sides = results.sides
    with styled():
        figure, axes = panels(1, 1, height=2.8, width=5.6)
        for side in sides:
            series(
                axes[0],
                [answer.cosine for answer in side.survey.token_similarity.values()],
                role=side.role,
                label=side.name,
            )
        axes[0].set_ylabel("mean cosine of two patches")
        axes[0].set_ylim(min(0, axes[0].get_ylim()[0]), 1.02)
        _layer_ticks(axes[0], sides)
        legend(axes[0])
    rows = [
        (side.name, layer, answer.cosine)
        for side in sides
        for layer, answer in side.survey.token_similarity.items()
    ]
    return Drawing(
        "token-similarity", figure, columns_of(("network", "layer", "cosine"), rows), "Similarity of tokens."
    )


def spectrum_figure(results: Results) -> Drawing | None:
    """Effective rank by layer, and how few directions explain the final map."""
    sides = results.sides
    with styled():
        figure, axes = panels(1, 2, height=2.9)
        for side in sides:
            spectra = list(side.survey.spectrum.values())
            series(axes[0], [answer.effective_rank for answer in spectra], role=side.role, label=side.name)
            explained = spectra[-1].explained.numpy()
            axes[1].plot(range(1, len(explained) + 1), explained, color=LIGHT[side.role], label=side.name)
        axes[0].set_title("Effective rank")
        axes[0].set_ylabel("directions")
        axes[0].set_ylim(bottom=0)
        _layer_ticks(axes[0], sides)
        axes[1].set_title("Variance explained, final map")
        axes[1].set_xscale("log")
        axes[1].xaxis.set_major_formatter("{x:g}")
        axes[1].set_xlabel("first directions")
        axes[1].set_ylim(0, 1.02)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
        legend(axes[0])
    rows = [
        (side.name, layer, answer.effective_rank, answer.directions_for(0.9), len(answer.variance_shares))
        for side in sides
        for layer, answer in side.survey.spectrum.items()
    ]
    headings = ("network", "layer", "effective rank", "directions for 90 %", "channels")
    return Drawing("spectrum", figure, columns_of(headings, rows), "Spectrum of patch tokens by layer.")


def norm_figure(results: Results) -> Drawing | None:
    """Lengths of tokens, and the share of outliers, by layer."""
    sides = results.sides
    with styled():
        figure, axes = panels(1, 2, height=2.8)
        for side in sides:
            answers = list(side.survey.norms.values())
            places = range(1, len(answers) + 1)
            series(axes[0], [answer.median for answer in answers], role=side.role, label=side.name)
            axes[0].plot(
                places, [answer.p99 for answer in answers], "--", color=LIGHT[side.role], linewidth=1.1
            )
            series(axes[1], [answer.outlier_share for answer in answers], role=side.role, label=side.name)
        axes[0].set_title("Token norms: median, and 99 % (dashed)")
        axes[0].set_ylabel("L2 norm")
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(ScalarFormatter())
        axes[0].yaxis.set_minor_formatter(NullFormatter())
        axes[1].set_title(f"Outliers: above {OUTLIER:g} x the median")
        axes[1].set_ylabel("share of patches")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes[1].set_ylim(0, max(0.01, 1.05 * axes[1].get_ylim()[1]))
        for panel in axes:
            _layer_ticks(panel, sides)
        legend(axes[1])
    rows = [
        (side.name, layer, answer.median, answer.p99, answer.outlier_share)
        for side in sides
        for layer, answer in side.survey.norms.items()
    ]
    headings = ("network", "layer", "median norm", "norm, 99 %", "outlier share")
    return Drawing("token-norms", figure, columns_of(headings, rows), "Norms of patch tokens by layer.")


def picture_figure(results: Results) -> Drawing | None:
    """A row per image: the image, and for each network its map, where it looked, and its token norms."""
    pictures = results.pictures
    if pictures is None:
        return None
    columns: list[tuple[str, str, Any, dict[str, Any]]] = [("image", LIGHT["muted"], pictures.images, {})]
    kinds: list[tuple[str, Any, dict[str, Any]]] = [
        ("features", pictures.colours, {}),
        ("rollout", pictures.rollouts, {"cmap": "inferno"}),
        ("token norm", pictures.norms, {"cmap": "cividis"}),
    ]
    for kind, by_network, how in kinds:
        columns += [
            (f"{kind}\n{wrapped(side.name, 16)}", LIGHT[side.role], by_network[side.name], how)
            for side in results.sides
            if side.name in by_network
        ]
    count = len(pictures.images)
    with styled():
        cell = min(WIDTH_INCHES / len(columns), 1.6)
        figure, axes = panels(count, len(columns), height=cell, width=cell * len(columns))
        for place, panel in enumerate(axes):
            row, column = divmod(place, len(columns))
            title, colour, values, how = columns[column]
            picture_axes(panel)
            panel.imshow(values[row], **how | _limits(values[row], how))
            if row == 0:
                panel.set_title(title, color=colour, fontsize=8.5)
    table: dict[str, Sequence[Any]] = {"row": list(range(1, count + 1)), "image": list(pictures.names)}
    return Drawing("pictures", figure, table, "Images, feature maps, attention rollout and token norms.")


def _limits(values: NDArray[np.float32], how: dict[str, Any]) -> dict[str, Any]:
    if "cmap" not in how:
        return {}
    low, high = np.quantile(values, (0.01, 0.99))
    return {"vmin": float(low), "vmax": float(max(high, low + 1e-9))}


def _labels(side: Side) -> list[str]:
    return [*(str(number) for number in range(1, len(side.survey.pooled))), "out"]


def _ticks(panel: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    for axis, labels in ((panel.xaxis, columns), (panel.yaxis, rows)):
        step = max(1, round(len(labels) / 13))
        places = [*range(0, len(labels) - 1, step), len(labels) - 1]
        axis.set_ticks(places, [labels[place] for place in places])


def _layer_ticks(panel: Axes, sides: Sequence[Side]) -> None:
    """Numbers, and "out" for the final map, where all networks have it in one place."""
    counts = {len(side.survey.norms) for side in sides}
    panel.set_xlabel("block" + (", and the final map (out)" if len(counts) == 1 else "; the last is the map"))
    count = max(counts)
    panel.set_xlim(0.5, count + 0.5)
    if len(counts) == 1 and count <= 25:
        step = max(1, round(count / 13))
        places = [*range(1, count, step), count]
        panel.set_xticks(places, [*(str(place) for place in places[:-1]), "out"])
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
