"""The comparison of plan and run, whole, at a size that a CPU runs in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan_vs_measured


def test_a_case_on_the_cpu() -> None:
    tiny = plan_vs_measured.Case("tiny", "demo", {"student.drop_path": 0.0}, 32, {"stage": 0}, bf16=False)
    found = plan_vs_measured._in_a_process(tiny, 3)
    assert "failed" not in found
    assert found["measured_over_planned"] == pytest.approx(1, abs=plan_vs_measured.SLACK)
    assert sum(found["planned_gib"].values()) == pytest.approx(found["planned_peak_gib"], abs=1e-3)
    assert found["images_per_s"] == pytest.approx(32 / found["step_s"]["median"], rel=0.01)


@pytest.mark.parametrize("case", plan_vs_measured.CASES, ids=lambda case: case.name)
def test_the_cases_of_a_gpu_are_runs(case: plan_vs_measured.Case, tmp_path: Path) -> None:
    """What one call on a GPU would spend its time on is at least a recipe and a scale that fit."""
    recipe, resolved = case.build(tmp_path, 1)
    assert resolved.accumulation == 1
    assert resolved.micro_batch == case.micro_batch
    assert recipe.teacher.weights == "random"
