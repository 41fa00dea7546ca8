"""The ``diagnose`` verb of the command line: why a network is better than another, as one page.

It checks its words and calls one function of ``fd_scale.diagnose``, which is imported only then. ``cli.py``
hangs it below ``fd-scale``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def diagnose(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|WEIGHTS",
            help="A run directory (its newest checkpoint), the average of its weights (RUN#ema), its teacher "
            "(RUN#teacher), an exported .safetensors, or LIBRARY:NAME@WEIGHTS, as `evaluate` takes them.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            help="What it is set against: teacher (of a run; the default there), none, or a network named "
            "like RUN|WEIGHTS."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of shards to look at; the run's own by default. With labels, the loss "
            "landscape of a linear head is measured too."
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many, from the first; by default as many as the networks can be shown "
            "in seconds on a CPU or minutes on a GPU (at most 50,000). The page says how many.",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image of your own for the single pictures, instead of the first of the data. "
            "May be given often."
        ),
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run; the newest by default.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the page; by default RUN/reports/diagnose, or diagnose_out. The same "
            "folder again goes on where a stopped diagnosis left off."
        ),
    ] = None,
    landscape: Annotated[
        bool | None,
        typer.Option(
            help="Measure the loss landscape, the longest part; by default yes, but not with --live."
        ),
    ] = None,
    landscape_images: Annotated[
        int | None, typer.Option(min=1, help="Images it is measured on; by default a part of all.")
    ] = None,
    directions: Annotated[int, typer.Option(min=1, help="Random directions of the landscape.")] = 5,
    points: Annotated[int, typer.Option(min=3, help="Points along each of them; odd.")] = 17,
    radius: Annotated[float, typer.Option(help="Largest alpha, in lengths of the filters.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the random directions.")] = 0,
    surface: Annotated[
        bool, typer.Option("--surface", help="Measure the plane of two directions too: points x points.")
    ] = False,
    fine_tuned: Annotated[
        bool,
        typer.Option(
            "--fine-tuned",
            help="Both networks bring the classifier that they were fine-tuned with on the classes of the "
            "data (fine-tuned runs, timm:NAME.TAG, timm:NAME@FILE): measure its loss and accuracy, as the "
            "papers do.",
        ),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Images at once; changes no number.")] = 32,
    workers: Annotated[
        int,
        typer.Option(
            min=0,
            help="Decoding processes; 0 decodes in this one. Beside a GPU, give all cores that are to spare.",
        ),
    ] = 0,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Run the networks in bfloat16; sums stay float32 and float64.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Make the page anew for every checkpoint of a running job.")
    ] = False,
) -> None:
    """Explain what distillation changed: attention, loss landscape and features, as one HTML page.

    One process by itself; several under torchrun or srun, which share the images.
    """
    from fd_scale.diagnose.landscape import Grid
    from fd_scale.diagnose.launch import launch
    from fd_scale.diagnose.session import Request
    from fd_scale.diagnose.teller import Teller

    request = Request(
        target=target,
        against=against,
        data=data,
        images=images,
        pictures=tuple(image or ()),
        step=step,
        out=out,
        batch=batch,
        workers=workers,
        bf16=bf16,
        with_landscape=not live if landscape is None else landscape,
        landscape_images=landscape_images,
        grid=Grid(points=points, radius=radius, directions=directions, seed=seed),
        with_surface=surface,
        fine_tuned=fine_tuned,
    )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    launch(request, teller=Teller(console.print, console if console.is_terminal else None), live=live)
