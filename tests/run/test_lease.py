"""One start at a time may write into a run directory, and a dead one holds it for no longer than it takes to
see that."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from fd_scale.errors import RunError
from fd_scale.run import lease
from fd_scale.run.lease import Lease, LeaseLostError

ELSEWHERE = {"machine": "another boot/pid:[1]", "host": "node7"}
"""A holder on another machine, where a pid says nothing."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.2)
    monkeypatch.setattr(lease, "WATCH_S", 0.05)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 1.0)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def held_by(run: Path, number: int = 1, **facts: Any) -> Path:
    """A lease that somebody left behind."""
    (run / "lease").mkdir(exist_ok=True)
    path = run / "lease" / f"{number:08d}"
    path.write_text(json.dumps(lease._owner() | {"renewed_utc": "2026-01-01"} | facts))
    return path


def taken_after_s(run: Path) -> tuple[float, list[str]]:
    said: list[str] = []
    mine = Lease(run)
    begin = time.monotonic()
    mine.take(said.append)
    elapsed = time.monotonic() - begin
    mine.check()
    mine.give_back()
    return elapsed, said


def hold(run: Path, line: Connection) -> None:
    lease.RENEW_S = 0.2
    mine = Lease(run)
    mine.take(print)
    line.send("held")
    line.recv()
    mine.give_back()
    line.send("given back")


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the run directory, and the line to it."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, theirs))
    process.start()
    assert ours.recv() == "held"
    yield process, ours
    process.kill()
    process.join()


def test_a_second_start_is_refused_and_let_in_afterwards(tmp_path: Path, holder: Any) -> None:
    process, line = holder
    with pytest.raises(RunError, match=f"in use by process {process.pid} on .*run.root"):
        Lease(tmp_path).take(print)
    line.send("end")
    assert line.recv() == "given back"
    elapsed, said = taken_after_s(tmp_path)
    assert elapsed < 0.5
    assert said == []


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path: Path, holder: Any) -> None:
    process, _ = holder
    process.kill()
    process.join()
    elapsed, said = taken_after_s(tmp_path)
    assert elapsed < 0.5
    assert said == []


def test_a_pid_that_was_given_to_another_process_is_not_the_holder(tmp_path: Path) -> None:
    held_by(tmp_path, started=1)
    assert taken_after_s(tmp_path)[0] < 0.5


def test_a_silent_holder_elsewhere_is_outlived(tmp_path: Path) -> None:
    held_by(tmp_path, **ELSEWHERE, job="77", number=6)
    elapsed, said = taken_after_s(tmp_path)
    assert 1.0 <= elapsed < 2.0
    assert "held by Slurm job 77, process" in said[0]
    assert "node7" in said[0]
    assert [path.name for path in (tmp_path / "lease").iterdir()] == ["00000007"]


def test_a_start_cut_off_before_its_first_word_is_outlived(tmp_path: Path) -> None:
    held_by(tmp_path).write_text("")
    elapsed, said = taken_after_s(tmp_path)
    assert elapsed >= 1.0
    assert "has not said who it is" in said[0]


@pytest.mark.parametrize(
    ("job", "restart", "waits"), [("12", "1", False), ("12", "0", True), ("13", "1", True)]
)
def test_a_requeued_job_gets_in_past_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restart: str, waits: bool
) -> None:
    held_by(tmp_path, **ELSEWHERE, job="12", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
    assert (taken_after_s(tmp_path)[0] >= 1.0) == waits


def take_together(run: Path, line: Connection) -> None:
    mine = Lease(run)
    line.recv()
    try:
        mine.take(lambda text: None)
    except RunError as error:
        line.send(str(error))
    else:
        line.send("")
    line.recv()


def test_of_many_that_outlive_a_holder_one_gets_in(tmp_path: Path) -> None:
    held_by(tmp_path, **ELSEWHERE)
    context = multiprocessing.get_context("fork")
    lines: list[Connection] = []
    processes = []
    for _ in range(6):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=take_together, args=(tmp_path, theirs)))
        processes[-1].start()
        lines.append(ours)
    for line in lines:
        line.send("go")
    words = [line.recv() for line in lines]
    for line, process in zip(lines, processes, strict=True):
        line.send("end")
        process.join()
    assert words.count("") == 1
    assert all("taken just now" in word or "in use by" in word for word in words if word)


def outlast(action: Callable[[], Any], timeout_s: float = 5.0) -> None:
    end = time.monotonic() + timeout_s
    while not action():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_holder_that_was_outlived_ends_itself(tmp_path: Path, holder: Any) -> None:
    process, _ = holder
    held_by(tmp_path, number=2, **ELSEWHERE)
    outlast(lambda: not process.is_alive())
    assert process.exitcode == 1


def test_a_commit_is_refused_once_another_has_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 60.0)
    mine = Lease(tmp_path)
    mine.take(print)
    mine.check()
    held_by(tmp_path, number=2, **ELSEWHERE, job="78")
    with pytest.raises(LeaseLostError, match="taken by another start: Slurm job 78, process"):
        mine.check()
    mine._ended.set()


def test_a_file_system_that_is_away_for_a_while_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = Lease(tmp_path)
    mine.take(print)
    (tmp_path / "lease").rename(tmp_path / "away")
    outlast(lambda: "cannot be renewed" in capfd.readouterr().err)
    with pytest.raises(OSError, match="No such file"):
        mine.check()
    (tmp_path / "away").rename(tmp_path / "lease")
    mine.check()
    mine.give_back()
    assert json.loads((tmp_path / "lease" / "00000001").read_text())["pid"] == os.getpid()


def test_giving_back_to_a_file_system_that_is_gone_is_no_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = Lease(tmp_path)
    mine.take(print)
    (tmp_path / "lease").rename(tmp_path / "away")
    mine.give_back()
    assert "cannot be given back" in capfd.readouterr().err
