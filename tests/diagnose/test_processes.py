"""Two processes that share the images give what one gives, to 1e-6: a whole diagnosis, and Swin's windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

from fd_scale.diagnose.landscape import Grid
from fd_scale.diagnose.results import Results
from fd_scale.diagnose.session import Request, diagnose
from fd_scale.diagnose.teller import SILENT
from fd_scale.run.world import World
from tests.diagnose.test_survey import assert_equal, surveyed
from tests.spawn import spawn

GRID = Grid(points=3, directions=2)


def everything(world: World, run: Path, out: Path) -> dict[str, Any]:
    """What is found of a run and its teacher, drawn or not; batches are of another size in each world."""
    kept: list[Results] = []

    def written(results: Results, folder: Path, *, live: bool) -> Path:
        kept.append(results)
        return folder

    request = Request(
        str(run), images=21, landscape_images=5, grid=GRID, batch=4 - world.size, out=out, with_surface=True
    )
    with patch("fd_scale.diagnose.session.write", written):
        diagnose(request, world, teller=SILENT)
    swin = surveyed("swin", 4 - world.size, world).record()
    if not kept:
        return {}
    (results,) = kept
    assert results.drift is not None
    assert len(results.landscapes) == len(results.surfaces) == 5
    return {
        "surveys": {side.name: side.survey.record() for side in results.sides} | {"swin": swin},
        "cka": results.cka,
        "landscapes": {
            f"{found.network}, {name}": curves
            for found in results.landscapes
            for name, curves in found.curves.items()
        },
        "surfaces": {
            f"{found.network}, {name}": heights
            for found in results.surfaces
            for name, heights in found.heights.items()
        },
        "drift": dict(enumerate(results.drift.loss)),
    }


def test_two_processes_find_what_one_finds(run: Path, world: World, tmp_path: Path) -> None:
    two, _ = spawn(everything, 2, run, tmp_path / "two")
    assert_equal(everything(world, run, tmp_path / "one"), two)
