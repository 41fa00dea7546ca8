"""The loss benchmark, whole, at sizes that a CPU runs in seconds."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import clock, loss, record


@pytest.fixture(autouse=True)
def _nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a look must not replace a result")

    monkeypatch.setattr(record, "write", refuse)


def test_bytes_that_must_move() -> None:
    masked = loss.Case("masked", (2, 4, 8), mask_N=torch.tensor([True, False, False, True]))
    assert masked.num_bytes(torch.bfloat16) == 2 * 2 * 8 * (2 * 2 + 4)
    assert loss.Case("plain", (2, 4, 8)).num_bytes(torch.float32) == 12 * 2 * 4 * 8


def test_rows_of_small_cases() -> None:
    found = loss.measure("cpu", clock.SMOKE, loss.tiny_cases("cpu"), 1)
    rows = found["results"]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (case, name) for case in ("plain", "weighted", "masked") for name in ("fused", "public", "eager")
    ]
    for row in rows:
        # float32 on both sides: two orders of a few sums.
        assert row["gradient_error_against_eager"] < 1e-6
        us = row["forward_and_backward_us"]["median"]
        # 64 elements of 12 bytes; of the masked ones, half are only written
        assert row["gb_per_s"] == pytest.approx(
            (512 if row["case"] == "masked" else 768) / us / 1e3, abs=1e-3
        )
        assert row["share_of_copy"] == pytest.approx(
            row["gb_per_s"] / max(found["copy_gb_per_s"]), rel=0.1, abs=1e-4
        )
    assert rows[0]["fused_is_faster"] == 1


def test_the_command_looks_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--smoke"], "weighted"), (["--smoke", "--chunked"], "tiny, 2 heads")):
        assert loss.main(arguments) == 0
        assert said in capsys.readouterr().out


def test_pieces_against_whole_maps() -> None:
    heads = loss.Heads("small", (4, 16, 64), (96, 96), (16,))
    whole, pieces = loss.compare_heads(heads, "cpu", clock.SMOKE)
    assert (whole["chunk_tokens"], pieces["chunk_tokens"]) == (None, 16)
    assert whole["memory_over_whole"] == whole["time_over_whole"] == 1
    assert pieces["memory_over_whole"] < 1
    assert pieces["gradient_difference"] < 1e-6


def test_an_output_that_is_never_written_shows() -> None:
    one = torch.ones(3)
    assert math.isnan(loss.largest_error([one, one * math.nan, one], [one, one, one]))
    assert loss.largest_error([2 * one, one], [one, one]) == 1.0
