"""Pieces: made once, found again, planned without being made, and not there until they are finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.store import Store


def piece(store: Store, facts: dict[str, Any], made: list[int]) -> Any:
    def make(folder: Path) -> dict[str, Any]:
        made.append(1)
        (folder / "weights.safetensors").write_text("x")
        return {"top1": 0.5}

    return store.piece("thing", facts, make, work=7.0, suppose={"top1": 0.0})


def test_a_piece_is_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    first = piece(Store(tmp_path, print), {"a": 1}, made)
    second = piece(Store(tmp_path, print), {"a": 1}, made)
    assert (len(made), first.record, second.record) == (1, {"top1": 0.5}, {"top1": 0.5})
    assert second.weights.read_text() == "x"
    piece(Store(tmp_path, print), {"a": 2}, made)
    assert len(made) == 2


def test_planning_makes_nothing_and_adds_up(tmp_path: Path) -> None:
    made: list[int] = []
    plan = Store(tmp_path, print, planning=True)
    assert piece(plan, {"a": 1}, made).record == {"top1": 0.0}
    piece(plan, {"a": 1}, made)
    piece(plan, {"a": 2}, made)
    assert (made, sum(plan.todo.values()), list(tmp_path.iterdir())) == ([], 14.0, [])
    piece(Store(tmp_path, print), {"a": 1}, made)
    again = Store(tmp_path, print, planning=True)
    assert piece(again, {"a": 1}, made).record == {"top1": 0.5}
    assert again.todo == {}


def test_what_was_interrupted_is_made_again(tmp_path: Path) -> None:
    def broken(folder: Path) -> dict[str, Any]:
        (folder / "weights.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, print).piece("thing", {"a": 1}, broken, work=1, suppose={})
    made: list[int] = []
    assert piece(Store(tmp_path, print), {"a": 1}, made).record == {"top1": 0.5}
    assert len(made) == 1
