"""The plan as tables for a terminal, each figure with its unit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Group, RenderableType
from rich.table import Table

from fd_scale.plan.advice import Choice
from fd_scale.plan.foretell import Column, Plan, choice_memory, recommendation, where_zero_3_stops
from fd_scale.plan.memory import FRAGMENTATION, GIB, OUTSIDE_GIB

TEACHER_WORDS = {"replicate": "whole on every GPU", "shard": "sharded"}


def plan_tables(plan: Plan) -> RenderableType:
    """All of one plan."""
    recommended = "nothing fits: take more GPUs, GPUs with more memory, or offload the optimizer"
    if plan.best is not None:
        recommended = _recommended(plan)
    return Group(
        _pairs(f"{plan.survey.recipe.name} on {_machines(plan)}", _summary(plan)),
        memory_table(plan),
        _pairs("time of one optimizer step", _time(plan)),
        _pairs("the whole run", _run(plan)),
        _pairs("recommended", [("scale", recommended)]),
        _pairs("assumed (an estimate, not a promise)", _assumed(plan)),
    )


def memory_table(plan: Plan) -> Table:
    """Memory of one GPU by part, at both moments."""
    found = choice_memory(plan.asked)
    moments = found["moments"]
    table = _table("memory of one GPU, GiB")
    table.add_column("part")
    for name in moments:
        table.add_column(name, justify="right")
    for part in dict.fromkeys(part for parts in moments.values() for part in parts):
        table.add_row(part, *(f"{parts[part]:.2f}" if part in parts else "" for parts in moments.values()))
    table.add_section()
    table.add_row("sum", *(f"{sum(parts.values()):.2f}" for parts in moments.values()), style="bold")
    gpu = plan.cluster.gpu
    verdict = "fits" if plan.fits else "does NOT fit"
    table.caption = (
        f"{found['needed']:.1f} GiB needed with {FRAGMENTATION:.0%} for holes and {OUTSIDE_GIB:g} GiB "
        f"outside the allocator, {gpu.memory_gib:g} GiB there: {verdict}"
    )
    table.caption_justify = "left"
    return table


def comparison(columns: list[Column]) -> RenderableType:
    """Numbers of GPUs side by side."""
    gpu = columns[0].cluster.gpu
    table = _table(f"the fastest choice of each ZeRO stage, {gpu.name} of {gpu.memory_gib:g} GiB")
    headings = ("GPUs", "ZeRO", "batch", "recomp.", "teacher", "GiB", "images/s", "hours", "comm., s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    notes = ["* chosen. batch: images per pass x passes; comm.: per step, what nothing hides / all"]
    for column in columns:
        name = f"{column.cluster.num_gpus:,}"
        if column.obstacle:
            table.add_row(name, "-")
            notes.append(f"{name} GPUs: {column.obstacle}.")
        for stage, choice in column.by_stage.items():
            layout, time = choice.layout, choice.time
            table.add_row(
                name,
                f"{stage}{'*' if choice is column.best else ' '}",
                f"{layout.micro_batch} x {layout.accumulation}",
                "yes" if layout.recompute else "no",
                "shares" if layout.teacher == "shard" else "whole",
                f"{choice.memory.needed_bytes / GIB:.1f}",
                f"{choice.images_per_step / time.total_s:,.0f}",
                f"{column.hours(choice):,.1f}",
                f"{time.exposed_s:.2f} / {time.communication_s:.2f}",
            )
            name = ""
        table.add_section()
    return Group(table, *notes, where_zero_3_stops(columns))


def _machines(plan: Plan) -> str:
    cluster = plan.cluster
    return f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.gpu.name} ({cluster.source})"


def _summary(plan: Plan) -> Iterator[tuple[str, str]]:
    counted, layout = plan.survey, plan.asked.layout
    sizes = counted.shapes.sizes
    yield "student", f"{counted.recipe.student.architecture}, {sizes.student:,} parameters with its projector"
    yield (
        "teacher",
        f"{counted.recipe.teacher.architecture}, {sizes.teacher:,} parameters, "
        f"{TEACHER_WORDS[layout.teacher]}{_decided(plan.asked)}",
    )
    yield (
        "engine",
        f"ZeRO-{layout.zero_stage}, {'bf16' if layout.bf16 else 'fp32'}, recomputation "
        f"{'on' if layout.recompute else 'off'} (scale {counted.scale.name})",
    )
    shares = f"{layout.world} processes x {layout.micro_batch} images x {layout.accumulation} accumulated"
    yield "global batch", f"{counted.recipe.global_batch:,} = {shares}"
    if plan.asked.memory.host_bytes:
        yield "host memory", f"{plan.asked.memory.host_bytes / GIB:.1f} GiB per process, of what is offloaded"
    one_more = counted.shapes.courses[layout.recompute].bytes_per_image(layout.micro_batch)
    yield (
        "micro-batch",
        f"at most {plan.largest_micro_batch} images fit; each takes {one_more / 2**20:,.0f} MiB",
    )
    flops = counted.useful_flops_per_image
    done = sum(counted.flops_per_image.values())
    yield "arithmetic", f"{flops / 1e9:,.1f} GFLOP per image; {done / 1e9:,.1f} with what is recomputed"
    if counted.scale.compile:
        yield "compiled blocks", "are planned as if they were not: they take less memory and time"
    if counted.scale.loss_chunk_tokens is not None:
        yield "loss in pieces", "is planned as if maps were whole: it takes less memory"
    if not plan.cluster.gpu.has_bf16 and layout.bf16:
        yield "bf16", f"{plan.cluster.gpu.name} has no bf16: it is computed as float32"


def _decided(choice: Choice) -> str:
    return "" if choice.decision is None else f" (auto: {choice.decision.why})"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    time, counted = plan.asked.time, plan.survey
    yield "arithmetic", f"{time.compute_s:.3f} s"
    yield "memory traffic", f"{time.traffic_s:.3f} s"
    yield "waiting for launches", f"{time.launch_wait_s:.3f} s"
    yield "optimizer", f"{time.optimizer_s:.3f} s"
    yield (
        "communication",
        f"{time.exposed_s:.3f} s, of {time.communication_s:.3f} s the part that nothing hides",
    )
    yield "all", f"{time.total_s:.3f} s"
    peak = plan.cluster.gpu.bf16_tflops * 1e12 * plan.cluster.num_gpus
    reached = plan.cost.images_per_s * counted.useful_flops_per_image / peak
    yield "images", f"{plan.cost.images_per_s:,.0f} per s, {reached:.0%} of the data sheet's peak (MFU)"


def _run(plan: Plan) -> Iterator[tuple[str, str]]:
    found, recipe, cluster = plan.cost, plan.survey.recipe, plan.cluster
    yield "images to see", f"{recipe.schedule.images:,} in {recipe.steps:,} optimizer steps"
    starts = "" if found.num_starts is None else f", {found.num_starts:,} starts of the time limit"
    yield "time", f"{found.hours:,.1f} h{starts}"
    yield "GPU-hours", f"{found.gpu_hours:,.0f}"
    yield "energy", f"{found.energy_kwh:,.0f} kWh"
    money = [f"{found.rent:,.0f} for GPUs"] if found.rent is not None else []
    money += [f"{found.energy_price:,.0f} for energy"] if found.energy_price is not None else []
    yield "money", ", ".join(money) or "give --price-gpu-hour or --price-kwh"
    there = "" if cluster.cores_per_gpu is None else f", {cluster.cores_per_gpu} are there"
    short = cluster.cores_per_gpu is not None and found.decode_cores_per_gpu > cluster.cores_per_gpu
    yield "decoding", f"{found.decode_cores_per_gpu:.1f} cores per GPU{there}{': TOO FEW' if short else ''}"
    yield "a checkpoint", f"{found.checkpoint_bytes / GIB:.1f} GiB, {found.checkpoint_s:.0f} s to write"
    shards = plan.survey.num_shards
    if shards is None:
        yield "shards", "data.shards is not set (--set data.shards=FOLDER)"
    else:
        yield "shards", f"{shards:,}, {shards / cluster.num_gpus:.1f} per process"


def _recommended(plan: Plan) -> str:
    assert plan.best is not None  # the caller looked
    found = recommendation(plan, plan.best)
    layout = plan.best.layout
    return (
        f"ZeRO-{layout.zero_stage}, micro-batch {layout.micro_batch}, recomputation "
        f"{'on' if layout.recompute else 'off'}: {found['images_per_s']:,.0f} images/s, "
        f"{found['needed_gib']:.1f} GiB. Why: {found['why']}. `--json` prints the file"
    )


def _assumed(plan: Plan) -> Iterator[tuple[str, str]]:
    assumed, prices = plan.assumed, plan.prices
    yield (
        "reached of the peaks",
        f"{assumed.compute:.0%} of arithmetic, {assumed.memory:.0%} of memory, {assumed.link:.0%} of links "
        f"({plan.cluster.slowest_link_gb_s:g} GB/s the slowest)",
    )
    yield (
        "each operation",
        f"{assumed.launch_us:g} us to launch; a collective {assumed.latency_us:g} us or more",
    )
    yield "energy", f"GPUs at their limit, x {prices.overhead:g} for hosts and cooling"
    yield "checkpoints", f"{prices.disk_gb_s:g} GB/s to the disk, all processes together"
    yield "decoding", f"{prices.decode_images_per_core_s:g} images/s per core"


def _pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = _table(title)
    table.show_header = False
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, text)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold not italic", box=None, pad_edge=False)
