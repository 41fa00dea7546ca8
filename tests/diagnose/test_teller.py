"""What is said on the way: bars on a terminal, few lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fd_scale.diagnose.teller import LINE_S, Teller


def test_lines_come_when_it_takes_long_and_not_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, LINE_S, LINE_S, LINE_S + 1, 3 * LINE_S])
    monkeypatch.setattr("fd_scale.diagnose.teller.time.monotonic", lambda: next(now))
    told: list[str] = []
    with Teller(told.append).counting("landscape", 2000) as on_done:
        for done in (1, 1500, 1600, 2000):
            on_done(done)
    assert told == ["  landscape: 1,500 of 2,000"]


def test_a_terminal_has_a_bar_that_leaves_nothing_behind() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    told: list[str] = []
    with Teller(told.append, console).counting("landscape", 10) as on_done:
        on_done(10)
    assert not told
    assert "10/10" in console.file.getvalue()  # type: ignore[attr-defined]
