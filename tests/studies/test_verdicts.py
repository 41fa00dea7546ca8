"""Differences, their noise and verdicts, against numbers worked out here in another way."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from studies.verdicts import Contrast, Entry, Row, alike, contrast, contrasts, pooled_variance

NUM_IMAGES = 400
LABELS = "".join(str(n % 10) for n in range(NUM_IMAGES))


def told(accuracy: float, seed: int) -> Entry:
    """Predictions that are right with this probability."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(NUM_IMAGES) >= accuracy
    text = "".join(str((int(right) + int(off)) % 10) for right, off in zip(LABELS, wrong, strict=True))
    return Entry(1 - float(wrong.mean()), text)


def row(name: str, accuracies: list[list[float]], first_seed: int, given: bool = False) -> Row:
    runs = [
        [told(accuracy, first_seed + 10 * r + f) for f, accuracy in enumerate(run)]
        for r, run in enumerate(accuracies)
    ]
    return Row(name, {"top1": runs}, given)


def test_a_difference_and_its_three_errors_by_hand() -> None:
    one = row("one", [[0.6, 0.62, 0.58], [0.61, 0.6, 0.63]], 0)
    other = row("other", [[0.5, 0.52, 0.55]], 100)
    found = contrast(one, other, "top1", LABELS, (0.0004, 3))

    def right(entry: Entry) -> list[int]:
        return [int(a == b) for a, b in zip(entry.predictions, LABELS, strict=True)]

    first, second = one.measures["top1"], other.measures["top1"]
    by_image = [
        statistics.fmean(right(e)[n] for run in first for e in run)
        - statistics.fmean(right(e)[n] for e in second[0])
        for n in range(NUM_IMAGES)
    ]
    by_seed = [(first[0][f].value + first[1][f].value) / 2 - second[0][f].value for f in range(3)]
    expected = {
        "test images": statistics.stdev(by_image) / math.sqrt(NUM_IMAGES),
        "fine-tuning seeds": statistics.stdev(by_seed) / math.sqrt(3),
        "runs": math.sqrt(0.0004 / 2 + 0.0004 / 1),
    }
    # The same sums in another order: float64.
    assert found.parts == pytest.approx(expected, rel=1e-9)
    assert found.error == pytest.approx(math.hypot(*expected.values()), rel=1e-9)
    assert found.difference == pytest.approx(statistics.fmean(by_image), rel=1e-9)
    variances = [part**2 for part in expected.values()]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 399 + variances[1] ** 2 / 2 + variances[2] ** 2 / 3)
    assert found.freedom == pytest.approx(freedom, rel=1e-9)


def test_a_given_network_has_no_luck_of_a_run() -> None:
    one, other = row("one", [[0.6]], 0), row("other", [[0.5]], 100, given=True)
    assert contrast(one, other, "top1", LABELS, (0.01, 3)).parts["runs"] == pytest.approx(0.1)
    both = contrast(row("one", [[0.6]], 0, given=True), other, "top1", LABELS, (0.01, 3))
    assert both.parts["runs"] == 0


def test_the_variance_of_runs_is_pooled_over_rows() -> None:
    rows = [
        Row("a", {"m": [[Entry(0.1)], [Entry(0.3)]]}),
        Row("b", {"m": [[Entry(0.5), Entry(0.7)], [Entry(0.6), Entry(0.6)], [Entry(0.9), Entry(0.9)]]}),
        Row("single", {"m": [[Entry(0.0)]]}),
        Row("given", {"m": [[Entry(0.0)], [Entry(1.0)]]}, given=True),
        Row("other measure", {"n": [[Entry(0.0)], [Entry(1.0)]]}),
    ]
    squares = 2 * 0.1**2 + 2 * 0.1**2 + 0.2**2
    assert pooled_variance(rows, "m") == (pytest.approx(squares / 3), 3)
    assert pooled_variance(rows[2:4], "m") == (0.0, 0)


@pytest.mark.parametrize(
    ("difference", "error", "verdict"),
    [
        (0.03, 0.01, "same direction"),
        (-0.03, 0.01, "opposite"),
        (0.02, 0.01, "unresolved"),
        (-0.01, 0.01, "unresolved"),
        (0.0, 0.0, "unresolved"),
    ],
)
def test_a_verdict_needs_two_standard_errors(difference: float, error: float, verdict: str) -> None:
    assert Contrast("a", "b", "m", difference, error, {}, 1000.0).verdict == verdict


@pytest.mark.parametrize(("freedom", "errors"), [(1.0, 12.706), (2.0, 4.303), (3.0, 3.182), (1e9, 2.0)])
def test_few_degrees_of_freedom_ask_for_more(freedom: float, errors: float) -> None:
    """Quantiles of Student's t from its printed table; never below two."""
    assert Contrast("a", "b", "m", 0.0, 0.01, {}, freedom).noise == pytest.approx(0.01 * errors, rel=1e-3)


def test_rows_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="one and other have 2 and 1 measurements a run by top1"):
        contrast(row("one", [[0.5, 0.5]], 0), row("other", [[0.5]], 9), "top1", LABELS, (0.0, 0))


def test_pairs_are_compared_by_every_measure_that_both_have() -> None:
    one = Row("one", {"a": [[Entry(0.5)]], "b": [[Entry(0.5)]]})
    other = Row("other", {"b": [[Entry(0.25)]], "c": [[Entry(0.5)]]})
    (found,) = contrasts([one, other], [("one", "other")], "")
    assert (found.measure, found.difference) == ("b", 0.25)


def test_equal_settings_are_unresolved_and_others_are_not() -> None:
    """The noise that is claimed is the noise that there is: over 60 worlds, two runs of one setting
    hardly ever differ by more, and a true difference of 20 points is found."""
    false_alarms = missed = 0
    for world in range(60):
        rng = np.random.default_rng(world)

        def runs(mean: float, seed: int, rng: np.random.Generator = rng) -> Row:
            luck = rng.normal(0, 0.02, size=2)
            values = [[mean + one + rng.normal(0, 0.01) for _ in range(3)] for one in luck]
            return row(str(mean), values, seed)

        rows = [runs(0.6, 1000 * world), runs(0.4, 1000 * world + 300), runs(0.5, 1000 * world + 600)]
        found = alike(rows, LABELS)
        assert len(found) == 3
        false_alarms += found[0].verdict != "unresolved"
        (gain,) = contrasts(rows, [("0.6", "0.4")], LABELS)
        missed += gain.verdict != "same direction"
    # 5 % of 60 are 3, and 8 or more come by chance in 1 of 100 such tests.
    assert false_alarms <= 7
    assert missed <= 3


def test_a_pair_does_not_excuse_itself() -> None:
    """The luck of a run comes from other rows: a pair as far apart as this one is resolved."""
    apart = Row("apart", {"m": [[Entry(0.2)], [Entry(0.8)]]})
    quiet = Row("quiet", {"m": [[Entry(0.50)], [Entry(0.51)]]})
    verdicts = {one.first: one.verdict for one in alike([apart, quiet], "")}
    assert verdicts == {"apart, seed 0": "opposite", "quiet, seed 0": "unresolved"}
