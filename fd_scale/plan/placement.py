"""Is the teacher whole on every process, or shared by all? What ``"teacher": "auto"`` of a scale comes to.

It stays whole where the run fits with a whole teacher, by the plan's count of memory (allocator's peak, holes
between its blocks, what lies outside it) against the memory of one GPU; on a CPU, against the host's memory
divided by the processes on it. Where it does not fit the processes share it: the same maps, and its weights
travel in every pass. One process alone has nothing to share.

A plan decides for the GPU that it is asked for, a run for the smallest of its devices. A run keeps the
decision in its directory, and takes it up again as long as what it was made from is the same.
"""

from __future__ import annotations

import json
import logging
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import psutil
import torch

from fd_scale.errors import RunError
from fd_scale.plan.course import Trace
from fd_scale.plan.layout import Layout, Sizes
from fd_scale.plan.memory import GIB, memory, with_gradients
from fd_scale.plan.trace import Device, Networks
from fd_scale.run.folder import RunFolder, as_json, write_atomically
from fd_scale.run.recipe import Recipe
from fd_scale.run.scale import Placement, Resolved
from fd_scale.run.world import World

log = logging.getLogger("fd_scale")


@dataclass(frozen=True)
class Decision:
    """Where the teacher's weights lie, and why."""

    teacher: Placement
    why: str


def decide(layout: Layout, sizes: Sizes, trace: Trace, memory_gib: float, device: Device) -> Decision:
    """The placement for processes with ``memory_gib`` each; ``trace`` is of the layout's micro-batch."""
    if layout.world == 1:
        return Decision("replicate", "one process has nobody to share it with")

    def needed_gib(teacher: Placement) -> float:
        found = memory(replace(layout, teacher=teacher), sizes, trace, device)
        # On a CPU what is offloaded to the host lies in the same memory.
        return (found.needed_bytes + (found.host_bytes if device == "cpu" else 0)) / GIB

    whole, shared = needed_gib("replicate"), needed_gib("shard")
    if whole <= memory_gib:
        return Decision("replicate", f"with it a process needs {whole:.1f} GiB of {memory_gib:.1f}")
    why = f"whole, a process would need {whole:.1f} GiB of {memory_gib:.1f}; in shares {shared:.1f}"
    return Decision("shard", why if shared <= memory_gib else f"{why}, which does not fit either")


def settled(
    layout: Layout, sizes: Sizes, trace: Trace, memory_gib: float, device: Device
) -> tuple[Layout, Decision | None]:
    """The layout with ``auto`` decided; as it is, and None, where its scale says the placement itself."""
    if layout.teacher != "auto":
        return layout, None
    decision = decide(layout, sizes, trace, memory_gib, device)
    return replace(layout, teacher=decision.teacher), decision


@dataclass(frozen=True)
class Settlement:
    """What a run was decided to do, with what decided it."""

    decision: Decision
    facts: Mapping[str, Any]
    """Of scale and machines; equal facts give an equal decision."""

    def record(self, folder: RunFolder) -> None:
        """Keep it in the run directory."""
        write_atomically(folder.placement, as_json({**asdict(self.decision), "decided_from": self.facts}))


def settle(recipe: Recipe, resolved: Resolved, world: World) -> tuple[Resolved, Settlement | None]:
    """What a run gets for its ``auto``, the same on every process, and what to record of it; None where the
    scale says the placement itself. Collective.

    Raises the errors of the networks for wrong input, and ``RunError`` for a damaged record.
    """
    if resolved.teacher != "auto":
        return resolved, None
    memory_gib = process_memory_gib(world)
    device: Device = "cuda" if world.device.type == "cuda" else "cpu"
    layout = Layout.of(resolved, world.size)
    facts = {
        "device": device,
        "memory_gib": round(memory_gib, 2),
        "layout": json.loads(json.dumps(asdict(layout))),
        "granularity": dict(resolved.granularity),
    }

    def on_main() -> Decision:
        folder = RunFolder.of(recipe)
        return recorded(folder, facts) or _counted(recipe, resolved, layout, memory_gib, device)

    decision = world.on_main(on_main)
    words = {"replicate": "whole on every process", "shard": "in shares"}
    log.info("teacher: %s (auto: %s)", words[decision.teacher], decision.why)
    return replace(resolved, teacher=decision.teacher), Settlement(decision, facts)


def recorded(folder: RunFolder, facts: Mapping[str, Any]) -> Decision | None:
    """The decision that the run was begun with, if it was made from these facts."""
    try:
        found = json.loads(folder.placement.read_text(encoding="utf-8"))
        return Decision(found["teacher"], found["why"]) if found["decided_from"] == facts else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{folder.placement} is damaged ({error!r}): remove it, and the placement of the teacher is "
            "decided anew"
        ) from None


def process_memory_gib(world: World) -> float:
    """Memory of the process that has the least: of its GPU, or its part of its host's. Collective."""
    if world.device.type == "cuda":
        here = torch.cuda.get_device_properties(world.device).total_memory / GIB
    else:
        here = psutil.virtual_memory().total / GIB
    found = world.gather((socket.gethostname(), here))
    if world.device.type == "cuda":
        return min(size for _, size in found)
    sharing = Counter(host for host, _ in found)
    return min(size / sharing[host] for host, size in found)


def _counted(
    recipe: Recipe, resolved: Resolved, layout: Layout, memory_gib: float, device: Device
) -> Decision:
    networks = Networks.build(recipe, bf16=resolved.bf16, device=device)
    sizes = Sizes.of(networks)
    course = networks.course(
        recompute=layout.recompute, keeps_gradients=False, granularity=resolved.granularity
    )
    trace = course.at(layout.micro_batch)
    return decide(layout, sizes, with_gradients(trace, layout, sizes), memory_gib, device)
