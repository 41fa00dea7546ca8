"""What do feature maps look like, and what do before and after come to? One picture and one table.

The picture paints each token by its first three principal components; the table sets models against
measures. Both draw what they are given; what was measured, and how, is the business of ``evaluate``.

Shape letters: B images, h and w the grid, D channels, H and W pixels.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from fd_scale.run.folder import write_atomically

PERCENTILES = (1.0, 99.0)
"""Of each component's scores, shown darkest and brightest, so that one odd token does not grey the rest."""
CELL_INCHES, GAP_INCHES, MARGIN_INCHES, HEAD_INCHES = 1.35, 0.08, 0.2, 0.5
CAPTION_CHARACTERS_PER_INCH = 18.0
"""At the caption's size of 7.5 points."""
CAPTION = (
    "Each token is painted by its place along the first three principal components of that model's own "
    "tokens over these images (red, green, blue). Equal colours within a column are similar tokens; "
    "colours of different columns are not comparable."
)


@dataclass(frozen=True)
class Measured:
    """An accuracy in [0, 1] and its standard error."""

    value: float
    standard_error: float


def feature_map_picture(
    images: Tensor, maps: Mapping[str, Tensor], path: Path, *, caption: str = CAPTION
) -> None:
    """Draw one row per image into a PNG: the image, then each model's map in PCA colours.

    ``images`` is uint8 (B, 3, H, W); ``maps`` holds patches (B, h, w, D) by the model's name, grids and
    widths of any size. Raises ``ValueError`` for maps of another number of images.
    """
    for name, patches_BhwD in maps.items():
        if patches_BhwD.ndim != 4 or len(patches_BhwD) != len(images):
            raise ValueError(
                f"map {name!r} of shape {tuple(patches_BhwD.shape)} is not (B, h, w, D) of the "
                f"{len(images)} images"
            )
    columns = {"image": images.permute(0, 2, 3, 1).numpy()}
    columns |= {name: pca_colours(patches_BhwD) for name, patches_BhwD in maps.items()}
    width = 2 * MARGIN_INCHES + len(columns) * (CELL_INCHES + GAP_INCHES) - GAP_INCHES
    words = textwrap.fill(caption, int((width - 2 * MARGIN_INCHES) * CAPTION_CHARACTERS_PER_INCH))
    foot = MARGIN_INCHES + 0.14 * (words.count("\n") + 2)
    height = HEAD_INCHES + len(images) * (CELL_INCHES + GAP_INCHES) - GAP_INCHES + foot
    figure = Figure(figsize=(width, height))
    for column, (name, pictures) in enumerate(columns.items()):
        left = MARGIN_INCHES + column * (CELL_INCHES + GAP_INCHES)
        for row, picture in enumerate(pictures):
            bottom = height - HEAD_INCHES - row * (CELL_INCHES + GAP_INCHES) - CELL_INCHES
            place = (left / width, bottom / height, CELL_INCHES / width, CELL_INCHES / height)
            _show(figure.add_axes(place), picture)
        title = (left / width, 1 - (HEAD_INCHES - 0.08) / height)
        figure.text(*title, name, fontsize=10, va="bottom")
    figure.text(MARGIN_INCHES / width, (foot - 0.14) / height, words, fontsize=7.5, color="0.35", va="top")
    _save(figure, path)


def pca_colours(patches_BhwD: Tensor) -> NDArray[np.float32]:
    """Every token as a colour (B, h, w, 3) in [0, 1]: its scores on the three main components of all of them.

    The sign of a component, which PCA leaves open, is such that its scores are skewed to the bright side; so
    what is rare (an object before a background) is bright. A component that the map does not have is black.
    """
    tokens = patches_BhwD.detach().double().cpu().flatten(0, 2)
    tokens = tokens - tokens.mean(dim=0)
    left, spread, _ = torch.linalg.svd(tokens, full_matrices=False)
    has_spread = spread[:3] > 1e-9 * spread[:1].clamp_min(1e-30)
    scores = torch.zeros(len(tokens), 3, dtype=torch.float64)
    scores[:, : len(has_spread)] = left[:, :3] * spread[:3] * has_spread
    scores *= torch.where(scores.pow(3).sum(dim=0) < 0, -1.0, 1.0)
    darkest, brightest = np.percentile(scores.numpy(), PERCENTILES, axis=0)
    scaled = (scores.numpy() - darkest) / np.maximum(brightest - darkest, 1e-30)
    return np.clip(scaled, 0, 1).reshape(*patches_BhwD.shape[:3], 3).astype(np.float32)


def before_after_table(rows: Mapping[str, Mapping[str, Measured]], title: str = "") -> Table:
    """Models against measures for the console, accuracies in percent; the best of each measure is bold.

    ``rows`` holds the measures of each model by name; a measure that a model lacks is left blank.
    """
    measures = _measures(rows)
    table = Table(title=title or None, title_justify="left", title_style="not italic")
    table.add_column("model", no_wrap=True)
    for measure in measures:
        table.add_column(measure, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_cell(row, rows, measure, "[bold]{}[/bold]") for measure in measures))
    return table


def before_after_markdown(rows: Mapping[str, Mapping[str, Measured]]) -> str:
    """The same table in Markdown, one trailing newline."""
    measures = _measures(rows)
    lines = ["| model | " + " | ".join(measures) + " |", "|---|" + "---:|" * len(measures)]
    for name, row in rows.items():
        cells = (_cell(row, rows, measure, "**{}**") for measure in measures)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _measures(rows: Mapping[str, Mapping[str, Measured]]) -> list[str]:
    return list(dict.fromkeys(measure for row in rows.values() for measure in row))


def _cell(
    row: Mapping[str, Measured], rows: Mapping[str, Mapping[str, Measured]], measure: str, best: str
) -> str:
    if measure not in row:
        return ""
    text = f"{100 * row[measure].value:.1f} \u00b1 {100 * row[measure].standard_error:.1f}"
    is_best = row[measure].value == max(other[measure].value for other in rows.values() if measure in other)
    return best.format(text) if is_best else text


def _show(axes: Axes, picture: NDArray[np.generic]) -> None:
    """Without interpolation: a token is one square."""
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())
