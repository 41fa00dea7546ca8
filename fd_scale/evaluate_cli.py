"""``fd-scale evaluate``: what was gained, measured by one task on one network or several.

``cli.py`` hangs the function below the entry point; each task is a function of ``fd_scale.evaluate``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fd_scale.errors import UserError, near_misses

FROZEN = ("knn", "linear_fast")
TASKS = (*FROZEN,)

NetworksArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="NETWORK...",
        help="A run directory, its teacher (RUN#teacher), an exported .safetensors, or LIBRARY:NAME@WEIGHTS "
        "(timm:vit_base_patch16_224.dino, open_clip:ViT-B-16-quickgelu@openai).",
    ),
]


def evaluate(
    networks: NetworksArgument,
    task: Annotated[str, typer.Option(help="knn, or linear_fast (L-BFGS on features computed once).")],
    train: Annotated[Path, typer.Option(metavar="SHARDS", help="Labelled shards to learn from.")],
    test: Annotated[Path, typer.Option(metavar="SHARDS", help="Labelled shards to measure on.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the records; by default the run's reports/, or reports/.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(help="Step of a run's checkpoint; the newest by default.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the input of a library's network, pixels.")
    ] = None,
    crop_pct: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the resized side that the central crop keeps.")
    ] = 0.875,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes per rank.")] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder in which features are kept for next time.")
    ] = None,
) -> None:
    """Measure networks on labelled shards, and write one JSON record per evaluation.

    One process by itself, or several under torchrun, srun or mpirun, which share the work.
    """
    if task not in TASKS:
        raise UserError(f"unknown --task {task!r}{near_misses(task, TASKS)} (tasks: {', '.join(TASKS)})")
    from fd_scale.evaluate import frozen

    reading = frozen.Reading(crop_pct=crop_pct, batch=batch, workers=workers, cache=cache)
    frozen.run(task, networks, train, test, reading, out=out, step=step, input_size=input_size)
