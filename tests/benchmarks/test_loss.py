"""The loss benchmark without a GPU: it says so; and its bookkeeping, with the clock and the graphs
replaced."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import loss


def test_it_says_that_a_gpu_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loss.main() == 2
    said = "benchmarks/loss.py times a GPU, and this machine has no CUDA device: run it where there is one\n"
    assert capsys.readouterr().out == said


def replayed(work: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
    """A graph without a device: computes again and copies into the outputs of the first time."""
    outputs = work()

    def replay() -> None:
        for output, value in zip(outputs, work(), strict=True):
            output.data.copy_(value.data)

    return replay, outputs


def test_rows_of_a_small_case(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = loss.Case("masked", (2, 4, 8), mask_N=torch.tensor([True, False, False, True]))
    weighted = loss.Case("weighted", (2, 4, 8), weight_N=torch.tensor([10.0, 1, 1, 1]))
    assert masked.num_bytes() == 2 * 2 * 8 * (2 * 2 + 4)
    assert weighted.num_bytes() == 6 * 2 * 4 * 8
    ticks = iter(range(1, 100))
    monkeypatch.setattr(loss, "SETS_BYTES", 1)
    monkeypatch.setattr(loss, "COPY_BYTES", 4096)
    monkeypatch.setattr(loss, "captured", replayed)
    monkeypatch.setattr(loss, "timed", lambda work, calls: {"median": float(next(ticks))})
    monkeypatch.setattr(loss, "extra_bytes", lambda work: 2**20)
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="eager", **how))
    monkeypatch.setattr(loss, "cases", lambda _: [loss.Case("plain", (2, 4, 8)), masked, weighted])
    found = loss.measure("cpu")
    # 4096 bytes read and written in the first tick and in the last.
    assert found["copy_gb_per_s"] == pytest.approx([8.192, 8.192 / 29], abs=0.05)
    assert [row["implementation"] for row in found["results"]] == ["fused", "torch.compile", "eager"] * 3
    for row in found["results"]:
        # Both round a float32 gradient to bfloat16, each with half an ulp.
        assert row["gradient_error_against_eager"] < 2**-8
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / max(found["copy_gb_per_s"]), abs=1e-4)
    fused = found["results"][0]
    assert fused["forward_and_backward_us"] == {"median": 4.0}
    assert fused["gb_per_s"] == pytest.approx(384 / 4 / 1e3, abs=0.05)
    assert found["results"][2]["fused_is_faster"] == 10 / 4


def test_an_output_that_is_never_written_shows() -> None:
    one = torch.ones(3)
    assert math.isnan(loss.largest_error([one, one * math.nan, one], [one, one, one]))
    assert loss.largest_error([2 * one, one], [one, one]) == 1.0
