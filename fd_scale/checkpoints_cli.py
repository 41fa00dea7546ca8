"""``fd-scale checkpoints``: what a run has saved, and whether it is whole. Reads, and changes nothing.

``cli.py`` hangs the function below the entry point. What a checkpoint is: ``engine/checkpoint.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fd_scale.engine.checkpoint import Checkpoint


def checkpoints(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file and compare its SHA-256; sizes alone otherwise.")
    ] = False,
) -> None:
    """List a run's checkpoints: step, size, processes that wrote it, and whether it is whole.

    Exit status 2 when one is damaged. Saves under way or cut off are named below the table.
    """
    from fd_scale.engine.checkpoint import committed, faults
    from fd_scale.errors import RunError
    from fd_scale.run.folder import RunFolder
    from fd_scale.run.values import read_values

    folder = RunFolder.at(run).checkpoints
    table = Table("step", "images", "GiB", "files", "processes", "ZeRO", "integrity", box=None)
    for column in table.columns[:-1]:
        column.justify = "right"
    images = read_values(RunFolder.at(run).recipe)["global_batch"]
    found = committed(folder)
    damage = []
    for checkpoint in found:
        wrong = faults(checkpoint, hashes=verify)
        damage += wrong
        table.add_row(*_row(checkpoint, images), _integrity(wrong, verify))
    console = Console(soft_wrap=True)
    console.print(table if found else f"{run} has no checkpoint yet")
    for path in sorted(folder.glob("step-*.*")):
        meaning = "is being saved, or was cut off: never read" if path.suffix == ".partial" else "passed over"
        console.print(f"{path.name}: {meaning}", highlight=False)
    if damage:
        raise RunError(
            f"{len(damage)} files are not what was saved:\n  " + "\n  ".join(damage) + "\nthe next start "
            "passes these checkpoints over; put files back from a copy to use them"
        )


def _row(checkpoint: Checkpoint, images_per_step: int) -> tuple[str, ...]:
    facts = checkpoint.manifest
    return (
        f"{checkpoint.step:,}",
        f"{checkpoint.step * images_per_step:,}",
        f"{checkpoint.size_bytes / 2**30:.3f}",
        str(len(facts["files"])),
        str(facts["world_size"]),
        str(facts["zero_stage"]),
    )


def _integrity(wrong: list[str], verified: bool) -> str:
    if wrong:
        return "damaged"
    return "whole" if verified else "sizes agree"
