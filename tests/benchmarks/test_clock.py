"""What the benchmarks' clock reports, with the time replaced; and what it says of memory."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from benchmarks import clock


def test_quantiles_and_the_spread_of_passes() -> None:
    found = clock.summary([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    assert found == {"median": 2.5, "q20": 2.0, "q80": 4.0, "spread_of_passes": 1.0}


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
