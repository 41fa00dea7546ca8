"""Figures hold long names: those of fine-tuned runs are longer than a column of pictures is wide."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np

from fd_scale.diagnose.figures_tokens import picture_figure
from fd_scale.diagnose.results import Pictures


def test_names_above_pictures_do_not_run_into_each_other() -> None:
    names = ["fine-tuned fd_base-5c87e1ea@30", "fine-tuned fd_base-577ba418#ema@12000"]
    sides = [
        SimpleNamespace(name=name, role=role) for name, role in zip(names, ("before", "after"), strict=True)
    ]
    maps = {name: np.random.default_rng(0).random((1, 4, 4)) for name in names}
    colours = {name: np.zeros((1, 4, 4, 3)) for name in names}
    pictures = Pictures(["one"], np.zeros((1, 8, 8, 3)), colours, maps, maps)
    results: Any = SimpleNamespace(sides=sides, pictures=pictures)
    drawing = picture_figure(results)
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    titles = [panel.title.get_window_extent() for panel in drawing.figure.axes]
    assert len(titles) == 7
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    assert titles[-1].x1 <= drawing.figure.bbox.x1
