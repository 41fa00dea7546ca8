"""What goes through the norms of a run in bf16, of students and teachers of every library? bf16, both ways.

A norm in float32 would read and write twice the bytes, and a cast before and after it would be two passes
more: norms and what lies between products are most of a step. PyTorch's kernels sum in float32 inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plan_cases import OFF, ZERO_1, Case
from fd_scale.data.reader import Batch
from fd_scale.distill import Distillation
from fd_scale.engine.zero import Engine
from fd_scale.run.world import World
from tests.spawn import spawn

VIT = {
    "student.architecture": "vit_tiny_patch16",
    "student.input_size": 64,
    "student.arguments": {"depth": 2},
    "teacher.input_size": 64,
}
SWIN = {"student.input_size": 64, "teacher.input_size": 64}
DEPTHS = {"depths": [1, 1, 2, 1]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "our ViT of timm's": ("demo", {}),
    "our SwinV2 of our own": (
        "fd_swinv2t",
        SWIN | {"student.arguments": DEPTHS | {"extra_norm_every": 1}, "teacher.arguments": DEPTHS},
    ),
    "our ViT of CLIP": (
        "fd_clip_vitb16",
        VIT
        | {
            "teacher.library": "open_clip",
            "teacher.architecture": "ViT-B-16",
            "teacher.arguments": {"layers": 2, "width": 192},
        },
    ),
    "timm's SwinV2 of timm's": (
        "fd_swinv2t",
        SWIN
        | {
            "student.architecture": "timm:swinv2_tiny_window8_256",
            "student.arguments": {"depths": [1, 1, 1, 1]},
            "teacher.library": "timm",
            "teacher.architecture": "swinv2_tiny_window8_256",
            "teacher.arguments": {"depths": [1, 1, 1, 1]},
        },
    ),
}


class InNorms(TorchDispatchMode):
    """Dtypes that norms take and give, by their place in the network, and the casts made inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}
        self.casts: list[str] = []
        self._inside: list[str] = []

    def watch(self, network: nn.Module, label: str) -> None:
        for name, module in network.named_modules():
            if "Norm" in type(module).__name__:
                place = f"{label} {name} ({type(module).__name__})"
                self.seen[place] = set()
                module.register_forward_pre_hook(lambda *_, place=place: self._inside.append(place))
                module.register_forward_hook(
                    lambda _, taken, given, place=place: self._left(place, taken, given)
                )

    def _left(self, place: str, taken: tuple[Tensor, ...], given: Tensor) -> None:
        self._inside.pop()
        self.seen[place] |= {taken[0].dtype, given.dtype}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside and func is torch.ops.aten._to_copy.default:
            self.casts.append(self._inside[-1])
        return func(*args, **(kwargs or {}))


def looked(world: World, folder: str) -> dict[str, Any]:
    """Per case: a step in bf16 under the watch."""
    found = {}
    for number, (name, (recipe_name, changes)) in enumerate(CASES.items()):
        recipe, resolved = Case(f"case{number}", recipe_name, OFF | changes, 2, ZERO_1).build(Path(folder), 1)
        task = Distillation(recipe, resolved, world)
        engine = Engine(task.module, recipe, resolved, world)
        norms = InNorms()
        norms.watch(task.module, "student")
        for teacher in task.teachers:
            norms.watch(teacher.network, "teacher")
        views = {side: torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8) for side in task.sizes}
        with norms:
            loss = task.loss(engine, Batch(views, torch.ones(2, dtype=torch.bool), ["a", "b"]))
        outcome = engine.step(loss)
        assert outcome is not None
        found[name] = norms.seen, norms.casts, bool(outcome.applied)
        engine.deepspeed.destroy()
    return found


@pytest.mark.slow
def test_norms_take_and_give_bf16(tmp_path: Path) -> None:
    (found,) = spawn(looked, 1, str(tmp_path))
    for case, (seen, casts, applied) in found.items():
        assert {place.partition(" ")[0] for place in seen} == {"student", "teacher"}, case
        passed = {place: dtypes for place, dtypes in seen.items() if dtypes}
        assert len(passed) >= 5, case
        assert all(dtypes == {torch.bfloat16} for dtypes in passed.values()), (case, passed)
        assert casts == [], case
        assert applied, case
