"""How far is a diagnosis? Bars on a terminal, plain lines elsewhere, and nothing on all processes but one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_S = 15.0
"""Where there are no bars, a line no more often than this, seconds."""


@dataclass(frozen=True)
class Teller:
    """Where a diagnosis says what it does."""

    say: Callable[[str], None] = print
    """Takes a line."""
    terminal: Console | None = None
    """Where bars are drawn; lines are said where there is none."""

    @contextmanager
    def counting(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """Give a function that hears how many of ``total`` are done."""
        if self.terminal is None:
            yield self._in_lines(title, total)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.terminal, transient=True) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)

    def _in_lines(self, title: str, total: int) -> Callable[[int], None]:
        last = time.monotonic()

        def on_done(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= LINE_S and done < total:
                last = time.monotonic()
                self.say(f"  {title}: {done:,} of {total:,}")

        return on_done


SILENT = Teller(lambda _: None)
"""What all processes but one have."""
