"""The figures about weights: landscapes, drift over training, and the run's own curves.

Each function draws what it is given and returns a ``Drawing``, or None where there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from fd_scale.diagnose.drawing import LIGHT, Drawing, columns_of, panels, styled
from fd_scale.diagnose.landscape import Landscape, Stage, check_comparable
from fd_scale.diagnose.results import Results

METRICS = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
}
"""Of the run's metrics, those that are drawn, by name."""


def landscape_figure(results: Results, stage: Stage) -> Drawing | None:
    """The curves of one stage, a panel per quantity, all networks in it."""
    found = [landscape for landscape in results.landscapes if landscape.stage == stage]
    if not found:
        return None
    check_comparable(found)
    quantities = list(dict.fromkeys(quantity for landscape in found for quantity in landscape.curves))
    with styled():
        figure, axes = panels(1, len(quantities), height=3.1, width=10.0 if len(quantities) > 1 else 5.6)
        for quantity, panel in zip(quantities, axes, strict=True):
            drawn = [landscape for landscape in found if quantity in landscape.curves]
            for landscape in drawn:
                _curves(panel, landscape, quantity, LIGHT[results.role_of(landscape.network)])
            panel.set_title(quantity[0].upper() + quantity[1:])
            panel.set_xlabel("alpha, in filter lengths")
            panel.legend(loc="best")
    rows = [
        (landscape.network, quantity, direction, alpha, float(curve[place]))
        for landscape in found
        for quantity, curves in landscape.curves.items()
        for direction, curve in enumerate(curves)
        for place, alpha in enumerate(landscape.alphas)
    ]
    headings = ("network", "quantity", "direction", "alpha", "value")
    name = f"landscape-{stage.replace(' ', '-')}"
    words = f"Loss around the weights along random directions, {stage} stage."
    return Drawing(name, figure, columns_of(headings, rows), words)


def surface_figure(results: Results) -> Drawing | None:
    """Contours over the plane of two directions, a panel per network and quantity."""
    drawn = [
        (surface, quantity, heights)
        for surface in results.surfaces
        for quantity, heights in surface.heights.items()
    ]
    if not drawn:
        return None
    with styled():
        columns = min(len(drawn), 3)
        figure, axes = panels(-(-len(drawn) // columns), columns, height=3.3)
        for panel in axes[len(drawn) :]:
            panel.set_visible(False)
        for (surface, quantity, heights), panel in zip(drawn, axes, strict=False):
            lines = panel.contourf(surface.alphas, surface.alphas, heights.numpy(), levels=16, cmap="viridis")
            colour = LIGHT[results.role_of(surface.network)]
            panel.set_title(f"{surface.network}\n{quantity}, {surface.stage}", color=colour, fontsize=9)
            panel.set_aspect("equal")
            panel.set_xlabel("alpha 2")
            panel.set_ylabel("alpha 1")
            figure.colorbar(lines, ax=panel, shrink=0.8).outline.set_visible(False)
    rows = [
        (surface.network, surface.stage, quantity, first, second, float(heights[row, column]))
        for surface, quantity, heights in drawn
        for row, first in enumerate(surface.alphas)
        for column, second in enumerate(surface.alphas)
    ]
    headings = ("network", "stage", "quantity", "alpha 1", "alpha 2", "value")
    return Drawing(
        "landscape-surface", figure, columns_of(headings, rows), "Loss over two random directions."
    )


def drift_figure(results: Results) -> Drawing | None:
    """Distance and similarity to the last checkpoint, and the loss, by step."""
    drift = results.drift
    if drift is None:
        return None
    shown = {
        "Distance of weights to the last": (drift.weight_distance, "relative length"),
        "Similarity of features to the last": (drift.cka_to_last, "CKA"),
        "Distillation loss": (drift.loss, "loss"),
    }
    shown = {title: values for title, values in shown.items() if values[0]}
    with styled():
        figure, axes = panels(1, len(shown), height=2.7)
        for (title, (values, label)), panel in zip(shown.items(), axes, strict=True):
            panel.plot(drift.steps, values, color=LIGHT["after"], marker="o", markersize=4)
            panel.set_title(title)
            panel.set_ylabel(label)
            panel.set_xlabel("optimizer step")
            panel.set_ylim(bottom=min(0, *values))
    table: dict[str, Sequence[Any]] = {"step": drift.steps}
    table |= {title: values for title, (values, _) in shown.items()}
    return Drawing("drift", figure, table, "Checkpoints of the run set against the last one.")


def training_figure(results: Results) -> Drawing | None:
    """The run's own curves, from its metrics."""
    rows = [row for row in results.training if row.get("loss") is not None]
    shown = [name for name in METRICS if any(row.get(name) is not None for row in rows)]
    if len(rows) < 2:
        return None
    with styled():
        figure, axes = panels(1, len(shown), height=2.4)
        for name, panel in zip(shown, axes, strict=True):
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            panel.plot(*zip(*points, strict=True), color=LIGHT["after"])
            panel.set_title(METRICS[name][0].upper() + METRICS[name][1:])
            panel.set_xlabel("optimizer step")
            panel.set_ylim(bottom=0)
    headings = ("step", *shown)
    table = columns_of(headings, [[row.get(name) for name in headings] for row in rows])
    return Drawing("training", figure, table, "Loss, learning rate and speed of the run.")


def _curves(panel: Axes, landscape: Landscape, quantity: str, colour: str) -> None:
    curves = landscape.curves[quantity]
    for curve in curves:
        panel.plot(landscape.alphas, curve, color=colour, alpha=0.4, linewidth=0.9)
    panel.plot(landscape.alphas, curves.mean(dim=0), color=colour, label=landscape.network)
