"""The ``shards`` part of the command line: make tar shards and look into them.

Each verb checks its words and calls one function of ``fd_scale.data``, which is imported only then, so that
``--help`` needs no PyTorch. ``cli.py`` hangs this below ``fd-scale shards``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make and look into tar shards.", no_args_is_help=True, rich_markup_mode=None)

OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="New or empty folder for the shards.")]
CountOption = Annotated[int, typer.Option("--max-count", min=1, help="Samples per shard, at most.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Decides what is drawn, and the order.")]


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A folder of images, flat or with one folder per class.")],
    out: OutArgument,
    max_count: CountOption = 10_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Bytes per shard, at most.")] = 2**30,
    seed: SeedOption = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Keep this many images of the shuffle.")] = None,
) -> None:
    """Write images as shards: shuffled once, bytes kept, indexed, the same bytes for the same seed."""
    from fd_scale.data.pack import pack as write

    report = write(source, out, max_count=max_count, max_bytes=max_bytes, seed=seed, limit=limit)
    classes = f", {len(report.classes)} classes" if report.classes else ""
    typer.echo(
        f"{report.num_samples:,} images in {report.num_shards:,} shards, "
        f"{report.num_bytes / 2**20:,.1f} MiB{classes}: {report.folder}"
    )
    for suffix, count in sorted(report.skipped.items()):
        typer.echo(f"left out, no image: {count:,} x {suffix}")


@app.command()
def scenes(
    out: OutArgument,
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Scenes to draw.")] = 2000,
    image_size: Annotated[int, typer.Option("--image-size", min=16, help="Side of a picture, pixels.")] = 128,
    seed: SeedOption = 0,
    max_count: CountOption = 1000,
) -> None:
    """Draw labelled scenes as shards: a data set for trials that needs no download."""
    from fd_scale.data.scenes import write_scenes

    written = write_scenes(out, num_images=num_images, size=image_size, seed=seed, max_count=max_count)
    typer.echo(f"{num_images:,} scenes in {len(written):,} shards: {out}")
