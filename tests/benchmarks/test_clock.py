"""What the benchmarks' clock reports, with the time replaced; and what it says of memory."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from benchmarks import clock


def test_quantiles_and_the_spread_of_passes() -> None:
    found = clock.summary([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert found == {"median": 2.5, "q20": 2.0, "q80": 4.0, "spread_of_passes": 1.0, "num_runs": 6}


def test_runs_are_interleaved_and_warm_ups_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    done: list[str] = []
    works = {"a": lambda: done.append("a"), "b": lambda: done.append("b")}
    found = clock.interleaved(works, "cpu", clock.Protocol(1, 2, 1), calls=4)
    assert "".join(done) == "ab" + "abab"
    assert found["a"]["median"] == found["b"]["median"] == 1e6 / 4


def test_a_replay_writes_into_the_first_outputs() -> None:
    values = iter((1.0, 5.0))
    replay, (output,) = clock.captured(lambda: [torch.tensor(next(values))], "cpu")
    replay()
    assert output == 5.0


def test_peak_is_of_what_lives_at_once() -> None:
    def work() -> None:
        for _ in range(3):
            (torch.empty(1000) + 1).sum()

    assert clock.peak_bytes(work, "cpu") == 8000  # two tensors of 4000 bytes


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "timed", lambda *_: {"median": 2.0})
    assert clock.copy_gb_per_s("cpu", clock.SMOKE, 4000) == pytest.approx(2 * 4000 / 2 / 1e3)
    assert clock.matmul_tflops("cpu", clock.SMOKE, 100, torch.float32) == pytest.approx(2e6 / 2 / 1e6)


def test_when_the_time_is_over_there_are_fewer_runs_and_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    protocol = clock.Protocol(warm_up=5, runs=20, passes=2)
    monkeypatch.setattr(clock, "_until", clock.math.inf)
    assert clock.timed(lambda: counts.append(1), "cpu", protocol)["num_runs"] == 40
    assert len(counts) == 50
    counts.clear()
    clock.begin(-1.0)
    assert clock.is_late()
    assert clock.timed(lambda: counts.append(1), "cpu", protocol)["num_runs"] == 2 * clock.LEAST_RUNS
    assert len(counts) == 2 * (1 + clock.LEAST_RUNS)
    left_out: list[str] = []
    assert list(clock.in_time(["a", "b"], str.upper, left_out)) == []
    assert clock.named(left_out) == ["left out, the time was over: A", "left out, the time was over: B"]
    clock.begin(60.0)
    assert list(clock.in_time(["a", "b"], str.upper, left_out)) == ["a", "b"]
    clock.begin(None)
    assert not clock.is_late()
