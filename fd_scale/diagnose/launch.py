"""How is a diagnosis started, on however many processes, and how does it follow a running job?"""

from __future__ import annotations

import signal
import sys
import time

import torch.distributed as dist

from fd_scale.diagnose.report import LIVE_REFRESH_S
from fd_scale.diagnose.session import Request, diagnose
from fd_scale.diagnose.subjects import DiagnoseError
from fd_scale.diagnose.teller import Teller
from fd_scale.engine.checkpoint import committed
from fd_scale.errors import RunError, UserError
from fd_scale.evaluate.naming import DistilledRun, meaning
from fd_scale.run.folder import RunFolder
from fd_scale.run.world import World

Sign = tuple[int | None, int]
"""Newest step and size of the metrics: what makes another page when it changes."""


def launch(request: Request, *, teller: Teller, live: bool = False) -> None:
    """Join the launcher's other processes, and diagnose. A ``UserError`` is raised on the main process; the
    others exit with status 2. Ctrl-C leaves what is finished, and exits with status 130."""
    world = World.start()
    try:
        if live:
            watch(request, world, teller=teller)
        else:
            diagnose(request, world, teller=teller)
    except UserError:
        if world.is_main:
            raise
        sys.exit(2)
    except KeyboardInterrupt:
        _tell(world, teller, "stopped: the same command goes on from what is finished")
        sys.exit(128 + signal.SIGINT)
    finally:
        dist.destroy_process_group()


def watch(request: Request, world: World, *, teller: Teller, every_s: float = LIVE_REFRESH_S) -> None:
    """Make the page of a run again for each of its checkpoints and log lines, until it is finished.
    Collective.

    Raises ``DiagnoseError`` where there is no run, or where a step was chosen.
    """
    followed = meaning(request.target)
    if request.step is not None or not isinstance(followed, DistilledRun):
        raise DiagnoseError(
            f"--live follows a run's newest checkpoint, not {request.target} at a step or file"
        )
    folder = followed.folder
    last_step = folder.read_recipe().steps
    shown: Sign | None = None
    while True:
        sign = world.on_main(lambda: _sign(folder))
        is_finished = sign[0] is not None and sign[0] >= last_step
        if sign[0] is None:
            _tell(world, teller, f"{folder.path} has no checkpoint yet; looking again every {every_s:g} s")
        elif sign != shown:
            try:
                diagnose(request, world, teller=teller, live=not is_finished)
                shown = sign
            except RunError as error:
                # A running job removes old checkpoints, perhaps the one that was being read.
                _tell(world, teller, f"{error}; looking again")
        if is_finished and shown == sign:
            return
        world.on_main(lambda: time.sleep(every_s))


def _sign(folder: RunFolder) -> Sign:
    saved = committed(folder.checkpoints)
    size = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
    return (saved[-1].step if saved else None), size


def _tell(world: World, teller: Teller, text: str) -> None:
    if world.is_main:
        teller.say(text)
