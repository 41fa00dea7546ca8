"""What lies in the memory of one process, part by part, at the moments that may be the fullest?

In the *pass* (teacher, forward, backward) the activations of one micro-batch are there, as ``trace.py``
counted them; in the *step* they are gone, and the optimizer's copies are there; while a teacher in shares
runs, its weights are gathered, and let go of before the student runs. What DeepSpeed
holds beside the networks follows from the ZeRO stage and the scale; it was read in DeepSpeed 0.19.8 and
agrees with what a run allocates (``tests/plan/test_memory.py``). All sizes are bytes of PyTorch's allocator;
what the driver takes for itself, and holes between blocks, are in ``OUTSIDE_GIB`` and ``FRAGMENTATION``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fd_scale.plan.course import Trace
from fd_scale.plan.layout import FP32, Layout, Sizes
from fd_scale.plan.trace import (
    GATHERED,
    GRADIENTS,
    IMAGES,
    MAPS,
    REDUCTION,
    WORKSPACE,
    Device,
    Sharding,
)

GIB = 2**30
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
HOST_WEIGHTS, OFFLOAD_BUFFERS = "weights on their way", "offload buffers"


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
    """The moments of one process, and what its host holds for it."""

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
    on_device, on_host = _held(layout, sizes, device)
    if device == "cuda":
        on_device["library workspace"] = LIBRARY_WORKSPACE_BYTES
    kept = on_device + Counter(_kept_gradients(layout, sizes))
    during_pass = kept + Counter(_reduction_parts(layout, sizes)) + Counter(_traced_parts(trace.at_peak))
    during_pass += Counter({"hpZ copy": _second_copy(layout, sizes, device)})
    if not trace.sharded:
        during_pass += Counter(_traffic_parts(layout, sizes, device))
    moments = [Moment(trace.peak_phase, during_pass)]
    if layout.teacher == "shard" and layout.world > 1:
        gathered = Counter({"teacher's gather": _teacher_window(layout, sizes, device)})
        # The student's weights come only after it.
        taught = {label: size for label, size in trace.at_teacher_peak.items() if label != GATHERED}
        moments.append(Moment("teacher's pass", kept + gathered + Counter(_traced_parts(taught))))
    moments.append(Moment("step", on_device + Counter(_step_parts(layout, sizes))))
    return Memory(tuple(moments), sum(on_host.values()))


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


def _held(layout: Layout, sizes: Sizes, kind: Device) -> tuple[Counter[str], Counter[str]]:
    """What stays from step to step on the device, and on the host."""
    stage, share = layout.zero_stage, _share(sizes.student, layout.world)
    sharded = share if stage > 0 else sizes.student
    weights = layout.weight_bytes * (share if stage == 3 else sizes.student)
    optimizer = {
        # Stages 1 to 3 keep a float32 copy of their share in float32 training, too.
        MASTER: FP32 * sharded if stage > 0 or layout.bf16 else 0,
        MOMENTS: 2 * FP32 * sharded,
        EMA: FP32 * sharded if layout.ema else 0,
    }
    device = Counter({TEACHER: _teacher_bytes(layout, sizes)})
    host: Counter[str] = Counter()
    (host if layout.offloads_parameters else device)[WEIGHTS] = weights
    (host if layout.offloads_optimizer else device).update(optimizer)
    if stage == 3:
        if layout.offloads_optimizer:  # beside the accumulated ones, those that the optimizer is given
            host[ACCUMULATED] = (_accumulator_bytes(layout) + FP32) * share
        else:
            device[ACCUMULATED] = _accumulator_bytes(layout) * share
        device[BUCKETS] = _bucket_bytes(layout, FP32 if layout.communicates_fp32 else 2)
        if layout.gathers(kind):
            device[GATHERED] = layout.weight_bytes * sizes.below(_threshold(layout))
    elif layout.offloads_optimizer:
        passes = FP32 + (layout.weight_bytes if layout.accumulation > 1 else 0)
        host[ACCUMULATED] = passes * share
        host[HOST_WEIGHTS] = layout.weight_bytes * share
        host[OFFLOAD_BUFFERS] = device[OFFLOAD_BUFFERS] = layout.weight_bytes * sizes.largest
    elif layout.accumulates_apart:
        device[ACCUMULATED] = FP32 * sizes.student
    return device, host


def _second_copy(layout: Layout, sizes: Sizes, device: Device) -> int:
    """Of hpZ: each weight's share within the group, made when the weight is first let go of, and kept until
    the step."""
    replicas = int(layout.zero.get("zero_hpz_partition_size", 1))
    if layout.zero_stage != 3 or layout.world == 1 or replicas == 1:
        return 0
    let_go = layout.weight_bytes * (sizes.student - sizes.below(_threshold(layout)))
    if layout.accumulation == 1:
        let_go -= _gather_window(layout, sizes, device)
    return _share(let_go, replicas)


def _teacher_bytes(layout: Layout, sizes: Sizes) -> int:
    if layout.teacher != "shard" or layout.world == 1:
        return layout.weight_bytes * sizes.teacher
    shared = _share(sizes.teacher - sizes.teacher_small, layout.world)
    return layout.weight_bytes * (shared + sizes.teacher_small)


def _kept_gradients(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """What stage 2 has accumulated of its share in earlier passes."""
    if layout.zero_stage != 2 or layout.accumulation == 1 or layout.offloads_optimizer:
        return {}
    return {ACCUMULATED: _accumulator_bytes(layout) * _share(sizes.student, layout.world)}


def _reduction_parts(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """What stages 1 and 2 hold in a backward pass alone: buckets, and stage 2 its share of the gradients of
    this pass, at most, from the first one that comes."""
    stage = layout.zero_stage
    if stage not in (1, 2) or layout.accumulates_apart:
        return {}
    both = 2 if layout.zero.get("overlap_comm", False) else 1
    parts = {BUCKETS: both * _bucket_bytes(layout, layout.weight_bytes)}
    if stage == 2 and not layout.offloads_optimizer:
        parts[ACCUMULATED] = layout.weight_bytes * _share(sizes.student, layout.world)
    return parts


def sharding(layout: Layout, sizes: Sizes, device: Device) -> Sharding | None:
    """ZeRO-3's traffic for a trace, where all weights stay gathered from the way forward to the way back, or
    none are; None for other stages and for larger models, whose window ``memory`` adds."""
    if layout.zero_stage != 3:
        return None
    if not layout.gathers(device):
        return Sharding(_bucket_numel(layout), _reduction_bytes(layout, device), threshold=sizes.student + 1)
    whole = layout.weight_bytes * (sizes.student - sizes.below(_threshold(layout)))
    if _gather_window(layout, sizes, device) < whole:
        return None
    return Sharding(_bucket_numel(layout), _reduction_bytes(layout, device), _threshold(layout))


def _traffic_parts(layout: Layout, sizes: Sizes, device: Device) -> dict[str, int]:
    """Gathered weights and reductions of ZeRO-3, at most, where the trace does not hold them."""
    if not layout.gathers(device):
        return {}
    reduced = min(_bucket_numel(layout), sizes.student)
    return {
        GATHERED: _gather_window(layout, sizes, device),
        REDUCTION: _reduction_bytes(layout, device) * reduced,
    }


def _reduction_bytes(layout: Layout, device: Device) -> int:
    """Per element: the bucket's partitions in order, and on a CPU the copy that gloo makes of them."""
    return (FP32 if layout.communicates_fp32 else 2) * (2 if device == "cpu" else 1)


def _bucket_numel(layout: Layout) -> int:
    return int(layout.zero.get("reduce_bucket_size", 5e8))


def _step_parts(layout: Layout, sizes: Sizes) -> dict[str, int]:
    """What is there in addition while the optimizer runs."""
    stage, share = layout.zero_stage, _share(sizes.student, layout.world)
    parts: dict[str, int] = {}
    if layout.offloads_optimizer:
        return {}
    if stage == 0:
        parts[ACCUMULATED] = layout.weight_bytes * sizes.student
        # In float32 they are flattened to be averaged, and that copy is gone when the optimizer runs.
        parts[STEP_COPIES] = FP32 * (sizes.student if layout.bf16 else min(sizes.student, ALLREDUCE_BUCKET))
    elif stage == 3:
        updated = min(share, max(int(layout.zero.get("sub_group_size", 1e9)), sizes.largest))
        parts[STEP_COPIES] = FP32 * updated
    elif layout.accumulates_apart:
        parts["gradients of the pass"] = 0 if layout.immediate else layout.weight_bytes * sizes.student
    else:
        parts[ACCUMULATED] = _accumulator_bytes(layout) * share
        parts[STEP_COPIES] = FP32 * share
    return parts


def _traced_parts(traced: Mapping[str, int]) -> dict[str, int]:
    """The composition of a trace's peak, under names that say what each part is."""
    parts: Counter[str] = Counter()
    for label, size in traced.items():
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


def _gather_window(layout: Layout, sizes: Sizes, device: Device) -> int:
    """Weights that ZeRO-3 has gathered at once, those that always stay whole left out.

    A weight is kept after use when it is needed again within ``stage3_max_reuse_distance`` elements; on the
    way forward that is the last half of this distance. In front, a prefetch bucket is on its way.
    """
    if not layout.gathers(device):
        return 0
    gathered = sizes.student - sizes.below(_threshold(layout))
    prefetch = int(layout.zero.get("stage3_prefetch_bucket_size", 5e7))
    reuse = int(layout.zero.get("stage3_max_reuse_distance", 1e9)) // 2
    live = int(layout.zero.get("stage3_max_live_parameters", 1e9))
    return layout.weight_bytes * min(gathered, max(live, sizes.largest), reuse + prefetch + sizes.largest)


def _teacher_window(layout: Layout, sizes: Sizes, device: Device) -> int:
    """Of a teacher in shares, the weights that are gathered at once while it runs; on a CPU also the copy
    that gloo makes of the last bucket, and holds until the next one is asked for."""
    sharded = sizes.teacher - sizes.teacher_small
    gathered = min(sharded, sizes.teacher_largest + TEACHER_PREFETCH)
    copied = min(sharded, TEACHER_PREFETCH) if device == "cpu" else 0
    return layout.weight_bytes * (gathered + copied)
