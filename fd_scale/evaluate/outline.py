"""What would this fine-tuning or probe be? Its effective hyper-parameters, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from fd_scale.engine.lars import MOMENTUM
from fd_scale.errors import RecipeError
from fd_scale.run import presets, scale
from fd_scale.run.transfer import TransferRecipe
from fd_scale.run.world import place


def outline(recipe: TransferRecipe) -> Table:
    """A table of two columns; the number of processes is the one that the launcher says."""
    table = Table(title=f"{recipe.run_name} (dry run)", show_header=False, title_justify="left", box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(recipe):
        table.add_row(name, text)
    return table


def rows(recipe: TransferRecipe) -> Iterator[tuple[str, str]]:
    """Names and values."""
    start, head, optim, augment = recipe.start, recipe.head, recipe.optim, recipe.augment
    yield "start", f"{start.network}, {start.weights} weights, {start.input_size or 'its own'} px"
    yield "position", start.position
    frozen = ["patch embedding"] * start.freeze_stem + [f"{start.freeze_blocks} blocks"] * (
        start.freeze_blocks > 0
    )
    yield "frozen", "everything but the head" if recipe.task == "linear" else ", ".join(frozen) or "nothing"
    yield "drop path", f"{start.drop_path:g}"
    yield "head", f"{head.feature}, {head.order}, {head.init} weights, std {0.02 * head.init_scale:g}"
    yield from _optimizer_rows(recipe)
    yield (
        "layer decay",
        f"{optim.layer_decay:g}, floors {'scaled too' if recipe.scaled_floor else 'absolute'}",
    )
    yield (
        "weight decay",
        f"{optim.weight_decay:g}{'' if optim.decay_position else ', none of position tables'}",
    )
    yield "clip", "none" if optim.clip_norm is None else f"{optim.clip_norm:g}"
    yield "EMA", "none" if optim.average_decay is None else f"{optim.average_decay:g}, measured"
    yield "mixup, cutmix", f"{augment.mixup:g}, {augment.cutmix:g}, probability {augment.mix_prob:g}"
    yield "RandAug", augment.randaug or "none"
    yield "erasing", f"{augment.erase:g}, noise per pixel"
    yield "smoothing", f"{augment.smoothing:g}"
    yield (
        "crop",
        f"{recipe.view.crop_scale[0]:g} to {recipe.view.crop_scale[1]:g}, {recipe.view.interpolation}",
    )
    yield "measured", f"crop {recipe.measure.crop_pct:g}, weights of the {_selected(recipe)}"
    released = "ImageNet in training, CLIP in the test (compat.released_code)"
    yield "normalisation", released if recipe.compat.released_code else "the network's own"
    yield "seed", str(recipe.seed)


def _selected(recipe: TransferRecipe) -> str:
    return "last step" if recipe.measure.select == "last" else "save that is best on data.held_out"


def _optimizer_rows(recipe: TransferRecipe) -> Iterator[tuple[str, str]]:
    optim, schedule = recipe.optim, recipe.schedule
    betas = ", ".join(f"{beta:g}" for beta in optim.betas)
    how = f"momentum {MOMENTUM:g}" if optim.algorithm == "lars" else f"betas {betas}, eps {optim.eps:g}"
    yield "optimizer", f"{optim.algorithm}, {how}"
    yield "peak lr", f"{optim.lr:g} at batch {recipe.global_batch:,}{_reference(recipe)}"
    yield "first, last lr", f"{schedule.warmup_lr:g}, {schedule.min_lr:g}"
    yield "images", f"{schedule.images:,}, the first {schedule.warmup_images:,} of them warm-up"
    yield "steps", f"{recipe.steps:,}, the first {recipe.warmup_steps:,} of them warm-up"
    processes = place().size
    resolved = scale.resolve(scale.load(recipe.scale), recipe, processes)
    yield (
        "global batch",
        f"{recipe.global_batch:,} = {processes} processes x {resolved.micro_batch} images x "
        f"{resolved.accumulation} accumulated",
    )


def _reference(recipe: TransferRecipe) -> str:
    """The preset's own rate, and how it follows the batch."""
    try:
        preset = presets.find(recipe.name)
    except RecipeError:
        return ""
    return f" (preset: {preset.lr:g} at {preset.batch:,}, rule {preset.rule})"
