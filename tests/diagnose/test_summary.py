"""Verdicts of the page's headline numbers: they say no more than the shown digits do."""

from __future__ import annotations

import pytest

from fd_scale.diagnose.report import _number
from fd_scale.diagnose.summary import Headline


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.5, 0.25, "fell, as in the papers"),
        (0.5, 0.75, "rose, against the papers"),
        (0.5, 0.505, "hardly changed (in the papers it falls)"),
        # Both are shown as 0.0000, whatever their ratio.
        (7.6e-6, -2.7e-6, "hardly changed (in the papers it falls)"),
        (1e-4, 2e-4, "rose, against the papers"),
        (None, 0.5, ""),
        (float("nan"), 0.5, ""),
    ],
)
def test_a_verdict_is_of_what_is_shown(before: float | None, after: float, said: str) -> None:
    assert Headline("rise", "", before, after, "down", "", digits=4).verdict == said


def test_a_zero_has_no_sign() -> None:
    assert _number(-2.7e-6, 4) == "0.0000"
    assert _number(-0.26, 1) == "-0.3"
