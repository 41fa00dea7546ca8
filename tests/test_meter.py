"""Figures between two log lines: which steps changed nothing, and in how long a row."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fd_scale.engine.zero import StepOutcome
from fd_scale.meter import Meter, Row


def outcome(step: int, good: bool) -> StepOutcome:
    norm = torch.tensor(0.5 if good else math.nan)
    return StepOutcome(step=step, lr=0.25, grad_norm=norm, applied=torch.tensor(good))


def stepped(meter: Meter, applied: str, start: int = 0) -> None:
    """``+`` for a step that was applied, ``-`` for one that was skipped."""
    for step, sign in enumerate(applied, start):
        meter.add(torch.tensor(2.0))
        meter.end_step(outcome(step, sign == "+"))


@pytest.mark.parametrize(
    ("applied", "row", "skipped"),
    [
        ("", Row(0, -1), 0),
        ("+", Row(0, -1), 0),
        ("-", Row(1, 0), 1),
        ("++--", Row(2, 3), 2),
        ("--++", Row(2, 1), 2),
        ("-+---+--", Row(3, 4), 6),
        ("-+-", Row(1, 0), 2),
    ],
)
def test_the_longest_row_of_skipped_steps(applied: str, row: Row, skipped: int) -> None:
    meter = Meter(8)
    stepped(meter, applied)
    assert meter.settle() == row
    assert meter.skipped == skipped
    assert meter.settle() == Row()
    assert meter.skipped == skipped


def test_a_row_goes_on_across_readings_and_every_step_is_counted_once() -> None:
    meter, world = Meter(8), SimpleNamespace(mean=lambda loss: loss, device=torch.device("cpu"))
    stepped(meter, "+--")
    assert meter.settle() == Row(2, 2)
    stepped(meter, "--", start=3)
    assert meter.settle() == Row(4, 4)
    first = meter.read(world)
    assert (first["skipped_steps"], first["loss"], first["lr"]) == (4.0, 2.0, 0.25)
    assert math.isnan(first["grad_norm"])
    stepped(meter, "-+", start=5)
    second = meter.read(world)
    assert (second["skipped_steps"], second["grad_norm"]) == (1.0, 0.5)
