"""Who may write into a run directory: one start of a run at a time, and never for ever.

    <run>/lease/00000007     the seventh start that had the directory, and what shows that it lives

Locks of the operating system do not reach across machines on every file system, and a dead job cannot give
one back. So a start writes down who it is, and renews that every ``RENEW_S`` seconds in a thread. Another
start finds the newest lease and decides:

1. It was given back: free.
2. It is of the same Slurm job, at an earlier restart: free, since Slurm starts a job again only when it is
   over. A requeued job is never kept waiting by its own past.
3. It is of this machine since the same boot, and that process is gone: free at once.
4. It changes while one watches it: a live start holds it. Refused.
5. It stays as it is for ``DEAD_AFTER_S`` seconds by the watcher's own clock: free. Clocks of two machines
   are never compared, and the time is longer than a network file system keeps old attributes (60 s on NFS).

To take the directory is to create the file of the next number, which one of many can do. Whoever had it
before and lives all the same, on a machine that was cut off, finds a higher number: at its next renewal, and
before it commits a checkpoint. It ends itself then.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fd_scale.errors import RunError
from fd_scale.run.folder import sync, write_atomically

RENEW_S = 15.0
DEAD_AFTER_S = 90.0
"""Six renewals, and more than the 60 s for which NFS may show an old file."""

WATCH_S = 1.0
"""Between two looks at a lease whose holder may be dead."""


class LeaseLostError(RuntimeError):
    """Another start has the run directory now: whatever this one would still write is not wanted."""


class Lease:
    """The right of this start to write into a run directory; for one process of a run (``World.on_main``)."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._folder = run / "lease"
        self._owner = _owner()
        self._mine: Path | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, say: Callable[[str], None]) -> None:
        """Become the one start that may write here, and renew it from now on.

        Raises ``RunError`` when a live start holds the directory. A holder that gives no sign of life is
        waited for, ``DEAD_AFTER_S`` at most; ``say`` gets one line then.
        """
        self._folder.mkdir(exist_ok=True)
        newest = self._newest()
        if newest is not None:
            self._outlive(newest, say)
        self._create(1 if newest is None else int(newest.name) + 1)
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise ``LeaseLostError`` when another start has taken the run directory meanwhile."""
        newest = self._newest()
        if newest != self._mine:
            raise LeaseLostError(f"{self.run} was taken by another start: {_described(_read(newest))}")

    def give_back(self) -> None:
        """Let the next start in at once. Does nothing where there is nothing to give back, or the file system
        is in the way: the next start then sees by itself that this one is over."""
        if self._thread is None or self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(RENEW_S)  # a renewal under way must not have the last word
        try:
            self._write({"given_back": True})
        except OSError as error:
            print(f"{self._mine} cannot be given back: {error}", file=sys.stderr, flush=True)

    def _create(self, number: int) -> None:
        mine = self._folder / f"{number:08d}"
        try:
            mine.open("x").close()
        except FileExistsError:
            raise RunError(
                f"{self.run} was taken just now by another start: {_described(_read(mine))}"
            ) from None
        self._mine = mine
        self._write({})
        for path in self._numbered():
            if int(path.name) < number:
                path.unlink(missing_ok=True)
        sync(self._folder)

    def _outlive(self, held: Path, say: Callable[[str], None]) -> None:
        """Return when the holder is dead; raise when it lives."""
        seen = _read(held)
        if _is_over(seen, self._owner):
            return
        say(
            f"{self.run} is held by {_described(seen)}; "
            f"going on when there is no sign of life for {DEAD_AFTER_S:.0f} s"
        )
        deadline = time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < deadline:
            time.sleep(WATCH_S)
            now = _read(held)
            if now.get("given_back"):
                return
            if now != seen:
                raise RunError(
                    f"{self.run} is in use by {_described(now)}: let it end (`scancel` it), or set another "
                    "run.root"
                )

    def _renew_for_ever(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                self.check()
                self._write({})
            except LeaseLostError as error:
                print(f"error: {error}; ending this one", file=sys.stderr, flush=True)
                os._exit(1)
            except OSError as error:
                # A file system that is away for a while: nothing can be committed either, and the check
                # before the next commit says whether the directory is still ours.
                print(f"{self._mine} cannot be renewed: {error}", file=sys.stderr, flush=True)

    def _write(self, more: dict[str, Any]) -> None:
        if self._mine is None:
            raise RuntimeError("a lease is written before it is taken")
        renewed = {"renewed_utc": datetime.now(UTC).isoformat()}
        write_atomically(self._mine, json.dumps(self._owner | renewed | more) + "\n")

    def _newest(self) -> Path | None:
        return max(self._numbered(), default=None)

    def _numbered(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name.isdecimal()]


def _owner() -> dict[str, Any]:
    """Who this start is, in facts that another process can check."""
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _machine() -> str | None:
    """What two processes share when one sees the other's pid: the boot, and the container; None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read(path: Path | None) -> dict[str, Any]:
    """What a lease says; nothing where it is gone, or its writer was cut off before the first word."""
    try:
        found = json.loads(path.read_text()) if path is not None else {}
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_over(held: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether the holder needs no watching: given back, an earlier start of this job, or known to be gone."""
    if held.get("given_back"):
        return True
    if own["job"] is not None and held.get("job") == own["job"] and held.get("restart", 0) < own["restart"]:
        return True
    return own["machine"] is not None and held.get("machine") == own["machine"] and not _runs(held)


def _runs(held: dict[str, Any]) -> bool:
    return _started(held["pid"]) == held["started"]


def _started(pid: int) -> int | None:
    """Clock ticks between the boot and the start of a process, which no change of the clock moves; None for
    one that is gone, or lies dead without its parent having looked."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(rest[18])


def _described(held: dict[str, Any]) -> str:
    if not held:
        return "a start that has not said who it is"
    job = f"Slurm job {held['job']}, " if held.get("job") else ""
    return f"{job}process {held['pid']} on {held['host']}"
