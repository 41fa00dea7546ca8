"""How does an evaluation tell its batch script how it ended? By the same words as a run (``run/state.py``).

Fine-tunings and probes are runs and say more; what measures frozen networks says that it is done, or that
another start would fail in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

from fd_scale.errors import UserError
from fd_scale.run import world as processes
from fd_scale.run.state import announce
from fd_scale.run.world import World


def launch(action: Callable[[World], None]) -> None:
    """``run.world.launch`` for an action that goes to its end or fails."""

    def told(world: World) -> int:
        try:
            action(world)
        except UserError as error:
            announce(f"FAILED {error}", None)
            raise
        done(world)
        return 0

    processes.launch(told)


def done(world: World, step: int = 0) -> None:
    """Nothing is left to do."""
    if world.is_main:
        announce(f"DONE step={step}", None)


def going_on(world: World, step: int) -> None:
    """A part of the evaluation is done, as far as ``step``; its run has said that it was finished."""
    if world.is_main:
        announce(f"RUNNING step={step} from={step}", None)
