"""Where the teacher lies when its scale leaves that to the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fd_scale.errors import RunError
from fd_scale.plan import placement
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import GIB, memory
from fd_scale.plan.placement import decide
from fd_scale.run import recipes, scale
from fd_scale.run.folder import RunFolder
from fd_scale.run.recipe import Recipe, derive
from fd_scale.run.world import World
from tests.spawn import spawn

SIZES = Sizes(student=10**9, teacher=3 * 10**9, largest=10**7, small={10**7: 10**9})
TRACE = Trace(4, {}, 10**9, "backward", {"loss": 10**9}, {"teacher": 10**8}, 0, {})
LAYOUT = Layout(
    world=8,
    zero_stage=3,
    bf16=True,
    micro_batch=4,
    accumulation=1,
    recompute=False,
    zero={"stage": 3, "reduce_bucket_size": 1000},
    accumulates_fp32=True,
    communicates_fp32=True,
    teacher="auto",
)


def needed_gib(teacher: Any, world: int = 8) -> float:
    layout = replace(LAYOUT, teacher=teacher, world=world)
    return memory(layout, SIZES, TRACE, "cuda").needed_bytes / GIB


def test_it_is_whole_where_that_fits_and_in_shares_where_not() -> None:
    whole, shared = needed_gib("replicate"), needed_gib("shard")
    assert shared < whole
    assert decide(LAYOUT, SIZES, TRACE, whole * 1.001, "cuda").teacher == "replicate"
    tight = decide(LAYOUT, SIZES, TRACE, whole * 0.999, "cuda")
    assert tight.teacher == "shard"
    assert f"{whole:.1f} GiB" in tight.why
    assert "not fit" not in tight.why
    hopeless = decide(LAYOUT, SIZES, TRACE, shared * 0.999, "cuda")
    assert (hopeless.teacher, hopeless.why.endswith("which does not fit either")) == ("shard", True)


def test_one_process_holds_it_whole() -> None:
    assert decide(replace(LAYOUT, world=1), SIZES, TRACE, 0.1, "cuda").teacher == "replicate"


def test_on_a_cpu_what_is_offloaded_counts_too() -> None:
    away = replace(LAYOUT, zero={**LAYOUT.zero, "offload_optimizer": {"device": "cpu"}})
    found = memory(replace(away, teacher="replicate"), SIZES, TRACE, "cpu")
    between = (found.needed_bytes + found.host_bytes / 2) / GIB
    assert decide(away, SIZES, TRACE, between, "cpu").teacher == "shard"
    assert decide(away, SIZES, TRACE, between, "cuda").teacher == "replicate"


def test_nothing_is_counted_before_it_is_decided() -> None:
    with pytest.raises(ValueError, match="not decided yet"):
        memory(LAYOUT, SIZES, TRACE, "cuda")


def settled(world: World, folder: str, host_gib: list[float]) -> list[tuple[str, str | None, bool]]:
    """For each size of the host in turn: the placement, the record's reason, and whether it was counted."""
    path = Path(folder) / f"scale-{world.rank}.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 8, "fd_scale": {"teacher": "auto"}}))
    asked = recipe(folder)
    resolved = scale.resolve(scale.load(str(path)), asked, world.size)
    run = world.on_main(lambda: RunFolder.open(asked.run.root, asked))
    count, found = placement._counted, []
    for size in host_gib:
        counted: list[bool] = []

        def counting(*arguments: Any, counted: list[bool] = counted) -> placement.Decision:
            counted.append(True)
            return count(*arguments)

        placement._counted = counting  # this process is the test's own
        placement.psutil = SimpleNamespace(  # type: ignore[assignment]
            virtual_memory=lambda size=size: SimpleNamespace(total=size * GIB)
        )
        now, settlement = placement.settle(asked, resolved, world)
        assert settlement is not None
        assert now.own["teacher"] == settlement.decision.teacher
        world.on_main(lambda settlement=settlement: settlement.record(run))
        found.append((now.teacher, json.loads(run.placement.read_text())["why"], bool(counted)))
    return found


def recipe(folder: str) -> Recipe:
    return derive(
        recipes.get("demo"), **{"teacher.weights": "random", "run.root": folder, "global_batch": 16}
    )


def test_a_run_decides_once_for_all_processes_and_records_it(tmp_path: Path) -> None:
    """Two processes share a host of 64 GiB, and then one of 3 GiB, of which 1.5 are taken by assumption."""
    main, other = spawn(settled, 2, str(tmp_path), [64, 64, 3, 3, 64])
    assert [teacher for teacher, _, _ in main] == ["replicate", "replicate", "shard", "shard", "replicate"]
    assert [teacher for teacher, _, _ in other] == [teacher for teacher, _, _ in main]
    assert [counted for _, _, counted in main] == [True, False, True, False, True], (
        "kept where nothing changed"
    )
    assert not any(counted for _, _, counted in other)
    assert "GiB of 32.0" in str(main[0][1])
    assert "GiB of 1.5" in str(main[2][1])


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert placement.recorded(folder, {}) is None
    for content in ("{", "{}", '{"decided_from": {}}', "[]"):
        folder.placement.write_text(content)
        with pytest.raises(RunError, match=r"placement\.json is damaged .*: remove it"):
            placement.recorded(folder, {})


def test_a_scale_that_says_it_itself_is_left_alone(tmp_path: Path) -> None:
    asked = recipe(str(tmp_path))
    resolved = scale.resolve(scale.load("cpu"), asked, 1)
    world: Any = None  # nothing is asked of the others
    assert placement.settle(asked, resolved, world) == (resolved, None)
