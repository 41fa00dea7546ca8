"""What is asked of a run that learns labels: fine-tuning, or a linear probe of a frozen network.

A recipe as of distillation, with a network to start from in the place of student and teacher, and with the
choices that evaluations differ in written down: head, augmentation, which weights are measured. The named
ones are in ``presets.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from fd_scale.run import recipe as recipes
from fd_scale.run.folder import RunFolder
from fd_scale.run.recipe import RunRecipe
from fd_scale.run.sections import Data, Optim, Section
from fd_scale.run.values import read_values

Share = Annotated[float, Field(ge=0, le=1)]


class Start(Section):
    """The network that is fine-tuned or probed."""

    network: str = ""
    """A run, an exported file or a library's network, as ``fd-scale evaluate`` takes them."""
    step: int | None = None
    """Step of a run's checkpoint; ``null`` for the newest."""
    weights: Literal["raw", "average"] = "raw"
    """Of a run that averages its weights: the last ones, or their average (as ``RUN#ema``)."""
    input_size: PositiveInt | None = None
    """Side of the square input, pixels; ``null`` takes the network's own. Positions are interpolated."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block, linear over depth."""
    position: Literal["unshare", "keep"] = "unshare"
    """A relative position table that all blocks share: one copy for each block (released code), or kept."""
    freeze_stem: bool = False
    """Whether the patch embedding stays as it is (FT-CLIP at 224 pixels)."""
    freeze_blocks: int = Field(default=0, ge=0)
    """So many blocks, counted from the input, and the stem stay as they are (partial fine-tuning)."""


class Head(Section):
    """From the map to logits."""

    feature: Literal["gap", "cls"] = "gap"
    """Mean patch or class token."""
    order: Literal["pool_norm", "norm_pool"] = "pool_norm"
    """A new norm after pooling (BEiT, FD) or on every token before it (FT-CLIP)."""
    keep_norm: bool = False
    """With ``norm_pool``: the network's own final norm instead of a new one (Swin)."""
    init: Literal["new", "mapped"] = "new"
    """New weights, or those of classes of the same name (wnid) where the start is a fine-tuned run."""
    init_scale: float = Field(default=1e-3, ge=0)
    """Times truncated normal weights of std 0.02 (FD and FT-CLIP: 0.001)."""


class Augment(Section):
    """What is done to training images after crop and flip."""

    randaug: str | None = "rand-m9-mstd0.5-inc1"
    """timm's word for a RandAug policy; ``null`` for none. Colour jitter is then inert, as in timm."""
    erase: Share = 0.25
    """Probability of random erasing, by noise per pixel."""
    mixup: float = Field(default=0.8, ge=0)
    """Alpha of mixup; 0 for none."""
    cutmix: float = Field(default=1.0, ge=0)
    """Alpha of cutmix; 0 for none."""
    mix_prob: Share = 1.0
    """Probability that a batch is mixed at all."""
    switch_prob: Share = 0.5
    """Probability of cutmix where both are on."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Label smoothing."""

    @property
    def mixes(self) -> bool:
        """Whether there is mixup or cutmix."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_prob > 0


class TransferOptim(Optim):
    """The optimizer, and how fast each layer learns."""

    algorithm: Literal["adamw", "lars"] = "adamw"
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Layer-wise learning rate decay: layer i of L has this to the power L + 1 - i of the peak."""
    scaled_floor: bool = True
    """Whether first and last learning rate are scaled by layer too (the released code leaves them as they
    are, so that early layers of a ViT-L rise in the decay)."""


class Measure(Section):
    """What is measured, on which images, and when."""

    crop_pct: float = Field(default=0.875, gt=0, le=1)
    """Share of the resized image's side that the central crop keeps."""
    select: Literal["last", "held_out"] = "last"
    """Weights of the last step, or of the save with the best accuracy on ``held_out``: never on the test
    set."""


class Labelled(Data):
    """Where the images are; ``shards`` are those to learn from."""

    test: str | None = None
    """Shards to measure on, once, at the end."""
    held_out: str | None = None
    """Shards set aside from training, to select by."""


class Compat(Section):
    """Faults of published code, to reproduce its numbers and for nothing else."""

    released_code: bool = False
    """Train with ImageNet's mean and std and measure with CLIP's, as FD's released code does for every
    network; with that, first and last learning rate are not scaled by layer."""


class TransferRecipe(RunRecipe):
    """One fine-tuning or probe, whole."""

    task: Literal["finetune", "linear"]
    start: Start = Start()
    head: Head = Head()
    augment: Augment = Augment()
    optim: TransferOptim = TransferOptim()
    data: Labelled = Labelled()
    measure: Measure = Measure()
    compat: Compat = Compat()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.head.keep_norm and self.head.order != "norm_pool":
            raise ValueError("head.keep_norm=true needs head.order='norm_pool'")
        if self.measure.select == "held_out" and self.data.held_out is None:
            raise ValueError(
                "measure.select='held_out' needs data.held_out: shards that were set aside from training"
            )
        if self.task == "linear" and (self.augment.mixes or self.augment.randaug or self.augment.erase):
            raise ValueError(
                "a linear probe has crop and flip alone: set augment.randaug=null, augment.erase=0, "
                "augment.mixup=0 and augment.cutmix=0"
            )
        if self.task == "linear" and self.optim.average_decay is not None:
            raise ValueError("a linear probe measures its last weights: set optim.average_decay=null")
        if self.task == "finetune" and self.optim.algorithm == "lars":
            raise ValueError("optim.algorithm='lars' is for linear probes: set adamw")
        return self

    @property
    def scaled_floor(self) -> bool:
        """Whether first and last learning rate are scaled by layer."""
        return self.optim.scaled_floor and not self.compat.released_code

    def science(self, **how: Any) -> dict[str, Any]:
        """As of any recipe, without the places of the further shards."""
        values = super().science(**how)
        for name in ("test", "held_out"):
            values.get("data", {}).pop(name, None)
        return {name: value for name, value in values.items() if value != {}}


def build(values: dict[str, Any]) -> TransferRecipe:
    """A checked recipe from nested plain values; errors as of ``recipe.checked``."""
    return recipes.checked(TransferRecipe, values)


def of_run(path: Path) -> TransferRecipe | None:
    """The recipe of a run directory that learnt labels, or None for one of a distillation.

    Raises ``RunError`` where there is no run, ``RecipeError`` for a damaged recipe.
    """
    values = read_values(RunFolder.at(path).recipe)
    return build(values) if "task" in values else None
