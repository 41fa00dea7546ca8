"""A run that stands still says where on every rank, and ends; one that gets on is left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from fd_scale.run import watchdog
watchdog.GATHER_S = 2.0
folder, limit_s, rank, size = Path(sys.argv[1]), float(sys.argv[2]), *map(int, sys.argv[3:])
dog = watchdog.Watchdog(folder, limit_s, rank=rank, world_size=size)
end = time.monotonic() + 1.5
while time.monotonic() < end:
    dog.beat("step 7")
    time.sleep(0.02)
def stand_still():
    {stand}
def other():
    time.sleep(60)
threading.Thread(target=other, daemon=True).start()
stand_still()
dog.stop()
time.sleep(1.5)
"""

HOLD_THE_LOCK = "ctypes.PyDLL(None).sleep(60)  # a call of C that keeps the interpreter's lock"


def start(
    folder: Path, stand: str, *, limit_s: float = 1.0, rank: int = 0, size: int = 1
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-c",
        PROGRAM.format(stand=stand),
        str(folder),
        str(limit_s),
        str(rank),
        str(size),
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    _, complaint = process.communicate(timeout=30)
    return process.returncode, complaint


def test_all_ranks_write_all_stacks_and_end_with_1(tmp_path: Path) -> None:
    folder = tmp_path / "starts" / "0001" / "stacks"
    ranks = [start(folder, "time.sleep(60)", rank=rank, size=2) for rank in (0, 1)]
    for rank, (status, complaint) in enumerate(map(end, ranks)):
        assert status == 1
        assert f"rank {rank}: nothing came for 1 s after step 7" in complaint
        assert "in stand_still" in complaint
        assert "no stacks from" not in complaint
        stacks = (folder / f"rank-{rank:05d}.txt").read_text()
        assert "in stand_still" in stacks
        assert "in other" in stacks


def test_a_rank_without_stacks_is_named_by_one_of_the_others(tmp_path: Path) -> None:
    ranks = [start(tmp_path, "time.sleep(60)", rank=rank, size=4) for rank in (1, 3)]
    complaints = [end(rank)[1] for rank in ranks]
    assert ["no stacks from ranks 0, 2" in complaint for complaint in complaints] == [True, False]


def test_code_that_keeps_the_lock_is_ended_by_the_timer(tmp_path: Path) -> None:
    begin = time.monotonic()
    status, complaint = end(start(tmp_path, HOLD_THE_LOCK))
    assert status == 1
    assert time.monotonic() - begin < 20
    assert "Timeout" in complaint
    assert "in stand_still" in complaint


def test_a_folder_that_cannot_be_written_leaves_the_standard_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, complaint = end(start(tmp_path / "file" / "stacks", "time.sleep(60)"))
    assert status == 1
    assert "cannot be written" in complaint
    assert "in other" in complaint


def test_stacks_are_written_where_nobody_reads_the_standard_error(tmp_path: Path) -> None:
    """As for a rank whose launcher was killed."""
    process = start(tmp_path, "time.sleep(60)")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    assert "in stand_still" in (tmp_path / "rank-00000.txt").read_text()


@pytest.mark.parametrize(
    "stand", ["time.sleep(0.3)", "dog.stop(); time.sleep(2.5)"], ids=["quick", "stopped"]
)
def test_what_gets_on_or_is_not_watched_is_left_alone(tmp_path: Path, stand: str) -> None:
    status, complaint = end(start(tmp_path / "stacks", stand))
    assert (status, complaint) == (0, "")
    assert not (tmp_path / "stacks").exists()
