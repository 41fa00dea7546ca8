"""From counts to time, cost and advice: each by arithmetic done here again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fd_scale.cli import app
from fd_scale.errors import PlanError
from fd_scale.plan import advice, foretell, gpus, tables
from fd_scale.plan.cluster import of_size
from fd_scale.plan.cost import Prices
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.ledger import Work
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
    assert columns[-1].obstacle == (
        "a global batch of 2,048 cannot be dealt out to so many processes, but to at most 1,024"
    )
    assert all(set(column.by_stage) == {1, 2, 3} for column in columns[:-1])
    assert foretell.where_zero_3_stops(columns).startswith("ZeRO-3 pays nowhere here")


def large(survey: foretell.Survey) -> foretell.Survey:
    """The same with as many parameters as SwinV2-G."""
    sizes = Sizes(3 * 10**9, 3 * 10**9, 10**8, {10**8: 3 * 10**9}, 10**8, 0)
    asked = replace(survey.scale, teacher="auto")
    return replace(survey, scale=asked, shapes=replace(survey.shapes, sizes=sizes))


def test_where_zero_3_pays(survey: foretell.Survey) -> None:
    """In 13 GiB nothing but ZeRO-3 holds a step of 8 GPUs; in 79 GiB all stages do, and are as fast."""
    small, roomy = replace(H200, memory_gib=13.0), gpus.get("h100")
    columns = foretell.compare(large(survey), [of_size(n, small) for n in (1, 8)])
    assert columns[0].obstacle == "not one image per process fits in 13 GiB, whatever the ZeRO stage"
    assert [set(column.by_stage) for column in columns] == [set(), {3}]
    assert columns[1].by_stage[3].layout.teacher == "shard"
    assert foretell.where_zero_3_stops(columns) == (
        "ZeRO-3 pays on all numbers of GPUs up to 8, the last one that runs (it alone fits)."
    )
    columns = foretell.compare(large(survey), [of_size(8, small), of_size(64, roomy)])
    assert foretell.where_zero_3_stops(columns) == (
        "ZeRO-3 pays up to 8 GPUs (it alone fits); from 64 on a lower stage is as fast or faster."
    )


def shown(renderable: Any) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_comparison_says_what_its_json_says(survey: foretell.Survey) -> None:
    columns = foretell.compare(large(survey), [of_size(n, gpus.get("h100")) for n in foretell.COMPARED])
    found = json.loads(json.dumps(foretell.comparison_dict(columns)))
    text = shown(tables.comparison(columns))
    rows = iter(line.split() for line in text.splitlines()[2:] if line.strip())
    for column in found["columns"]:
        name = [f"{column['num_gpus']:,}"]
        if not column["by_stage"]:
            assert next(rows) == [*name, "-"]
            assert f"{name[0]} GPUs: {column['obstacle']}." in " ".join(text.split())
        for stage, choice in column["by_stage"].items():
            assert next(rows) == [
                *name,
                stage + "*" * (int(stage) == column["chosen_stage"]),
                str(choice["micro_batch"]),
                "x",
                str(choice["accumulation"]),
                "yes" if choice["recompute"] else "no",
                {"replicate": "whole", "shard": "shares"}[choice["teacher"]],
                f"{choice['needed_gib']:.1f}",
                f"{choice['images_per_s']:,.0f}",
                f"{choice['hours']:,.1f}",
                f"{choice['exposed_s']:.2f}",
                "/",
                f"{choice['communication_s']:.2f}",
            ]
            name = []
    assert found["zero_3"] in " ".join(text.split())


def test_the_tables_say_what_the_json_says(survey: foretell.Survey) -> None:
    plan = foretell.foretell(large(survey), of_size(8, H200), prices=Prices(gpu_hour=2.0, kwh=0.5))
    found = json.loads(json.dumps(foretell.as_dict(plan)))
    text = " ".join(shown(tables.plan_tables(plan)).split())
    for moment in found["memory_gib"]["moments"].values():
        assert f"{sum(moment.values()):.2f}" in text
        assert all(name in text and f"{size:.2f}" in text for name, size in moment.items())
    run, step, batch = found["run"], found["step_s"], found["batch"]
    for words in (
        f"student vit_tiny_patch16, {found['parameters']['student']:,} parameters",
        f"{found['memory_gib']['needed']:.1f} GiB needed",
        f"at most {batch['largest_micro_that_fits']} images fit",
        f"8 processes x {batch['micro']} images x {batch['accumulation']} accumulated",
        f"whole on every GPU (auto: {found['teacher']['why']})",
        f"{found['useful_flops_per_image'] / 1e9:,.1f} GFLOP per image",
        f"all {step['total_s']:.3f} s",
        f"{run['images_per_s']:,.0f} per s",
        f"time {run['hours']:,.1f} h",
        f"GPU-hours {run['gpu_hours']:,.0f}",
        f"energy {run['energy_kwh']:,.0f} kWh",
        f"{run['rent']:,.0f} for GPUs, {run['energy_price']:,.0f} for energy",
        f"a checkpoint {run['checkpoint_bytes'] / 2**30:.1f} GiB, {run['checkpoint_s']:.0f} s to write",
        f"{found['recommended']['images_per_s']:,.0f} images/s, {found['recommended']['needed_gib']:.1f} GiB",
    ):
        assert words in text, words


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
