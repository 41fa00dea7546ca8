"""What lies in the memory of one process, part by part, at the moments that may be the fullest?

There are two. In the *pass* (teacher, forward, backward) the activations of one micro-batch are there, as
``trace.py`` counted them; in the *step* they are gone, and the optimizer's copies are there. What DeepSpeed
holds beside the networks follows from the ZeRO stage and the scale; it was read in DeepSpeed 0.19.8 and
agrees with what a run allocates (``tests/plan/test_memory.py``). All sizes are bytes of PyTorch's allocator;
what the driver takes for itself, and holes between blocks, are in ``OUTSIDE_GIB`` and ``FRAGMENTATION``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fd_scale.plan.trace import (
    GATHERED,
    GRADIENTS,
    IMAGES,
    MAPS,
    REDUCTION,
    WORKSPACE,
    Device,
    Networks,
    Sharding,
    Trace,
)
from fd_scale.run.scale import AskedPlacement, Resolved

GIB = 2**30
FP32 = 4
ALLREDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed flattens at a time to average gradients that no ZeRO stage shards."""

OUTSIDE_GIB = 1.5
"""Taken beside PyTorch's allocator: CUDA context, loaded kernels, NCCL's buffers. An assumption."""
FRAGMENTATION = 0.05
"""Share of the allocator's peak that holes between blocks add. An assumption."""
LIBRARY_WORKSPACE_BYTES = 64 * 2**20
"""cuBLAS and cuBLASLt on Hopper, 32 MiB each, inside the allocator (PyTorch's documented default)."""

WEIGHTS, MASTER, MOMENTS, EMA, TEACHER = "weights", "master weights", "Adam moments", "EMA", "teacher"
ACCUMULATED, BUCKETS = GRADIENTS, "reduction buckets"
TEACHER_PREFETCH = 50_000_000
"""Elements that the engine of a sharded teacher fetches ahead (``engine.zero.shard_frozen``)."""
STEP_COPIES = "optimizer's copies"


@dataclass(frozen=True)
class Layout:
    """How a run lies on its processes."""

    world: int
    zero_stage: int
    bf16: bool
    micro_batch: int
    accumulation: int
    recompute: bool
    """Whether blocks are recomputed in the backward pass (activation checkpointing)."""
    zero: Mapping[str, Any]
    """The section ``zero_optimization`` of the scale."""
    accumulates_fp32: bool
    communicates_fp32: bool
    immediate: bool = False
    """bf16.immediate_grad_update."""
    teacher: AskedPlacement = "replicate"
    ema: bool = False
    """A float32 moving average of the weights, sharded like the master weights."""

    @classmethod
    def of(cls, resolved: Resolved, world: int) -> Layout:
        """The layout that a resolved scale gives."""
        config = resolved.ds_config
        types, bf16 = config.get("data_types", {}), resolved.bf16
        return cls(
            world=world,
            zero_stage=resolved.zero_stage,
            bf16=bf16,
            micro_batch=resolved.micro_batch,
            accumulation=resolved.accumulation,
            recompute=resolved.activation_checkpointing,
            zero=config.get("zero_optimization", {}),
            accumulates_fp32=not bf16 or types.get("grad_accum_dtype") == "fp32",
            communicates_fp32=not bf16 or config.get("communication_data_type") == "fp32",
            immediate=bool(config.get("bf16", {}).get("immediate_grad_update", False)),
            teacher=resolved.teacher,
            ema=resolved.averages,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight in the networks."""
        return 2 if self.bf16 else FP32

    @property
    def offloads_optimizer(self) -> bool:
        """Whether master weights and moments are in the host's memory."""
        return self.zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether ZeRO-3's share of the weights is in the host's memory."""
        return self.zero.get("offload_param", {}).get("device", "none") != "none"

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay whole in ``.grad`` until the backward pass is over."""
        if self.zero_stage == 1 and self.bf16 and self.accumulates_fp32:
            return not self.immediate
        return self.zero_stage == 0 or (self.zero_stage == 1 and not self.zero.get("overlap_comm", False))

    @property
    def gradients_are_there(self) -> bool:
        """Whether ``.grad`` still holds those of an earlier micro-batch when a pass begins."""
        return self.keeps_gradients and self.accumulation > 1


@dataclass(frozen=True)
class Sizes:
    """Parameters of a recipe's networks."""

    student: int
    """Trainable parameters, projectors included."""
    teacher: int
    largest: int
    """Of the student's largest tensor."""
    small: Mapping[int, int]
    """Elements in tensors of so many elements, by that number: what a persistence threshold keeps whole."""

    @classmethod
    def of(cls, networks: Networks) -> Sizes:
        """Counted on the networks."""
        sizes = [p.numel() for p in networks.student.parameters() if p.requires_grad]
        small: Counter[int] = Counter()
        for size in sizes:
            small[size] += size
        teacher = sum(p.numel() for p in networks.teacher.network.parameters())
        return cls(sum(sizes), teacher, max(sizes), dict(small))

    def below(self, threshold: int) -> int:
        """Elements in tensors smaller than ``threshold``."""
        return sum(total for size, total in self.small.items() if size < threshold)


@dataclass(frozen=True)
class Moment:
    """One moment of a step. ``parts`` in bytes, by name."""

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """Both moments of one process, and what its host holds for it."""

    moments: tuple[Moment, ...]
    host_bytes: int

    @property
    def fullest(self) -> Moment:
        """The moment that decides whether it fits."""
        return max(self.moments, key=lambda moment: moment.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """The most that PyTorch's allocator hands out."""
        return self.fullest.total_bytes

    @property
    def needed_bytes(self) -> int:
        """What the device must have: the peak, holes between blocks, and what lies outside the allocator."""
        return round(self.peak_bytes * (1 + FRAGMENTATION) + OUTSIDE_GIB * GIB)


def memory(layout: Layout, sizes: Sizes, trace: Trace, device: Device) -> Memory:
    """The memory of one process; ``trace`` is of the layout's micro-batch, recomputation and gradients.

    Raises ``ValueError`` for a teacher's placement that is still to be decided (``placement.settled``).
    """
    if layout.teacher == "auto":
        raise ValueError("whether the teacher is whole or in shares is not decided yet (plan.placement)")
    held = _held(layout, sizes)
    on_host = {MASTER, MOMENTS, ACCUMULATED, EMA} if layout.offloads_optimizer else set()
    on_host |= {WEIGHTS} if layout.offloads_parameters else set()
    on_device = Counter({name: size for name, size in held.items() if name not in on_host})
    if device == "cuda":
        on_device["library workspace"] = LIBRARY_WORKSPACE_BYTES
    during_pass = on_device + Counter(_pass_parts(layout, sizes)) + Counter(_traced_parts(trace))
    if not trace.sharded:
        during_pass += Counter(_traffic_parts(layout, sizes, device))
    during_step = on_device + Counter(_step_parts(layout, sizes, device))
    host = sum(size for name, size in held.items() if name in on_host)
    return Memory((Moment(trace.peak_phase, during_pass), Moment("step", during_step)), host)


def with_gradients(trace: Trace, layout: Layout, sizes: Sizes) -> Trace:
    """A trace whose gradients were taken as they came, for a layout. Where gradients stay, all of them are
    added to the peak: at most, they are there when it comes."""
    if not layout.keeps_gradients:
        return trace
    gradients = layout.weight_bytes * sizes.student
    return replace(
        trace,
        peak_bytes=trace.peak_bytes + gradients,
        at_peak=trace.at_peak | {GRADIENTS: gradients},
    )


def _share(numel: int, world: int) -> int:
    return -(-numel // world)


def _held(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """What stays from step to step."""
    stage, share = layout.zero_stage, _share(sizes.student, layout.world)
    sharded = share if stage > 0 else sizes.student
    parts = {
        WEIGHTS: layout.weight_bytes * (share if stage == 3 else sizes.student),
        # Stages 1 to 3 keep a float32 copy of their share in float32 training, too.
        MASTER: FP32 * sharded if stage > 0 or layout.bf16 else 0,
        MOMENTS: 2 * FP32 * sharded,
        EMA: FP32 * sharded if layout.ema else 0,
        TEACHER: layout.weight_bytes
        * (_share(sizes.teacher, layout.world) if layout.teacher == "shard" else sizes.teacher),
    }
    if stage == 3:
        parts[ACCUMULATED] = _accumulator_bytes(layout) * share
        parts[BUCKETS] = _bucket_bytes(layout, FP32 if layout.communicates_fp32 else 2)
        replicas = int(layout.zero.get("zero_hpz_partition_size", 1))
        if replicas > 1:
            parts["hpZ copy"] = layout.weight_bytes * _share(sizes.student, replicas)
        if layout.world > 1:
            whole = sizes.below(_threshold(layout))
            parts[GATHERED] = layout.weight_bytes * whole
    elif stage == 1 and layout.bf16 and layout.accumulates_fp32 and not layout.offloads_optimizer:
        parts[ACCUMULATED] = FP32 * sizes.student
    return parts


def _pass_parts(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """What is there in addition while networks run."""
    stage = layout.zero_stage
    parts = {"teacher's gather": _teacher_window(layout, sizes)}
    if stage == 2 or (stage == 1 and not (layout.bf16 and layout.accumulates_fp32)):
        both = 2 if layout.zero.get("overlap_comm", False) else 1
        parts[BUCKETS] = both * _bucket_bytes(layout, layout.weight_bytes)
    if stage == 2 and layout.accumulation > 1:
        parts[ACCUMULATED] = _accumulator_bytes(layout) * _share(sizes.student, layout.world)
    return parts


def sharding(layout: Layout, sizes: Sizes, device: Device) -> Sharding | None:
    """ZeRO-3's traffic for a trace, where all weights stay gathered from the way forward to the way back;
    None for other stages and for larger models, whose window ``memory`` adds."""
    if layout.zero_stage != 3 or layout.world == 1:
        return None
    whole = layout.weight_bytes * (sizes.student - sizes.below(_threshold(layout)))
    if _gather_window(layout, sizes) < whole:
        return None
    return Sharding(_bucket_numel(layout), _reduction_bytes(layout, device), _threshold(layout))


def _traffic_parts(layout: Layout, sizes: Sizes, device: Device) -> dict[str, int]:
    """Gathered weights and reductions of ZeRO-3, at most, where the trace does not hold them."""
    if layout.zero_stage != 3 or layout.world == 1:
        return {}
    reduced = min(_bucket_numel(layout), sizes.student)
    return {
        GATHERED: _gather_window(layout, sizes),
        REDUCTION: _reduction_bytes(layout, device) * reduced,
    }


def _reduction_bytes(layout: Layout, device: Device) -> int:
    """Per element: the bucket's partitions in order, and on a CPU the copy that gloo makes of them."""
    return (FP32 if layout.communicates_fp32 else 2) * (2 if device == "cpu" else 1)


def _bucket_numel(layout: Layout) -> int:
    return int(layout.zero.get("reduce_bucket_size", 5e8))


def _step_parts(layout: Layout, sizes: Sizes, device: Device) -> dict[str, int]:
    """What is there in addition while the optimizer runs."""
    stage, share = layout.zero_stage, _share(sizes.student, layout.world)
    parts: dict[str, int] = {}
    updated = share
    if stage == 0:
        parts[ACCUMULATED] = layout.weight_bytes * sizes.student
        # In float32 they are flattened to be averaged, and that copy is gone when the optimizer runs.
        parts[STEP_COPIES] = FP32 * (sizes.student if layout.bf16 else min(sizes.student, ALLREDUCE_BUCKET))
        updated = sizes.largest if layout.bf16 else 0
    elif stage == 3:
        updated = min(share, max(int(layout.zero.get("sub_group_size", 1e9)), sizes.largest))
        parts[STEP_COPIES] = FP32 * updated
    elif stage == 1 and layout.bf16 and layout.accumulates_fp32:
        parts["gradients of the pass"] = 0 if layout.immediate else layout.weight_bytes * sizes.student
    else:
        parts[ACCUMULATED] = _accumulator_bytes(layout) * share
        parts[STEP_COPIES] = FP32 * share
    if device == "cpu":
        # The unfused AdamW writes out the denominator, and what it is made from.
        parts[STEP_COPIES] = parts.get(STEP_COPIES, 0) + 2 * FP32 * updated
    if layout.offloads_optimizer:
        parts[STEP_COPIES] = 0
    return parts


def _traced_parts(trace: Trace) -> dict[str, int]:
    """The composition of the trace's peak, under names that say what each part is."""
    parts: Counter[str] = Counter()
    for label, size in trace.at_peak.items():
        parts[_name(label)] += size
    return dict(parts)


def _name(label: str) -> str:
    if label in (GRADIENTS, MAPS, IMAGES, WORKSPACE, GATHERED, REDUCTION, "loss", "projector", TEACHER):
        return {TEACHER: "teacher's activations", WORKSPACE: "backward workspace"}.get(label, label)
    return f"activations: {label}"


def _accumulator_bytes(layout: Layout) -> int:
    """Bytes of one accumulated gradient."""
    return FP32 if layout.accumulates_fp32 else 2


def _bucket_bytes(layout: Layout, element_bytes: int) -> int:
    """Of one reduction bucket, allocated whole whatever the model's size."""
    if not layout.zero.get("contiguous_gradients", True):
        return 0
    return element_bytes * _bucket_numel(layout)


def _threshold(layout: Layout) -> int:
    return int(layout.zero.get("stage3_param_persistence_threshold", 1e5))


def _gather_window(layout: Layout, sizes: Sizes) -> int:
    """Weights that ZeRO-3 has gathered at once, those that always stay whole left out.

    A weight is kept after use when it is needed again within ``stage3_max_reuse_distance`` elements; on the
    way forward that is the last half of this distance. In front, a prefetch bucket is on its way.
    """
    if layout.world == 1:
        return 0
    gathered = sizes.student - sizes.below(_threshold(layout))
    prefetch = int(layout.zero.get("stage3_prefetch_bucket_size", 5e7))
    reuse = int(layout.zero.get("stage3_max_reuse_distance", 1e9)) // 2
    live = int(layout.zero.get("stage3_max_live_parameters", 1e9))
    return layout.weight_bytes * min(gathered, max(live, sizes.largest), reuse + prefetch + sizes.largest)


def _teacher_window(layout: Layout, sizes: Sizes) -> int:
    """Of a sharded teacher, the weights that are gathered while it runs."""
    if layout.teacher == "replicate" or layout.world == 1:
        return 0
    return layout.weight_bytes * min(sizes.teacher, sizes.largest + TEACHER_PREFETCH)
