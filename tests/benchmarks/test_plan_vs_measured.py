"""The comparison of plan and run, whole, at a size that a CPU runs in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan_vs_measured
from benchmarks.plan_cases import CPU_CASES, GPU_CASES, Case


def test_a_case_on_the_cpu() -> None:
    tiny = Case("tiny", "demo", {"student.drop_path": 0.0}, 32, {"stage": 0}, bf16=False)
    broken = Case("broken", "demo", {"student.architecture": "vit_nano"}, 32, {"stage": 0}, bf16=False)
    results = dict(plan_vs_measured._in_processes([tiny, broken], 3, 120))
    found = results["tiny"]
    assert "failed" not in found
    assert found["measured_over_planned"] == pytest.approx(1, abs=plan_vs_measured.SLACK)
    assert sum(found["planned_gib"].values()) == pytest.approx(found["planned_peak_gib"], abs=1e-3)
    assert "unknown model 'vit_nano'" in results["broken"]["failed"]


@pytest.mark.parametrize("case", GPU_CASES + CPU_CASES, ids=lambda case: case.name)
def test_the_cases_are_runs(case: Case, tmp_path: Path) -> None:
    """What one call on a GPU would spend its time on is at least a recipe and a scale that fit."""
    recipe, resolved = case.build(tmp_path, case.world)
    assert resolved.accumulation == case.accumulation
    assert resolved.micro_batch == case.micro_batch
    assert recipe.teacher.weights == "random"
