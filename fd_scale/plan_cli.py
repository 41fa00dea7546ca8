"""``fd-scale plan``: will it fit, how long, what cost. Needs no GPU, and reads no weights.

``cli.py`` hangs the function below the entry point, and reads recipes for it. What is computed, and from
what: ``fd_scale.plan``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fd_scale.errors import PlanError

if TYPE_CHECKING:
    from fd_scale.plan.cluster import Cluster
    from fd_scale.plan.gpus import Gpu
    from fd_scale.run.recipe import Recipe

SbatchOption = Annotated[
    Path | None, typer.Option(help="A Slurm batch script, whose header says nodes, GPUs, cores and time.")
]
GpusOption = Annotated[
    int | None, typer.Option("--gpus", min=1, help="Number of GPUs, in place of a script.")
]
PerNodeOption = Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of a node, with --gpus.")]
GpuOption = Annotated[str, typer.Option("--gpu", help="Which GPU; an unknown name lists them.")]
NodeLinkOption = Annotated[
    float | None,
    typer.Option("--node-link", min=0.001, help="Network between nodes, GB/s per GPU and direction."),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="1, 8, 64, 512 and 4096 GPUs side by side, by ZeRO stage.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object in place of tables.")]
PictureOption = Annotated[Path | None, typer.Option(help="Draw the memory of one GPU into this PNG.")]
GpuHourOption = Annotated[
    float | None, typer.Option("--price-gpu-hour", min=0, help="Money per GPU-hour, any currency.")
]
KwhOption = Annotated[float | None, typer.Option("--price-kwh", min=0, help="Money per kWh.")]
DiskOption = Annotated[float, typer.Option("--disk", min=0.001, help="Rate of a checkpoint's disk, GB/s.")]
DecodeOption = Annotated[
    float, typer.Option("--decode-rate", min=0.001, help="Images/s that one CPU core decodes.")
]


def plan(
    asked: Recipe,
    *,
    sbatch: Path | None,
    gpus: int | None,
    gpus_per_node: int,
    gpu: str,
    node_link: float | None,
    compare: bool,
    as_json: bool,
    picture: Path | None,
    price_gpu_hour: float | None,
    price_kwh: float | None,
    disk: float,
    decode_rate: float,
) -> None:
    """Count the recipe, and print the plan for the machines that the words name."""
    from dataclasses import replace

    from fd_scale.plan import foretell, tables
    from fd_scale.plan import gpus as known
    from fd_scale.plan.cost import Prices

    if sbatch is not None and gpus is not None:
        raise PlanError("--sbatch and --gpus both say how many GPUs there are: give one of them")
    if compare and (sbatch is not None or gpus is not None or picture is not None):
        raise PlanError("--compare sets its own numbers of GPUs: leave --sbatch, --gpus and --picture out")
    chosen = known.get(gpu)
    if node_link is not None:
        chosen = replace(chosen, node_link_gb_s=node_link)
    console = Console()
    if compare:
        columns = foretell.compare(
            foretell.survey(asked), [_sized(n, chosen, gpus_per_node) for n in foretell.COMPARED]
        )
        if as_json:
            typer.echo(json.dumps(foretell.comparison_dict(columns), indent=2))
        else:
            console.print(tables.comparison(columns))
        return
    cluster = _cluster(sbatch, gpus, chosen, gpus_per_node)
    prices = Prices(price_gpu_hour, price_kwh, disk_gb_s=disk, decode_images_per_core_s=decode_rate)
    found = foretell.foretell(foretell.survey(asked), cluster, prices=prices)
    if picture is not None:
        from fd_scale.plan.picture import draw_memory

        draw_memory(found, picture)
    if as_json:
        typer.echo(json.dumps(foretell.as_dict(found), indent=2))
        return
    console.print(tables.plan_tables(found))
    if picture is not None:
        console.print(f"memory: {picture}", soft_wrap=True)


def _cluster(sbatch: Path | None, gpus: int | None, gpu: Gpu, gpus_per_node: int) -> Cluster:
    from fd_scale.plan.cluster import from_sbatch

    if sbatch is not None:
        return from_sbatch(sbatch, gpu)
    return _sized(1 if gpus is None else gpus, gpu, gpus_per_node)


def _sized(num_gpus: int, gpu: Gpu, gpus_per_node: int) -> Cluster:
    from fd_scale.plan.cluster import of_size

    return of_size(num_gpus, gpu, gpus_per_node=gpus_per_node)
