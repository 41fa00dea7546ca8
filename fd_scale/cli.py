"""The command line, and nothing else: each verb checks its words and calls one function.

Exit status: 0 done, 2 wrong input (one message), 1 our fault (a traceback), 128 + n after signal n.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fd_scale import checkpoints_cli, diagnose_cli, evaluate_cli, plan_cli, shards_cli
from fd_scale.errors import UserError

if TYPE_CHECKING:
    from fd_scale.run.recipe import Recipe

app = typer.Typer(
    name="fd-scale",
    help="Large-scale feature distillation of vision foundation models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(shards_cli.app, name="shards")
app.command()(checkpoints_cli.checkpoints)
app.command()(diagnose_cli.diagnose)
app.command()(evaluate_cli.evaluate)
app.command()(evaluate_cli.presets)

REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}
REFUSALS |= {errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG}
"""What a file system says of a place that cannot be written to, which is for the user to put right. Verbs
that run under a launcher end with status 1 after a full disk, so that a job is queued again."""

RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Name of a recipe (see `fd-scale recipes`) or path of a recipe.json.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change one field for a trial: section.field=value. May be given often."),
]


def main() -> None:
    """Entry point of ``fd-scale`` and ``python -m fd_scale``."""
    try:
        app()
    except UserError as error:
        _refuse(str(error))
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        where = "" if error.filename is None else f"{error.filename}: "  # a write does not name its file
        _refuse(f"{where}{error.strerror}; name another place, or make room or rights there")


def _refuse(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", markup=False)
    sys.exit(2)


def _recipe(name: str, assignments: list[str] | None) -> Recipe:
    from fd_scale.run.recipes import chosen

    return chosen(name, assignments or [])


@app.command()
def distill(
    recipe: RecipeOption,
    set_: SetOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved plan and stop.")] = False,
) -> None:
    """Distil a student. The same command goes on where a stopped run left off.

    One process by itself; several under torchrun, srun or mpirun (one per GPU, or per CPU socket).
    """
    wanted = _recipe(recipe, set_)
    if dry_run:
        from fd_scale.outline import outline

        Console().print(outline(wanted))
        return
    from fd_scale.distill import distill as run
    from fd_scale.evaluate.progress import of_recipe

    run(wanted, watch=of_recipe)


@app.command()
def plan(
    recipe: RecipeOption,
    set_: SetOption = None,
    sbatch: plan_cli.SbatchOption = None,
    gpus: plan_cli.GpusOption = None,
    gpus_per_node: plan_cli.PerNodeOption = 8,
    gpu: plan_cli.GpuOption = "h200",
    node_link: plan_cli.NodeLinkOption = None,
    compare: plan_cli.CompareOption = False,
    as_json: plan_cli.JsonOption = False,
    picture: plan_cli.PictureOption = None,
    price_gpu_hour: plan_cli.GpuHourOption = None,
    price_kwh: plan_cli.KwhOption = None,
    disk: plan_cli.DiskOption = 2.0,
    decode_rate: plan_cli.DecodeOption = 150.0,
) -> None:
    """Will it fit, how long will it take, what will it cost? For a recipe on a cluster; needs no GPU.

    One GPU unless --sbatch or --gpus says otherwise. Memory is counted; times are estimates, and the
    assumptions stand below them.
    """
    plan_cli.plan(
        _recipe(recipe, set_),
        sbatch=sbatch,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        node_link=node_link,
        compare=compare,
        as_json=as_json,
        picture=picture,
        price_gpu_hour=price_gpu_hour,
        price_kwh=price_kwh,
        disk=disk,
        decode_rate=decode_rate,
    )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, resolved, as JSON.")] = None,
    set_: SetOption = None,
) -> None:
    """List the recipes, or print one resolved as JSON."""
    from fd_scale.run import recipes as known

    if name is not None:
        typer.echo(_recipe(name, set_).to_json(), nl=False)
        return
    Console(soft_wrap=True).print(known.table())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint; the newest by default.")] = None,
    ema: Annotated[
        bool,
        typer.Option("--ema", help="The moving average of the weights, of a run with optim.average_decay."),
    ] = False,
) -> None:
    """Write the student of a checkpoint as one safetensors file, with a model card. Needs no GPU."""
    from fd_scale.export import export as write

    written = write(run, step=step, average=ema)
    typer.echo(f"{written.weights}\n{written.card}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo_out"),
) -> None:
    """The whole story on this machine, in minutes: scenes, a small teacher, a student, before and after."""
    from fd_scale.demo import run

    run(out)


if __name__ == "__main__":
    main()
