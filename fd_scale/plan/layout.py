"""How does a run lie on its processes, and how large are its networks? What memory and time follow from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fd_scale.plan.trace import Device, Networks
from fd_scale.run.scale import AskedPlacement, Resolved

FP32 = 4
"""Bytes."""
TEACHER_THRESHOLD = 100_000
"""Elements below which the engine of a teacher in shares leaves a tensor whole (``engine.zero``)."""


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

    def gathers(self, device: Device) -> bool:
        """Whether weights are brought to the device when they are used: from other processes, or from the
        host, where that is not the device itself."""
        from_host = self.offloads_parameters and device != "cpu"
        return self.zero_stage == 3 and (self.world > 1 or from_host)

    @property
    def accumulates_apart(self) -> bool:
        """Whether all gradients have a float32 accumulator of their own beside ``.grad``: DeepSpeed's
        optimizer for stage 1 in bf16."""
        return self.zero_stage == 1 and self.bf16 and self.accumulates_fp32 and not self.offloads_optimizer

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay whole in ``.grad`` until the backward pass is over."""
        if self.accumulates_apart:
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
    teacher_largest: int = 0
    """Of the teacher's largest tensor."""
    teacher_small: int = 0
    """Elements of its tensors that stay whole where it is in shares."""

    @classmethod
    def of(cls, networks: Networks) -> Sizes:
        """Counted on the networks."""
        sizes = [p.numel() for p in networks.student.parameters() if p.requires_grad]
        small: Counter[int] = Counter()
        for size in sizes:
            small[size] += size
        taught = [p.numel() for p in networks.teacher.network.parameters()]
        whole = sum(size for size in taught if size < TEACHER_THRESHOLD)
        return cls(sum(sizes), sum(taught), max(sizes), dict(small), max(taught), whole)

    def below(self, threshold: int) -> int:
        """Elements in tensors smaller than ``threshold``."""
        return sum(total for size, total in self.small.items() if size < threshold)
