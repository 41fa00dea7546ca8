"""What a batch script reads of an evaluation: done, failed for good, or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_scale.errors import UserError
from fd_scale.evaluate import job
from fd_scale.run import world as processes
from fd_scale.run.state import VARIABLE

MAIN: Any = SimpleNamespace(is_main=True)
OTHER: Any = SimpleNamespace(is_main=False)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "state"))
    return tmp_path / "state"


def on(world: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses of what is launched, on this process alone."""
    statuses: list[int] = []

    def launch(action: Callable[[Any], int]) -> None:
        statuses.append(action(world))

    monkeypatch.setattr(processes, "launch", launch)
    return statuses


def test_an_evaluation_that_went_to_its_end_is_done(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, seen = on(MAIN, monkeypatch), []
    job.launch(seen.append)
    assert (statuses, seen) == ([0], [MAIN])
    assert state.read_text() == "DONE step=0\n"


def test_wrong_input_is_not_tried_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(OTHER, monkeypatch)

    def wrong(_: Any) -> None:
        raise UserError("no labels\nin the shards")

    with pytest.raises(UserError):
        job.launch(wrong)
    assert state.read_text() == "FAILED no labels in the shards\n"


def test_between_two_seeds_an_evaluation_is_not_done(state: Path) -> None:
    job.going_on(MAIN, 6)
    assert state.read_text() == "RUNNING step=6 from=6\n"
    job.done(OTHER, 6)
    assert state.read_text() == "RUNNING step=6 from=6\n"
    job.done(MAIN, 6)
    assert state.read_text() == "DONE step=6\n"
