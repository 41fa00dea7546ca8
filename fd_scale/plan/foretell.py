"""One plan: a recipe on a cluster, with everything that follows. What the tables and ``--json`` show.

``survey`` counts a recipe once (seconds); ``foretell`` then answers for any cluster (milliseconds).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fd_scale.data.sets import open_shards
from fd_scale.plan import advice
from fd_scale.plan.advice import Choice, Shapes
from fd_scale.plan.cluster import Cluster
from fd_scale.plan.cost import Cost, Prices, cost
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import FRAGMENTATION, GIB, OUTSIDE_GIB
from fd_scale.plan.step_time import Assumptions
from fd_scale.plan.trace import BACKWARD, FORWARD, LOSS, TEACHER, Networks
from fd_scale.run import scale
from fd_scale.run.recipe import Recipe, streams_of
from fd_scale.run.scale import Scale

COMPARED = (1, 8, 64, 512, 4096)
"""Numbers of GPUs that ``--compare`` sets side by side."""


@dataclass(frozen=True)
class Survey:
    """A recipe, counted."""

    recipe: Recipe
    scale: Scale
    shapes: Shapes
    flops_per_image: Mapping[str, float]
    """By phase, as the scale has it; a multiply-add is two."""
    num_shards: int | None

    @property
    def useful_flops_per_image(self) -> float:
        """Teacher, student and its backward pass, without what is recomputed."""
        return self.flops_per_image[TEACHER] + 3 * self.flops_per_image[FORWARD]


@dataclass(frozen=True)
class Plan:
    """A recipe on a cluster."""

    survey: Survey
    cluster: Cluster
    assumed: Assumptions
    prices: Prices
    asked: Choice
    """As the scale has it."""
    fits: bool
    largest_micro_batch: int
    """The most images per process that fit, the rest as the scale has it."""
    cost: Cost
    best: Choice | None
    """What the planner would choose; None where nothing fits."""


def survey(recipe: Recipe) -> Survey:
    """Trace the recipe's networks, with and without recomputation."""
    wanted = scale.load(recipe.scale)
    micro_batch = int(wanted.deepspeed[scale.MICRO_BATCH])
    bf16 = bool(wanted.deepspeed.get("bf16", {}).get("enabled", False))
    networks = Networks.build(recipe, bf16=bf16, device="cuda")
    courses = {
        recompute: networks.course(
            recompute=recompute,
            keeps_gradients=False,
            granularity=wanted.granularity if recompute else None,
        )
        for recompute in (False, True)
    }
    trace = courses[wanted.activation_checkpointing].at(micro_batch)
    flops = {phase: trace.flops(phase) / trace.micro_batch for phase in (TEACHER, FORWARD, LOSS, BACKWARD)}
    named = recipe.data.shards is not None or recipe.data.sources
    num_shards = len(open_shards(recipe, check=False).counts) if named else None
    return Survey(recipe, wanted, Shapes(Sizes.of(networks), courses), flops, num_shards)


def foretell(
    counted: Survey,
    cluster: Cluster,
    *,
    assumed: Assumptions | None = None,
    prices: Prices | None = None,
) -> Plan:
    """The plan for a cluster. Raises ``ScaleError`` where the global batch cannot be shared."""
    assumed, prices = assumed or Assumptions(), prices or Prices()
    recipe, shapes = counted.recipe, counted.shapes
    resolved = scale.resolve(counted.scale, recipe, cluster.num_gpus)
    layout = Layout.of(resolved, cluster.num_gpus)
    asked = advice.judge(layout, shapes, cluster, assumed)
    found = list(advice.choices(counted.scale, recipe, shapes, cluster, assumed))
    return Plan(
        survey=counted,
        cluster=cluster,
        assumed=assumed,
        prices=prices,
        asked=asked,
        fits=advice.fits(asked, cluster),
        largest_micro_batch=advice.largest_micro_batch(layout, shapes, cluster, assumed),
        cost=cost(recipe, cluster, asked.time.total_s, shapes.sizes.student, prices, ema=layout.ema),
        best=advice.best(found),
    )


@dataclass(frozen=True)
class Column:
    """One number of GPUs in a comparison."""

    cluster: Cluster
    obstacle: str
    """Why the recipe does not run there; empty where it does."""
    by_stage: Mapping[int, Choice]
    """The fastest choice that fits, by ZeRO stage."""
    num_steps: int
    """Of the whole run."""

    @property
    def best(self) -> Choice | None:
        return advice.best(list(self.by_stage.values()))

    def hours(self, choice: Choice) -> float:
        """Of the whole run."""
        return self.num_steps * choice.time.total_s / 3600


def compare(counted: Survey, clusters: list[Cluster], assumed: Assumptions | None = None) -> list[Column]:
    """The fastest choice of each ZeRO stage on each cluster."""
    assumed = assumed or Assumptions()
    columns = []
    for cluster in clusters:
        by_stage = {}
        for stage in advice.STAGES:
            found = list(
                advice.choices(
                    counted.scale, counted.recipe, counted.shapes, cluster, assumed, stages=(stage,)
                )
            )
            if found:
                by_stage[stage] = min(found, key=lambda choice: choice.time.total_s)
        obstacle = _obstacle(counted, cluster, by_stage)
        columns.append(Column(cluster, obstacle, by_stage, counted.recipe.steps))
    return columns


def _obstacle(counted: Survey, cluster: Cluster, by_stage: Mapping[int, Choice]) -> str:
    if by_stage:
        return ""
    if not advice.micro_batches(counted.scale, counted.recipe, cluster.num_gpus):
        batch = counted.recipe.global_batch
        most = streams_of(batch)
        words = f"at most {most:,}" if cluster.num_gpus > most else "a divisor of it"
        return f"a global batch of {batch:,} cannot be dealt out to so many processes, but to {words}"
    return f"not one image per process fits in {cluster.gpu.memory_gib:g} GiB, whatever the ZeRO stage"


def where_zero_3_stops(columns: list[Column]) -> str:
    """In a sentence, from where on the lower stages are as good."""
    needed = [c for c in columns if c.by_stage and not (1 in c.by_stage or 2 in c.by_stage)]
    faster = [c for c in columns if c.best is not None and c.best.layout.zero_stage == 3]
    runs = [c for c in columns if c.by_stage]
    if not runs:
        return "It runs on none of these."
    if not faster:
        return "ZeRO-3 pays nowhere here: a lower stage fits and is as fast on each number of GPUs."
    last = faster[-1].cluster.num_gpus
    why = "it alone fits" if faster[-1] in needed else "its memory buys a larger micro-batch"
    after = [c.cluster.num_gpus for c in runs if c.cluster.num_gpus > last]
    if after:
        return (
            f"ZeRO-3 pays up to {last} GPUs ({why}); from {after[0]} on a lower stage is as fast or faster."
        )
    return f"ZeRO-3 pays on all numbers of GPUs up to {last}, the last one that runs ({why})."


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, units in the names."""
    counted, layout = plan.survey, plan.asked.layout
    cluster = plan.cluster
    shards = counted.num_shards
    return {
        "recipe": counted.recipe.name,
        "scale": counted.scale.name,
        "cluster": {
            "gpu": cluster.gpu.name,
            "num_nodes": cluster.num_nodes,
            "gpus_per_node": cluster.gpus_per_node,
            "num_gpus": cluster.num_gpus,
            "cores_per_gpu": cluster.cores_per_gpu,
            "time_limit_s": cluster.time_limit_s,
        },
        "parameters": {"student": counted.shapes.sizes.student, "teacher": counted.shapes.sizes.teacher},
        "batch": {
            "global": counted.recipe.global_batch,
            "micro": layout.micro_batch,
            "accumulation": layout.accumulation,
            "largest_micro_that_fits": plan.largest_micro_batch,
        },
        "teacher": {
            "placement": layout.teacher,
            "why": None if plan.asked.decision is None else plan.asked.decision.why,
        },
        "fits": plan.fits,
        "memory_gib": choice_memory(plan.asked) | {"gpu": cluster.gpu.memory_gib},
        "kept_gib": {
            name: size / GIB
            for name, size in counted.shapes.courses[layout.recompute]
            .at(layout.micro_batch)
            .kept_bytes.items()
        },
        "flops_per_image": dict(counted.flops_per_image),
        "useful_flops_per_image": counted.useful_flops_per_image,
        "step_s": asdict(plan.asked.time) | {"total_s": plan.asked.time.total_s},
        "run": asdict(plan.cost) | {"optimizer_steps": counted.recipe.steps},
        "shards_per_process": None if shards is None else shards / cluster.num_gpus,
        "recommended": None if plan.best is None else recommendation(plan, plan.best),
        "assumptions": asdict(plan.assumed)
        | asdict(plan.prices)
        | {"fragmentation": FRAGMENTATION, "outside_allocator_gib": OUTSIDE_GIB},
    }


def comparison_dict(columns: list[Column]) -> dict[str, Any]:
    """A comparison as plain values, units in the names."""
    return {
        "columns": [
            {
                "num_gpus": column.cluster.num_gpus,
                "obstacle": column.obstacle or None,
                "chosen_stage": None if column.best is None else column.best.layout.zero_stage,
                "by_stage": {
                    str(stage): {
                        "micro_batch": choice.layout.micro_batch,
                        "accumulation": choice.layout.accumulation,
                        "recompute": choice.layout.recompute,
                        "teacher": choice.layout.teacher,
                        "needed_gib": choice.memory.needed_bytes / GIB,
                        "images_per_s": choice.images_per_step / choice.time.total_s,
                        "hours": column.hours(choice),
                        "communication_s": choice.time.communication_s,
                        "exposed_s": choice.time.exposed_s,
                    }
                    for stage, choice in column.by_stage.items()
                },
            }
            for column in columns
        ],
        "zero_3": where_zero_3_stops(columns),
    }


def choice_memory(choice: Choice) -> dict[str, Any]:
    """A choice's memory by moment and part, GiB."""
    return {
        "moments": {
            moment.name: {name: size / GIB for name, size in moment.parts.items() if size}
            for moment in choice.memory.moments
        },
        "peak": choice.memory.peak_bytes / GIB,
        "needed": choice.memory.needed_bytes / GIB,
        "host": choice.memory.host_bytes / GIB,
    }


def recommendation(plan: Plan, choice: Choice) -> dict[str, Any]:
    """The scale file that the planner would write, and why."""
    layout = choice.layout
    return {
        "ds_config": advice.ds_config(plan.survey.scale, choice),
        "images_per_s": choice.images_per_step / choice.time.total_s,
        "needed_gib": choice.memory.needed_bytes / GIB,
        "why": (
            f"of ZeRO 1 to 3, with and without recomputation, each at the largest micro-batch that fits in "
            f"{plan.cluster.gpu.memory_gib:g} GiB and divides the global batch, ZeRO-{layout.zero_stage} "
            f"{'with' if layout.recompute else 'without'} recomputation at {layout.micro_batch} images is "
            "the fastest by this estimate, or within 2 % of it at a lower stage"
        ),
    }
