"""How long does an optimizer step take? An estimate from a roofline, with its assumptions in the open.

Each operation of the traced micro-step takes the longer of its arithmetic and its memory traffic; the host
must launch it; collectives pass the slowest link of the ring. What share of each peak is reached is assumed,
the same for all networks, and is printed with every plan: an estimate, not a promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fd_scale.plan.cluster import Cluster
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import FP32, Layout, Sizes
from fd_scale.plan.memory import TEACHER_PREFETCH


@dataclass(frozen=True)
class Assumptions:
    """What the estimate assumes beside the data sheets."""

    compute: float = 0.56
    """Share of the peak of matrix products that they reach (0.8 is what a large square product measures on an
    H200; smaller ones reach about 0.7 of that)."""
    memory: float = 0.63
    """Share of the memory's peak (0.9 is what a plain copy measures on an H200; 0.7 of that)."""
    link: float = 0.7
    """Share of a link's peak that collectives reach."""
    launch_us: float = 5.0
    """Host time of an operation in eager PyTorch, microseconds."""
    latency_us: float = 30.0
    """Of one collective within a node, microseconds; more by as much for each doubling of the nodes."""
    host_gb_s: float = 50.0
    """Rate at which one process updates an optimizer that is in the host's memory, GB/s."""


ADAM_BYTES = 28
"""Read and written per parameter by a fused AdamW step: gradient, weight, two moments, and the copy."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by cause."""

    compute_s: float
    """Operations that their arithmetic bounds."""
    traffic_s: float
    """Operations that their memory traffic bounds."""
    launch_wait_s: float
    """For which the device waits for the host to launch operations."""
    optimizer_s: float
    communication_s: float
    """All collectives, hidden or not."""
    exposed_s: float
    """Of them what nothing hides."""

    @property
    def total_s(self) -> float:
        return self.compute_s + self.traffic_s + self.launch_wait_s + self.optimizer_s + self.exposed_s


def device_seconds(trace: Trace, cluster: Cluster, assumed: Assumptions) -> tuple[float, float]:
    """(bound by arithmetic, bound by traffic) of one micro-step, seconds."""
    rate = cluster.gpu.bf16_tflops * 1e12 * assumed.compute
    bandwidth = cluster.gpu.memory_tb_s * 1e12 * assumed.memory
    compute = traffic = 0.0
    for work, times in trace.work.items():
        arithmetic, moving = work.flops / rate, work.moved_bytes / bandwidth
        if arithmetic > moving:
            compute += arithmetic * times
        else:
            traffic += moving * times
    return compute, traffic


def step_time(layout: Layout, sizes: Sizes, trace: Trace, cluster: Cluster, assumed: Assumptions) -> StepTime:
    """One optimizer step; the trace's micro-batch may differ from the layout's, time being in proportion."""
    share = layout.micro_batch / trace.micro_batch
    compute, traffic = (t * share for t in device_seconds(trace, cluster, assumed))
    launching = trace.num_kernels * assumed.launch_us * 1e-6
    waiting = max(0.0, launching - compute - traffic)
    passes = layout.accumulation
    updated = sizes.student / (layout.world if layout.zero_stage else 1)
    bandwidth = cluster.gpu.memory_tb_s * 1e12 * assumed.memory
    if layout.offloads_optimizer:
        bandwidth = assumed.host_gb_s * 1e9
    student_s = communication_s(layout, sizes, cluster, assumed)
    teacher_s = teacher_gathering_s(layout, sizes, cluster, assumed)
    communication = student_s + teacher_s
    # The teacher's engine always fetches ahead.
    behind = communication if layout.zero.get("overlap_comm", layout.zero_stage == 3) else teacher_s
    hidden = min(behind, (compute + traffic) * passes)
    return StepTime(
        compute * passes,
        traffic * passes,
        waiting * passes,
        ADAM_BYTES * updated / bandwidth,
        communication,
        communication - hidden,
    )


def communication_s(layout: Layout, sizes: Sizes, cluster: Cluster, assumed: Assumptions) -> float:
    """The student's collectives of an optimizer step, seconds, as DeepSpeed runs them.

    Stages 0 and 1 all-reduce gradients once per step; stages 2 and 3 reduce-scatter them in every
    micro-step; stages 1 and 2 gather new weights once; stage 3 gathers weights on the way forward and, where
    it cannot keep them all, on the way back, which hpZ keeps within a node.
    """
    world, stage, passes = layout.world, layout.zero_stage, layout.accumulation
    if world == 1:
        return 0.0
    weights = layout.weight_bytes * sizes.student
    gradients = (FP32 if layout.communicates_fp32 else 2) * sizes.student
    ring = (world - 1) / world
    near = cluster.gpu.link_gb_s * 1e9 * assumed.link
    far = cluster.slowest_link_gb_s * 1e9 * assumed.link
    bucket = max(int(layout.zero.get("reduce_bucket_size", 5e8)), 1)
    num_reduces = math.ceil(sizes.student / bucket)
    latency = _latency_s(cluster, assumed)
    if stage < 2:
        seconds = 2 * gradients * ring / far + num_reduces * latency
        return seconds + (weights * ring / far + latency if stage == 1 else 0.0)
    reducing = gradients * ring / far + num_reduces * latency
    if stage == 2:
        return passes * reducing + weights * ring / far + latency
    kept = int(layout.zero.get("stage3_max_reuse_distance", 1e9)) // 2
    again = max(0, sizes.student - kept) / sizes.student
    on_the_way_back = near if int(layout.zero.get("zero_hpz_partition_size", 1)) > 1 else far
    prefetch = max(int(layout.zero.get("stage3_prefetch_bucket_size", 5e7)), 1)
    num_gathers = math.ceil(sizes.student / prefetch) * (1 + again)
    gathering = weights * ring * (1 / far + again / on_the_way_back) + num_gathers * latency
    return passes * (gathering + reducing)


def teacher_gathering_s(layout: Layout, sizes: Sizes, cluster: Cluster, assumed: Assumptions) -> float:
    """Of an optimizer step, seconds in which a teacher in shares is gathered: once in each pass."""
    if layout.teacher != "shard" or layout.world == 1:
        return 0.0
    moved = layout.weight_bytes * sizes.teacher * (layout.world - 1) / layout.world
    far = cluster.slowest_link_gb_s * 1e9 * assumed.link
    num_gathers = math.ceil(sizes.teacher / TEACHER_PREFETCH)
    return layout.accumulation * (moved / far + num_gathers * _latency_s(cluster, assumed))


def _latency_s(cluster: Cluster, assumed: Assumptions) -> float:
    return assumed.latency_us * 1e-6 * (1 + math.log2(cluster.num_nodes))
