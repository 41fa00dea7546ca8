"""From counts to time, cost and advice: each by arithmetic done here again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.errors import PlanError
from fd_scale.plan import advice, foretell, gpus, tables
from fd_scale.plan.cluster import of_size
from fd_scale.plan.cost import Prices
from fd_scale.plan.ledger import Work
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.picture import draw_memory
from fd_scale.plan.step_time import Assumptions, communication_s, step_time
from fd_scale.run import recipes, scale
from fd_scale.run.recipe import derive

PERFECT = Assumptions(compute=1, memory=1, link=1, launch_us=0, latency_us=0)
SIZES = Sizes(student=10**9, teacher=10**9, largest=10**7, small={10**7: 10**9})
H200 = gpus.get("h200")
SLURM = Path(__file__).parents[2] / "slurm"


@pytest.fixture(scope="module")
def survey() -> foretell.Survey:
    return foretell.survey(
        derive(recipes.get("fd_clip_vitb16"), **{"student.architecture": "vit_tiny_patch16"})
    )


def layout(stage: int, world: int, **zero: Any) -> Layout:
    return Layout(
        world=world,
        zero_stage=stage,
        bf16=True,
        micro_batch=8,
        accumulation=2,
        recompute=False,
        zero={"stage": stage, "overlap_comm": False, **zero},
        accumulates_fp32=True,
        communicates_fp32=True,
    )


def test_an_operation_takes_the_longer_of_arithmetic_and_traffic() -> None:
    work = {Work("forward", 989_500_000_000, 0): 3, Work("forward", 1, 4_800_000_000): 5}
    trace = Trace(4, {}, 0, "", {}, {}, 0, work)
    found = step_time(layout(0, 1), SIZES, trace, of_size(1, H200), PERFECT)
    # 1 ms each; twice the traced micro-batch, accumulated twice.
    assert found.compute_s == pytest.approx(3e-3 * 2 * 2)
    assert found.traffic_s == pytest.approx(5e-3 * 2 * 2)
    assert found.optimizer_s == pytest.approx(28e9 / 4.8e12)
    assert found.exposed_s == found.launch_wait_s == 0
    slow = step_time(layout(0, 1), SIZES, trace, of_size(1, H200), replace(PERFECT, launch_us=1e4))
    assert slow.launch_wait_s == pytest.approx(2 * (8 * 1e-2 - 16e-3))


def test_traffic_between_gpus_by_stage() -> None:
    """Bytes per GPU over the links: gradients are 4 GB, weights 2 GB, (N - 1) / N of them 7 / 8."""
    node, link = of_size(8, H200), 450e9
    seconds = {stage: communication_s(layout(stage, 8), SIZES, node, PERFECT) for stage in range(4)}
    assert seconds[0] == pytest.approx(2 * 4e9 * 7 / 8 / link)
    assert seconds[1] == pytest.approx((2 * 4e9 + 2e9) * 7 / 8 / link)
    assert seconds[2] == pytest.approx((2 * 4e9 + 2e9) * 7 / 8 / link)
    # Half a billion weights stay from the way forward; the rest is gathered again. Twice, for two passes.
    assert seconds[3] == pytest.approx(2 * (4e9 + 2e9 + 1e9) * 7 / 8 / link)
    far = communication_s(layout(0, 64), SIZES, of_size(64, H200), PERFECT)
    assert far == pytest.approx(2 * 4e9 * 63 / 64 / 50e9)
    assert communication_s(layout(3, 1), SIZES, of_size(1, H200), PERFECT) == 0


def test_cost_is_arithmetic(survey: foretell.Survey) -> None:
    averaged = replace(survey, recipe=derive(survey.recipe, **{"optim.average_decay": 0.9999}))
    plan = foretell.foretell(averaged, of_size(8, H200), prices=Prices(gpu_hour=2.0, kwh=0.5))
    recipe, found = survey.recipe, plan.cost
    assert found.hours == pytest.approx(recipe.steps * plan.asked.time.total_s / 3600)
    assert found.gpu_hours == pytest.approx(8 * found.hours)
    assert found.energy_kwh == pytest.approx(found.gpu_hours * 0.7 * 1.3)
    assert (found.rent, found.energy_price) == (2 * found.gpu_hours, 0.5 * found.energy_kwh)
    assert found.checkpoint_bytes == 16 * survey.shapes.sizes.student
    assert found.images_per_s == pytest.approx(recipe.global_batch / plan.asked.time.total_s)


def test_the_largest_micro_batch_fits_and_one_more_does_not(survey: foretell.Survey) -> None:
    for name in ("a100-40", "rtx4090"):
        cluster, assumed = of_size(8, gpus.get(name)), Assumptions()
        plan = foretell.foretell(survey, cluster)
        size = plan.largest_micro_batch
        for more, holds in ((0, True), (1, False)):
            other = replace(plan.asked.layout, micro_batch=size + more)
            assert advice.fits(advice.judge(other, survey.shapes, cluster, assumed), cluster) is holds


def test_the_recommended_file_is_a_scale_that_runs(survey: foretell.Survey, tmp_path: Path) -> None:
    plan = foretell.foretell(survey, of_size(8, H200))
    assert plan.best is not None
    path = tmp_path / "advised.json"
    path.write_text(json.dumps(foretell.recommendation(plan, plan.best)["ds_config"]))
    resolved = scale.resolve(scale.load(str(path)), survey.recipe, 8)
    layout = plan.best.layout
    assert (resolved.micro_batch, resolved.zero_stage) == (layout.micro_batch, layout.zero_stage)
    assert resolved.activation_checkpointing == layout.recompute
    assert plan.best.images_per_step == survey.recipe.global_batch
    assert plan.best.time.total_s <= plan.asked.time.total_s * advice.NEAR


def test_a_recommended_file_keeps_the_loss_in_pieces(survey: foretell.Survey) -> None:
    asked = replace(survey, scale=replace(survey.scale, loss_chunk_tokens=64))
    plan = foretell.foretell(asked, of_size(8, H200))
    assert plan.best is not None
    assert foretell.recommendation(plan, plan.best)["ds_config"]["fd_scale"]["loss_chunk_tokens"] == 64
    said = dict(tables._summary(plan))
    assert said["loss in pieces"] == "is planned as if maps were whole: it takes less memory"


def test_numbers_of_gpus_side_by_side(survey: foretell.Survey) -> None:
    columns = foretell.compare(survey, [of_size(n, H200) for n in foretell.COMPARED])
    assert [column.cluster.num_gpus for column in columns] == [1, 8, 64, 512, 4096]
    assert "cannot be shared" in columns[-1].obstacle, "the global batch is 2048"
    assert all(set(column.by_stage) == {1, 2, 3} for column in columns[:-1])
    assert foretell.where_zero_3_stops(columns).startswith("ZeRO-3 pays nowhere here")
    assert json.loads(json.dumps(foretell.comparison_dict(columns)))["columns"][0]["num_gpus"] == 1
    assert tables.comparison(columns) is not None


def test_the_picture_is_drawn(survey: foretell.Survey, tmp_path: Path) -> None:
    draw_memory(foretell.foretell(survey, of_size(8, H200)), tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def printed(*words: str) -> str:
    return CliRunner().invoke(app, ["plan", *words], catch_exceptions=False).stdout


@pytest.mark.slow
def test_swinv2_g_is_planned_from_its_batch_script() -> None:
    shown = printed("--recipe", "fd_swinv2g", "--sbatch", str(SLURM / "fd_swinv2g.sbatch"))
    for words in (
        "fd_swinv2g on 8 x 8 h200",
        "3,012,989,664 parameters",
        "memory of one GPU, GiB",
        "GPU-hours",
    ):
        assert words in shown


def test_another_header_is_another_plan(tmp_path: Path) -> None:
    script = (SLURM / "fd_clip_vitb16.sbatch").read_text()
    path = tmp_path / "two.sbatch"
    path.write_text(script.replace("--nodes=1", "--nodes=2").replace("--time=24", "--time=1"))
    words = ["--recipe", "demo", "--set", "global_batch=256", "--json", "--sbatch"]
    one, two = (json.loads(printed(*words, str(p))) for p in (SLURM / "fd_clip_vitb16.sbatch", path))
    assert (one["cluster"]["num_gpus"], two["cluster"]["num_gpus"]) == (8, 16)
    assert (one["batch"]["accumulation"], two["batch"]["accumulation"]) == (2, 1)
    assert one["memory_gib"]["peak"] > two["memory_gib"]["peak"]
    assert (one["cluster"]["time_limit_s"], two["cluster"]["time_limit_s"]) == (86_400, 3600)


def test_wrong_words_are_the_users() -> None:
    with pytest.raises(PlanError, match="unknown GPU 'h20'; did you mean h200"):
        printed("--recipe", "demo", "--gpu", "h20")
    with pytest.raises(PlanError, match="give one of them"):
        printed("--recipe", "demo", "--gpus", "8", "--sbatch", str(SLURM / "fd_swinv2g.sbatch"))
    with pytest.raises(PlanError, match="--compare sets its own numbers"):
        printed("--recipe", "demo", "--gpus", "8", "--compare")
