"""The comparison of attention's forms, tiny: what is right is exact, and what refuses a case says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import attention, clock


def test_rows_of_a_small_layer() -> None:
    found = attention.measure(attention.TINY, "cpu", clock.SMOKE)["results"]
    assert [(row["bias"], row["form"]) for row in found] == [
        (bias, form)
        for bias in ("learnt", "fixed", "none")
        for form in ("chosen", "explicit", "scaled dot product")
    ]
    for row in found:
        assert row["error"] < 1e-6  # float32
        assert row["finite"]
    assert found[0]["form_chosen"] == "explicit"
    assert found[0]["why"].startswith("explicit attention: on a CPU")


def test_a_form_that_is_wrong_or_refuses_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *, scale: float) -> Tensor:
        return attention.explicit_attention(query, key, value, None, scale=scale)

    def refuses(*_: Tensor, scale: float) -> Tensor:
        raise RuntimeError("No available kernel. Aborting execution.\nand more")

    monkeypatch.setattr(attention, "forms", lambda *_: {"no bias": wrong, "none": refuses})
    case = attention.Case("tiny", 2, 2, 9, 8, "fixed")
    without, refused = attention.compare(case, "cpu", clock.SMOKE)
    assert without["error"] > 0.1
    assert refused["left_out"] == "No available kernel. Aborting execution."


def test_the_cases_are_the_token_counts_of_the_models() -> None:
    assert {case.num_tokens for case in attention.cases(1)} == {49, 64, 144, 192, 197, 256, 257}
    assert {case.bias for case in attention.cases(1)} == {"learnt", "fixed", "none"}


def test_the_command_looks_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(attention.record, "write", lambda *_: pytest.fail("a look must not replace a result"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert attention.main(["--smoke"]) == 0
    assert "scaled dot product" in capsys.readouterr().out
