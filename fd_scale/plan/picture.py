"""Where does the memory go? A bar for each moment of the plan, beside the GPU that has to hold it."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from fd_scale.plan.foretell import Plan, choice_memory
from fd_scale.run.folder import write_atomically

LEGEND_SHARE = 0.005
"""Of the width: smaller parts are drawn and not named."""
ROOM = 3
"""A GPU of more than so many times the peak is named beside the bars, which would be slivers before it."""


def draw_memory(plan: Plan, path: Path) -> None:
    """Write a PNG of stacked bars, GiB, with a line at the GPU's memory."""
    found = choice_memory(plan.asked)
    gpu = plan.cluster.gpu
    beside = gpu.memory_gib > ROOM * found["peak"]
    width = 1.2 * found["peak"] if beside else 1.1 * max(gpu.memory_gib, found["peak"])
    names = list(dict.fromkeys(part for parts in found["moments"].values() for part in parts))
    colours = [colormaps["tab20"](index % 20) for index in range(len(names))]
    figure = Figure(figsize=(8.5, 2.4 + 0.15 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for row, parts in enumerate(found["moments"].values()):
        left = 0.0
        for name, colour in zip(names, colours, strict=True):
            size = parts.get(name, 0.0)
            axes.barh(
                row, size, left=left, color=colour, label=name if size >= LEGEND_SHARE * width else None
            )
            left += size
        axes.text(left, row, f" {left:.1f} GiB", va="center", fontsize=9)
    if not beside:
        axes.axvline(gpu.memory_gib, color="black", linestyle="--", linewidth=1)
    words = f"{gpu.name}, {gpu.memory_gib:g} GiB "
    axes.text(width if beside else gpu.memory_gib, -0.55, words, ha="right", fontsize=8)
    axes.set_yticks(range(len(found["moments"])), list(found["moments"]))
    axes.set_xlim(0, width)
    axes.set_ylim(len(found["moments"]) - 0.4, -0.8)
    axes.set_xlabel("memory of one GPU, GiB (planned)")
    axes.set_title(f"{plan.survey.recipe.name}, {plan.cluster.num_gpus} GPUs", fontsize=10, loc="left")
    seen = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(
        seen.values(), seen.keys(), fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, image.getvalue())
