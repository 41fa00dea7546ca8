"""Work by processes: answers in order, errors raised here, nothing begun after one."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fd_scale.data.pool import bar, each, processes
from fd_scale.errors import ShardError


@dataclass(frozen=True)
class Square:
    """Notes what it was asked, and fails at 7."""

    folder: Path

    def __call__(self, number: int) -> tuple[int, int]:
        (self.folder / str(number)).touch()
        if number == 7:
            raise ShardError("seven is damaged")
        return number**2, os.getpid()


def test_answers_come_in_order_from_other_processes(tmp_path):
    answers = list(each(Square(tmp_path), range(7), 2))
    assert [answer for answer, _ in answers] == [number**2 for number in range(7)]
    assert os.getpid() not in {process for _, process in answers}


def test_one_process_is_this_one(tmp_path):
    assert list(each(Square(tmp_path), [2, 3], 1)) == [(4, os.getpid()), (9, os.getpid())]
    assert list(each(Square(tmp_path), [3], 8)) == [(9, os.getpid())]
    assert list(each(Square(tmp_path), [], 8)) == []


def test_an_error_is_raised_here_and_little_is_begun_after_it(tmp_path):
    with pytest.raises(ShardError, match="seven is damaged"):
        list(each(Square(tmp_path), range(1000), 2))
    assert len(list(tmp_path.iterdir())) < 40


def test_as_many_processes_as_cores_unless_said():
    assert processes(None) == len(os.sched_getaffinity(0))
    assert processes(3) == 3


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("fd_scale.data.pool.time.monotonic", lambda: now[0])
    with bar(None, "doing", 1500) as advance:
        for _ in range(3):
            advance(500)
            now[0] += 20
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["doing: 1,500 of 1,500"]
    with bar(None, "counting", None) as advance:
        for _ in range(3):
            now[0] += 20
            advance(1)
    assert capsys.readouterr().err.splitlines() == ["counting: 2"]
