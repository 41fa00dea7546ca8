"""Is every rank getting on? A run that stands still says where, on all ranks, and ends.

The loop beats once per micro-batch, which sets one number. A thread compares it with the clock. Since ranks
wait for one another, one that hangs makes all of them stand still within a step, and each rank's own thread
writes the stacks of all its threads to

    <run>/starts/0003/stacks/rank-00001.txt      of the third start

and, when the others have done so too, ends the process with status 1; the job script starts the run again.
Where a thread of Python cannot do that (a file system that does not answer, native code that keeps the
interpreter's lock), a timer in C does it a little later: the stacks then go to the standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import sys
import threading
import time
import traceback
from pathlib import Path

POLLS = 20
"""Looks at the clock per allowed time, hence how late a hang may be noticed: a twentieth."""

GATHER_S = 20.0
"""Longest wait for the stacks of the other ranks."""


class Watchdog:
    """Ends this process when ``beat`` was not called for ``limit_s`` seconds; ``None`` watches nothing.

    ``folder`` gets the stacks, and is made only then.
    """

    def __init__(self, folder: Path, limit_s: float | None, *, rank: int, world_size: int) -> None:
        self._folder, self._limit_s, self._rank, self._world_size = folder, limit_s, rank, world_size
        self._beat_at = time.monotonic()
        self._where = "the start"
        self._stopped = threading.Event()
        self._main = threading.main_thread().ident
        # Kept, since whoever captures output replaces sys.stderr; the timer needs a descriptor.
        self._stderr = sys.__stderr__
        if limit_s is not None:
            threading.Thread(target=self._watch, args=(limit_s,), name="watchdog", daemon=True).start()

    def beat(self, where: str) -> None:
        """Say that the run got as far as ``where``."""
        self._beat_at, self._where = time.monotonic(), where

    def stop(self) -> None:
        """Watch no longer."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, limit_s: float) -> None:
        while not self._stopped.wait(limit_s / POLLS):
            silent_s = time.monotonic() - self._beat_at
            if silent_s > limit_s:
                self._end(silent_s)
            self._wind_timer(limit_s - silent_s + GATHER_S + limit_s / POLLS)

    def _wind_timer(self, seconds: float) -> None:
        """The timer in C, from now on; it needs neither the interpreter's lock nor the file system."""
        with contextlib.suppress(ValueError, AttributeError, io.UnsupportedOperation):  # no real stderr
            faulthandler.dump_traceback_later(seconds, exit=True, file=self._stderr)  # type: ignore[arg-type]

    def _end(self, silent_s: float) -> None:
        self._wind_timer(2 * GATHER_S)  # its time for the others is not to run out while they are waited for
        path = self._folder / f"rank-{self._rank:05d}.txt"
        _say(
            f"rank {self._rank}: nothing came for {silent_s:.0f} s after {self._where} (run.watchdog_s); "
            f"it is at {self._innermost()}; all stacks: {path}"
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.flush()
                os.fsync(file.fileno())
            missing = self._wait_for_others()
            if missing and self._rank == min(set(range(self._world_size)) - missing):
                names = ", ".join(map(str, sorted(missing)))
                _say(f"no stacks from ranks {names}: stopped or unreachable")
        except OSError as error:
            _say(f"{path} cannot be written: {error}")
            faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    def _wait_for_others(self) -> set[int]:
        """Ranks without stacks after ``GATHER_S``: the first to leave makes the launcher end the others."""
        deadline = time.monotonic() + GATHER_S
        missing = self._missing()
        while missing and time.monotonic() < deadline:
            time.sleep(0.5)
            missing = self._missing()
        return missing

    def _missing(self) -> set[int]:
        there = {path.name for path in self._folder.iterdir() if path.stat().st_size}
        return {rank for rank in range(self._world_size) if f"rank-{rank:05d}.txt" not in there}

    def _innermost(self) -> str:
        """File, line and function where the main thread is."""
        frame = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "no place that Python knows"
        last = traceback.extract_stack(frame)[-1]
        return f"{last.filename}:{last.lineno} in {last.name}"


def _say(text: str) -> None:
    """To the standard error, which may have nobody who reads it: the process is to end all the same."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
