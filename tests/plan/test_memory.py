"""Planned against measured memory: real runs of the engine on the CPU, whose allocator the profiler reads.

The allocator's own record also has what operations and DeepSpeed allocate inside; the plan is counted without
storage. The two share no code below the recipe.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plan_cases import CPU_CASES, Case
from benchmarks.plan_vs_measured import SLACK, measured, planned, planned_bytes
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import GIB, memory
from fd_scale.run import recipes, scale
from fd_scale.run.world import World
from tests.spawn import spawn

VIT: dict[str, Any] = {
    "student.architecture": "vit_tiny_patch16",
    "student.input_size": 96,
    "student.drop_path": 0.0,
    "student.arguments": {"depth": 4},
    "teacher.architecture": "vit_tiny_patch16_224",
    "teacher.input_size": 96,
    "teacher.arguments": {"depth": 2},
}
SWIN: dict[str, Any] = {
    "student.architecture": "swinv2_tiny",
    "student.input_size": 64,
    "student.drop_path": 0.0,
    "teacher": {"library": "models", "architecture": "swinv2_tiny", "weights": "random", "input_size": 64},
}


def case(name: str, stage: int, recompute: bool, micro_batch: int) -> Case:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1_000_000}
    if stage == 3:
        zero |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
    return Case(
        f"{name}-zero{stage}{'-recompute' * recompute}",
        "fd_clip_vitb16" if name == "vit" else "fd_swinv2g",
        VIT if name == "vit" else SWIN,
        micro_batch,
        zero,
        bf16=False,
        recompute=recompute,
    )


CASES = [
    case(name, stage, recompute, 16 if name == "vit" else 8)
    for name in ("vit", "swin")
    for stage in (0, 3)
    for recompute in (False, True)
]


ATTEMPTS = 3
"""A thread of gloo lets go of a gathered piece when it gets a core: on a busy machine that adds to a peak
(5.7 % was seen once), and it never takes from it."""


def peaks(world: World, cases: list[Case], folder: str, num_steps: int) -> dict[str, int]:
    return {one.name: min(measured(world, one, folder, num_steps)["peak_bytes"]) for one in cases}


def ratios_to_plan(cases: dict[str, Case], folder: Path, *, world: int, num_steps: int) -> dict[str, float]:
    """The fullest process of each case over its plan, the least of up to ``ATTEMPTS``."""
    expected = {
        name: planned_bytes(planned(one, folder, world=world, device="cpu"), "cpu")
        for name, one in cases.items()
    }
    ratios = dict.fromkeys(cases, math.inf)
    for _ in range(ATTEMPTS):
        again = [cases[name] for name, ratio in ratios.items() if ratio > 1 + SLACK]
        ranks = spawn(peaks, world, again, str(folder), num_steps) if again else []
        for one in again:
            found = max(rank[one.name] for rank in ranks) / expected[one.name]
            ratios[one.name] = min(ratios[one.name], found)
    return ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_run_takes_what_was_planned(name: str, tmp_path: Path) -> None:
    """Within 5 %."""
    cases = {one.name: one for one in CASES if one.name.startswith(name)}
    ratios = ratios_to_plan(cases, tmp_path, world=1, num_steps=2)
    assert all(abs(ratio - 1) < SLACK for ratio in ratios.values()), ratios


TWO = {
    one.name: one
    for one in CPU_CASES
    if one.name in ("vit_zero2_offloaded_x2", "vit_zero3_teacher_in_shares_x2")
}


@pytest.mark.slow
def test_two_processes_take_what_was_planned(tmp_path: Path) -> None:
    """Within 5 %: the optimizer on the host, and a teacher in shares. Worst seen: 2.9 % (the latter)."""
    ratios = ratios_to_plan(TWO, tmp_path, world=2, num_steps=3)
    assert all(abs(ratio - 1) < SLACK for ratio in ratios.values()), ratios


def trace(**changes: Any) -> Trace:
    return replace(Trace(4, {}, 800, "backward", {"loss": 800}, {"teacher": 700}, 0, {}), **changes)


def layout(name: str, world: int, **changes: Any) -> Layout:
    recipe = recipes.get("fd_swinv2g")
    found = Layout.of(scale.resolve(scale.load(name), recipe, world), world)
    return replace(found, **{"teacher": "replicate", **changes})


SIZES = Sizes(student=3_000_000, teacher=5_000_000, largest=1_000_000, small={1_000_000: 3_000_000})


def test_static_parts_are_those_of_zero() -> None:
    """Bytes per parameter that were read off DeepSpeed's own buffers, at two processes (stages 0 to 3)."""
    expected = {
        # stage, bf16: weights, master, moments, accumulated gradients that stay (stage 2: of this pass)
        (0, False): (4, 0, 8, 0),
        (0, True): (2, 4, 8, 0),
        (1, False): (4, 2, 4, 0),
        (1, True): (2, 2, 4, 4),
        (2, False): (4, 2, 4, 2),
        (2, True): (2, 2, 4, 1),
        (3, False): (2, 2, 4, 2),
        (3, True): (1, 2, 4, 2),
    }
    for (stage, bf16), per_parameter in expected.items():
        asked = Layout(
            world=2,
            zero_stage=stage,
            bf16=bf16,
            micro_batch=4,
            accumulation=1,
            recompute=False,
            zero={"stage": stage, "reduce_bucket_size": 10},
            accumulates_fp32=True,
            communicates_fp32=True,
            immediate=True,
        )
        parts = memory(asked, SIZES, trace(), "cuda").moments[0].parts
        found = tuple(
            parts[name] / SIZES.student for name in ("weights", "master weights", "Adam moments", "gradients")
        )
        assert found == per_parameter, (stage, bf16)


def test_more_processes_take_less_and_an_average_takes_its_share() -> None:
    few, many = (memory(layout("swinv2g_1node", n), SIZES, trace(), "cuda").peak_bytes for n in (2, 8))
    assert few > many
    plain = memory(layout("swinv2g_1node", 8), SIZES, trace(), "cuda")
    averaged = memory(layout("swinv2g_1node", 8, ema=True), SIZES, trace(), "cuda")
    assert averaged.peak_bytes - plain.peak_bytes == 4 * SIZES.student // 8


def test_two_level_shards_keep_what_was_let_go_of() -> None:
    """Nothing of a model that stays gathered in the one pass of a step; all of it from the second pass on."""
    asked = replace(layout("swinv2g", 16), accumulation=1)
    few = {**asked.zero, "stage3_max_live_parameters": 1_000_000, "stage3_max_reuse_distance": 0}
    few |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 10}
    copies = [
        dict(memory(replace(asked, **changes), SIZES, trace(), "cuda").moments[0].parts).get("hpZ copy", 0)
        for changes in ({}, {"accumulation": 2}, {"zero": few})
    ]
    assert copies == [0, 2 * SIZES.student // 8, 2 * (SIZES.student - 1_000_000) // 8]


def test_what_stages_1_and_2_keep_on_the_host() -> None:
    """Bytes per parameter as DeepSpeed 0.19.8 allocates them: master weights, moments, float32 gradients, and
    the copy by which new weights return; more gradients where passes are accumulated."""
    for stage, accumulation, expected in (
        (1, 1, 4 + 8 + 4 + 2),
        (2, 1, 4 + 8 + 4 + 2),
        (2, 2, 4 + 8 + 4 + 2 + 2),
    ):
        asked = replace(
            layout("swinv2g_1node", 2),
            zero_stage=stage,
            accumulation=accumulation,
            zero={"stage": stage, "offload_optimizer": {"device": "cpu"}},
        )
        found = memory(asked, SIZES, trace(), "cuda")
        assert found.host_bytes - 2 * SIZES.largest == expected * SIZES.student // 2
        assert not {"Adam moments", "master weights", "gradients"} & found.moments[-1].parts.keys()


def test_a_sharded_teacher_and_an_offloaded_optimizer() -> None:
    asked = layout("swinv2g_1node", 8)
    whole = memory(asked, SIZES, trace(), "cuda")
    shared = memory(replace(asked, teacher="shard"), SIZES, trace(), "cuda")
    assert whole.moments[0].parts["teacher"] == 2 * SIZES.teacher
    assert shared.moments[0].parts["teacher"] == 2 * SIZES.teacher // 8
    # Gathered only while it runs: by 50 million elements ahead, here the whole.
    taught = {moment.name: moment.parts for moment in shared.moments}["teacher's pass"]
    assert taught["teacher's gather"] == 2 * SIZES.teacher
    # On a CPU gloo holds its own copy of it.
    on_cpu = memory(replace(asked, teacher="shard"), SIZES, trace(), "cpu")
    assert on_cpu.moments[1].parts["teacher's gather"] == 2 * 2 * SIZES.teacher
    assert taught["teacher's activations"] == 700
    assert not any("gather" in name for name in shared.moments[0].parts if name != "gathered weights")
    away = replace(asked, zero={**asked.zero, "offload_optimizer": {"device": "cpu"}})
    offloaded = memory(away, SIZES, trace(), "cuda")
    assert whole.host_bytes == 0
    # Master weights, moments, accumulated gradients, and those that the optimizer is given.
    assert offloaded.host_bytes == (4 + 8 + 4 + 4) * SIZES.student // 8
    assert "Adam moments" not in offloaded.moments[0].parts
    averaged = memory(replace(away, ema=True), SIZES, trace(), "cuda")
    assert averaged.host_bytes - offloaded.host_bytes == 4 * SIZES.student // 8
    assert offloaded.needed_bytes > 1.5 * GIB
