"""Which runs are planned and measured? Recipes with small changes, on scales that are written here.

For ``plan_vs_measured``, which says what is done with them.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd_scale.run import recipes, scale
from fd_scale.run.recipe import Recipe, derive


@dataclass(frozen=True)
class Case:
    """One run: a recipe with changes, on a scale that is written here."""

    name: str
    recipe: str
    changes: dict[str, Any]
    micro_batch: int
    zero: dict[str, Any]
    bf16: bool = True
    recompute: bool | dict[str, Any] = False
    accumulation: int = 1
    teacher: scale.Placement = "replicate"
    world: int = 1
    """Processes; more than one on a CPU alone."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of the scale."""

    def scale(self) -> dict[str, Any]:
        """The scale file's content."""
        values: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "zero_optimization": self.zero,
            "fd_scale": {"activation_checkpointing": self.recompute, "teacher": self.teacher},
            **self.more,
        }
        if self.bf16:
            values["bf16"] = {"enabled": True}
            if self.zero["stage"] > 0:
                values["data_types"] = {"grad_accum_dtype": "fp32"}
        return values

    def build(self, folder: Path, world: int) -> tuple[Recipe, scale.Resolved]:
        """Recipe and resolved scale for so many processes."""
        path = folder / f"{self.name}-{os.getpid()}.json"
        path.write_text(json.dumps(self.scale()))
        batch = self.micro_batch * self.accumulation * world
        changes = {
            "global_batch": batch,
            "scale": str(path),
            "schedule.images": 100 * batch,
            "schedule.warmup_images": 0,
            "teacher.weights": "random",
            **self.changes,
        }
        recipe = derive(recipes.get(self.recipe), **changes)
        return recipe, scale.resolve(scale.load(str(path)), recipe, world)


ZERO_1 = {"stage": 1, "overlap_comm": False, "reduce_bucket_size": 50_000_000}
ZERO_3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 100_000_000,
    "stage3_param_persistence_threshold": 1_000_000,
}
OFF = {"student.drop_path": 0.0}
SWIN_B = {
    "student.architecture": "swinv2_base",
    "teacher.architecture": "swinv2_base",
    "teacher.arguments": {},
}
GPU_CASES = (
    Case("vitb", "fd_clip_vitb16", OFF, 256, ZERO_1),
    Case("vitl", "fd_clip_vitl14", OFF, 128, ZERO_1),
    Case("swinv2b", "fd_swinv2g", OFF | SWIN_B, 128, ZERO_1),
    Case("swinv2g", "fd_swinv2g", OFF, 32, ZERO_1),
    Case("swinv2g_recompute", "fd_swinv2g", OFF, 64, ZERO_1, recompute=True),
    Case("swinv2g_zero3", "fd_swinv2g", OFF, 32, ZERO_3),
)


def _small(name: str, stage: int, *, world: int = 1, zero: dict[str, Any] | None = None, **rest: Any) -> Case:
    """A case for a CPU; ``name`` begins with the network's."""
    network = SMALL_SWIN if name.startswith("swin") else SMALL_VIT
    changes = OFF | network | rest.pop("changes", {})
    # A gathered weight is held as long as any other of its bucket: small buckets, as for large networks.
    common: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 500_000}
    if stage == 3:
        common |= {"stage3_prefetch_bucket_size": 100_000, "stage3_param_persistence_threshold": 1000}
    recipe = "fd_swinv2t" if name.startswith("swin") else "fd_clip_vitb16"
    images = 32 if name.startswith("swin") else 16
    return Case(name, recipe, changes, images, common | (zero or {}), False, world=world, **rest)


SMALL_VIT: dict[str, Any] = {
    "student.architecture": "vit_small_patch16",
    "student.input_size": 96,
    "student.arguments": {"depth": 6},
    "teacher.architecture": "vit_small_patch16_224",
    "teacher.input_size": 96,
    "teacher.arguments": {"depth": 6},
}
NARROW: dict[str, Any] = {"width": 48, "num_heads": [2, 4, 8, 16]}
SMALL_SWIN: dict[str, Any] = {
    "student.input_size": 64,
    "student.arguments": {"position_bias": "stage", **NARROW},
    "teacher.input_size": 64,
    "teacher.arguments": NARROW,
}
AVERAGED = {"optim.average_decay": 0.999}
ON_HOST = {"device": "cpu"}
CPU_CASES = (
    _small("vit_zero0", 0),
    _small("vit_zero1_ema", 1, changes=AVERAGED),
    _small("vit_zero3_all_offloaded", 3, zero={"offload_optimizer": ON_HOST, "offload_param": ON_HOST}),
    _small("swin_every_second_block", 0, recompute={"every": 2}),
    _small("swin_stage_3_recomputed", 2, recompute={"stages": [2]}),
    _small("vit_zero1_ema_x2", 1, world=2, changes=AVERAGED),
    _small("vit_zero2_accumulated_x2", 2, world=2, accumulation=2),
    _small("vit_zero2_offloaded_x2", 2, world=2, zero={"offload_optimizer": ON_HOST}),
    _small("vit_zero3_x2", 3, world=2),
    _small("vit_zero3_teacher_in_shares_x2", 3, world=2, teacher="shard"),
    _small("vit_zero1_teacher_in_shares_x2", 1, world=2, teacher="shard"),
    _small(
        "vit_zero3_all_offloaded_x2",
        3,
        world=2,
        zero={"offload_optimizer": ON_HOST, "offload_param": ON_HOST},
    ),
    _small("vit_zero3_two_level_x2", 3, world=2, zero={"zero_hpz_partition_size": 2}),
    _small(
        "swin_zero3_recomputed_teacher_in_shares_ema_x2",
        3,
        world=2,
        recompute=True,
        teacher="shard",
        changes=AVERAGED,
    ),
)
"""Of float32 networks of 11 (ViT) and 7 (Swin V2) million parameters, so that weights and activations weigh
about the same."""
