"""The named ways to fine-tune and to probe, side by side.

Lengths are in epochs of whatever is learnt from, learning rates absolute at a reference batch, with the rule
by which they follow another batch. Sources: FD's papers (arXiv 2205.14141, ICCV 2023) and released code,
FT-CLIP's paper (arXiv 2212.06138) and code, BEiT's code for the stage that FD's papers name and do not
describe, MAE's for the probe. Where they disagree, a preset follows the papers, and its notes say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rich.table import Table

from fd_scale.errors import RecipeError, near_misses
from fd_scale.run import transfer
from fd_scale.run.sections import IMAGENET_1K_IMAGES
from fd_scale.run.transfer import TransferRecipe

NO_MIX = {"augment.mixup": 0.0, "augment.cutmix": 0.0}
CROP_AND_FLIP = NO_MIX | {"augment.randaug": None, "augment.erase": 0.0, "augment.smoothing": 0.0}
CLIP_LIKE: Mapping[str, Any] = {
    **NO_MIX,
    "start.position": "keep",
    "start.drop_path": 0.0,
    "start.freeze_stem": True,
    "head.order": "norm_pool",
    "optim.decay_position": False,
    "optim.clip_norm": None,
    "optim.average_decay": 0.9998,
    "measure.crop_pct": 1.0,
}
"""What FT-CLIP's recipes have in common."""


@dataclass(frozen=True)
class Preset:
    """A recipe without its data and network."""

    lr: float
    """Peak at ``batch``."""
    batch: int
    """Reference global batch."""
    epochs: int
    warmup_epochs: int
    min_lr: float
    warmup_lr: float
    notes: str
    rule: Literal["linear", "none"] = "linear"
    """How learning rates follow another batch: in proportion, or not at all."""
    task: Literal["finetune", "linear"] = "finetune"
    scale: str = "vitb_1node"
    """A file of ``ds_configs``."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the recipe's further fields, by dotted name."""


FD_BASE = Preset(
    lr=5e-3,
    batch=2048,
    epochs=100,
    warmup_epochs=20,
    min_lr=2e-6,
    warmup_lr=1e-6,
    changes={"optim.layer_decay": 0.65, "optim.clip_norm": 5.0, "start.drop_path": 0.3},
    notes="FD's fine-tuning of a ViT-B. Papers: layer decay 0.65, end at 2e-6, drop path 0.1 to 0.3; the "
    "released configuration of 300 epochs has 0.60, 1e-6 and 0.3, that of 100 epochs 0.65, 1e-6 and 0.1.",
)
FT_CLIP_BASE = Preset(
    lr=6e-4,
    batch=2048,
    epochs=50,
    warmup_epochs=10,
    min_lr=1e-6,
    warmup_lr=0.0,
    rule="none",
    changes={**CLIP_LIKE, "optim.layer_decay": 0.60},
    notes="FT-CLIP's ViT-B/16 at 224: no mixing, no drop path, EMA, light decay, patch embedding frozen. Its "
    "published numbers are the best epoch on the test set; here the last step is measured, or held_out "
    "selects.",
)


def _like(preset: Preset, notes: str, changes: Mapping[str, Any] | None = None, **values: Any) -> Preset:
    return replace(preset, notes=notes, changes={**preset.changes, **(changes or {})}, **values)


BEIT_22K = Preset(
    lr=3e-3,
    batch=4096,
    epochs=90,
    warmup_epochs=5,
    min_lr=1e-6,
    warmup_lr=1e-6,
    changes={"optim.layer_decay": 0.65, "optim.clip_norm": 3.0, "start.drop_path": 0.2},
    notes="The intermediate stage on ImageNet-22K, ViT-B: BEiT's, as FD's papers name the stage and give no "
    "numbers.",
)
BEIT_22K_1K = Preset(
    lr=2e-5,
    batch=512,
    epochs=30,
    warmup_epochs=5,
    min_lr=1e-6,
    warmup_lr=1e-6,
    changes={
        "optim.layer_decay": 0.85,
        "optim.clip_norm": None,
        "start.drop_path": 0.1,
        "start.position": "keep",
        "head.init": "mapped",
    },
    notes="ImageNet-1K after ImageNet-22K, ViT-B: BEiT's; the head begins at the classes of the same wnid.",
)

PRESETS: Mapping[str, Preset] = {
    "fd_base": FD_BASE,
    "fd_large": _like(
        FD_BASE,
        "FD's fine-tuning of a ViT-L, papers and released configuration alike.",
        {"optim.layer_decay": 0.75, "start.drop_path": 0.4},
        lr=1e-3,
        epochs=50,
        warmup_epochs=5,
        warmup_lr=2e-6,
        scale="vitl_1node",
    ),
    "ftclip_base": FT_CLIP_BASE,
    "ftclip_base_384": _like(
        FT_CLIP_BASE,
        "FT-CLIP's ViT-B/16 at 384; the patch embedding is trained.",
        {"start.input_size": 384, "start.freeze_stem": False},
        lr=7e-4,
    ),
    "ftclip_large": _like(
        FT_CLIP_BASE,
        "FT-CLIP's ViT-L/14 at 224.",
        {"optim.layer_decay": 0.65},
        lr=4e-4,
        epochs=30,
        warmup_epochs=5,
        scale="vitl_1node",
    ),
    "ftclip_large_336": _like(
        FT_CLIP_BASE,
        "FT-CLIP's ViT-L/14 at 336; the patch embedding is trained.",
        {"optim.layer_decay": 0.65, "start.input_size": 336, "start.freeze_stem": False},
        lr=6e-4,
        epochs=30,
        warmup_epochs=5,
        scale="vitl_1node",
    ),
    "beit_in22k": BEIT_22K,
    "beit_in22k_large": _like(
        BEIT_22K,
        "The intermediate stage on ImageNet-22K, ViT-L: BEiT's.",
        {"optim.layer_decay": 0.75, "optim.clip_norm": 1.0},
        lr=2e-3,
        batch=2048,
        scale="vitl_1node",
    ),
    "beit_in22k_in1k": BEIT_22K_1K,
    "beit_in22k_in1k_large": _like(
        BEIT_22K_1K,
        "ImageNet-1K after ImageNet-22K, ViT-L: BEiT's; the head begins at the classes of the same wnid.",
        {"optim.layer_decay": 0.9, "start.drop_path": 0.4},
        scale="vitl_1node",
    ),
    "advanced": _like(
        FT_CLIP_BASE,
        "FD's papers report an advanced recipe and do not disclose it. This is ours: FT-CLIP's light recipe "
        "on a distilled ViT-B, with its position tables un-shared and its patch embedding trained.",
        {"start.position": "unshare", "start.freeze_stem": False, "start.drop_path": 0.1},
    ),
    "linear": Preset(
        lr=6.4,
        batch=16384,
        epochs=90,
        warmup_epochs=10,
        min_lr=0.0,
        warmup_lr=0.0,
        task="linear",
        scale="probe",
        changes={
            **CROP_AND_FLIP,
            "optim.algorithm": "lars",
            "optim.weight_decay": 0.0,
            "optim.clip_norm": None,
            "head.feature": "cls",
            "head.init_scale": 0.5,
        },
        notes="MAE's linear probe, which FD cites, of a ViT-B (50 epochs for ViT-L): LARS at 0.1 per 256 "
        "images, no decay, batch norm without affine, class token, crop and flip.",
    ),
}


def names() -> list[str]:
    """The presets there are."""
    return list(PRESETS)


def find(name: str) -> Preset:
    """The preset of this name; a ``RecipeError`` names near misses."""
    if name not in PRESETS:
        raise RecipeError(
            f"unknown preset {name!r}{near_misses(name, PRESETS)} (presets: {', '.join(PRESETS)})"
        )
    return PRESETS[name]


def recipe_of(
    name: str, *, images: int = IMAGENET_1K_IMAGES, global_batch: int | None = None
) -> TransferRecipe:
    """The recipe of a preset for a training set of so many images, at its batch or another one.

    Raises ``RecipeError`` for an unknown preset.
    """
    preset = find(name)
    batch = global_batch or preset.batch
    ratio = batch / preset.batch if preset.rule == "linear" else 1.0
    values: dict[str, Any] = {
        "name": name,
        "notes": preset.notes,
        "task": preset.task,
        "optim": {"lr": preset.lr * ratio},
        "schedule": {
            "images": preset.epochs * images,
            "warmup_images": preset.warmup_epochs * images,
            "min_lr": preset.min_lr * ratio,
            "warmup_lr": preset.warmup_lr * ratio,
        },
        "global_batch": batch,
        "scale": preset.scale,
    }
    for key, value in preset.changes.items():
        section, _, leaf = key.partition(".")
        values.setdefault(section, {})[leaf] = value
    return transfer.build(values)


def table() -> Table:
    """The presets with their notes, for the console."""
    grid = Table("preset", "lr at batch", "epochs", "what it is", box=None, pad_edge=False)
    for name, preset in PRESETS.items():
        epochs = f"{preset.epochs} ({preset.warmup_epochs})"
        grid.add_row(name, f"{preset.lr:g} at {preset.batch}", epochs, preset.notes)
    return grid
