"""The benchmark of diagnostics, small: every image is surveyed once, and its rows hold together."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import diagnose
from tests.diagnose.tiny import own_subject


def test_as_many_images_as_were_asked_for() -> None:
    subject = own_subject("vit_micro_patch8")
    sizes = [len(batch) for batch in diagnose.batches(subject, 19)]
    assert sizes == [8, 8, 3]
    assert next(diagnose.batches(subject, 1)).dtype == torch.uint8


def test_rows_of_a_small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.cycle([(2.0, 1.5), (5.0, 4.0)])

    def clocked(work: object, _: object) -> tuple[float, float]:
        assert callable(work)
        work()
        return next(seconds)

    monkeypatch.setattr(diagnose, "_seconds", clocked)
    results = diagnose.measure("test_vit", 9)
    expected = {"forward_s": 2.0, "survey_s": 5.0, "survey_processor_s": 4.0, "survey_images_per_s": 1.8}
    assert expected.items() <= results["results"][-1].items()
    assert (results["network"], results["num_images"]) == ("test_vit", 9)
