"""The parts of a recipe, one class each: their fields, defaults and what each alone may hold.

A field's docstring says what it means and in which unit. What must fit together across parts, and how a
recipe is read, changed and recorded, is the business of ``recipe``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

IMAGENET_1K_IMAGES = 1_281_167
"""Training images of ImageNet-1K: the papers' epoch."""

Beta = Annotated[float, Field(ge=0, lt=1)]
Scalar = bool | int | float | str | tuple[int, ...] | None


class Section(BaseModel):
    """A frozen, strict part of a recipe: unknown keys and wrong types are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Student(Section):
    """The network that is trained, from random weights unless it is given some."""

    architecture: str
    """A name of ``models`` (``vit_base_patch16``), or ``timm:NAME`` for any timm backbone."""
    input_size: PositiveInt = 224
    """Side of the square input, pixels."""
    position: Literal["shared_rpb", "rpb", "ape"] | None = "shared_rpb"
    """Position encoding of a ViT of ``models`` (``vit_*``); ``null`` for other families."""
    layer_scale: PositiveFloat | None = 0.1
    """Initial LayerScale of a ViT of ``models`` (released code, ``VIT.INIT_VALUES``); ``null`` for none
    and for other families."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block, linear over depth; the student only."""
    arguments: dict[str, Scalar] = {}
    """Further arguments of the architecture, by its own names."""
    weights: str | None = None
    """A .safetensors file of this very architecture to begin with; ``null`` for random weights, as in the
    papers."""


class Teacher(Section):
    """The frozen network whose feature map is regressed."""

    library: Literal["timm", "open_clip", "models"]
    """Where the architecture lives; ``models`` is this project's own package."""
    architecture: str
    """Its name there, without a weights tag."""
    weights: str
    """A tag of the library's hub, a local file (.safetensors, .pth, .pt), or ``random`` (trials only)."""
    input_size: PositiveInt | None = None
    """Side of its square input, pixels; ``null`` takes the size it was trained at."""
    arguments: dict[str, Scalar] = {}
    """Further arguments of the architecture, by the library's own names."""
    final_norm: bool = True
    """Whether its last map is taken after its final norm, as in the papers; not for ``open_clip``."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth rate of its last block while it teaches (a row of the papers' ablation; their teachers
    have none); not for ``open_clip``."""


class Color(Section):
    """Colour augmentation of the view, the same for all networks: torchvision's ColorJitter, then grey."""

    jitter: float = Field(default=0.0, ge=0, le=1)
    """Probability that brightness, contrast, saturation and hue are changed."""
    brightness: float = Field(default=0.4, ge=0)
    """Largest change of the factor: it is drawn from 1 - this to 1 + this, not below 0."""
    contrast: float = Field(default=0.4, ge=0)
    saturation: float = Field(default=0.4, ge=0)
    hue: float = Field(default=0.1, ge=0, le=0.5)
    """Largest turn to either side, of a full circle."""
    grey: float = Field(default=0.0, ge=0, le=1)
    """Probability that all colour is taken away."""

    @property
    def is_on(self) -> bool:
        """Whether any view is changed."""
        return self.jitter > 0 or self.grey > 0


class View(Section):
    """The one view that all networks see."""

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.08, 1.0)
    """Smallest and largest share of the image's area that a crop covers."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Antialiased resampling of the crop."""
    exif: Literal["ignore", "apply"] = "ignore"
    """The EXIF orientation; teachers were trained without it."""
    shrink: bool = True
    """Decode a JPEG at 1/2 of its size where the crop keeps the pixels of the largest view, at 1/4 or 1/8
    where it keeps twice as many. The crop is snapped to whole pixels of the small image."""
    color: Color = Color()

    @model_validator(mode="after")
    def _ranges(self) -> View:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}={low, high} must rise")
        if self.crop_scale[1] > 1:
            raise ValueError(f"crop_scale={self.crop_scale} must end at 1 or below")
        return self


class Objective(Section):
    """What is regressed on what (FD paper, section 3)."""

    target: Literal["whiten", "l2", "l2_scaled", "none"] = "whiten"
    """Normalisation of each teacher token: mean 0 and variance 1 over channels, unit length, length
    sqrt(channels), or none."""
    granularity: Literal["full", "cls", "gap"] = "full"
    """The whole map, the class token alone, or the mean of the patches."""
    beta: float = Field(default=2.0, ge=0)
    """Knee of the smooth-L1 loss."""
    cls: Literal["match", "drop", "mean"] = "match"
    """The teacher's class token: regressed by the student's, left out, or by the student's mean patch."""
    cls_weight: PositiveFloat = 10.0
    """Weight of the class token in the full map (ICCV text; the released code has 1)."""
    embedding_weight: float = Field(default=0.0, ge=0)
    """Weight of a second target beside the map: the class token of a CLIP as it enters the joint embedding,
    by its cosine, through a head of its own, so that zero-shot survives (ours). 0 for none."""
    normaliser: Literal["mean", "weighted_mean"] = "mean"
    """Divide the weighted sum by the number of elements, or by the sum of their weights."""
    grid: Literal["exact", "bilinear", "bicubic"] = "exact"
    """How the student's grid reaches the teacher's: it must be equal, or it is resampled."""

    @model_validator(mode="after")
    def _pairs(self) -> Objective:
        if self.granularity == "cls" and self.cls == "drop":
            raise ValueError(
                "granularity='cls' regresses the class token, so cls='drop' leaves nothing to regress"
            )
        return self


class Optim(Section):
    """AdamW and the clip."""

    lr: PositiveFloat = 1.2e-3
    """Peak learning rate at this recipe's global batch; not rescaled when the batch changes."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(default=0.05, ge=0)
    decay_position: bool = True
    """Whether relative position tables are decayed (the released code does; FT-CLIP does not)."""
    clip_norm: PositiveFloat | None = 3.0
    """Largest global L2 norm of the gradient; ``null`` for no clip."""
    average_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay per step of a moving average of the weights (EMA), kept beside them in float32; ``null`` for
    none. Fine-tuning measures the average; a distillation exports it too, and evaluates it as ``RUN#ema``."""


class Schedule(Section):
    """Linear warm-up, then cosine, counted in images."""

    images: PositiveInt = 300 * IMAGENET_1K_IMAGES
    """Images to see, all told."""
    warmup_images: int = Field(default=10 * IMAGENET_1K_IMAGES, ge=0)
    """Images of the linear warm-up, part of ``images``."""
    warmup_lr: float = Field(default=2e-6, ge=0)
    """Learning rate of the first step."""
    min_lr: float = Field(default=2e-5, ge=0)
    """Learning rate at the end of the cosine."""

    @model_validator(mode="after")
    def _order(self) -> Schedule:
        if self.warmup_images >= self.images:
            raise ValueError(f"warmup_images={self.warmup_images:,} must be below images={self.images:,}")
        return self


class Data(Section):
    """Where the images are, and how much damage is borne."""

    shards: str | None = None
    """A folder of tar shards with its index (made by ``fd-scale shards``)."""
    sources: dict[str, PositiveFloat] = {}
    """Instead of ``shards``: several such folders, each with its sampling weight. Every global batch has the
    same number of images of each, in proportion to the weights."""
    block: PositiveInt = 256
    """Images of one stream that are shuffled among themselves; streaming without disk holds up to two such
    blocks of each stream in memory."""
    on_change: Literal["refuse", "next_epoch"] = "refuse"
    """What to do on resuming when the data set has changed: refuse, or take it from its next epoch on."""
    max_bad_fraction: float = Field(default=1e-3, ge=0, le=1)
    """Share of samples that may be unreadable before the run stops."""
    max_bad_shards: int = Field(default=0, ge=0)
    """Whole shards that may be lost while the run reads them before it stops."""

    @model_validator(mode="after")
    def _one_of(self) -> Data:
        if self.shards is not None and self.sources:
            raise ValueError(
                f"shards={self.shards!r} and sources exclude each other: set one to null or {{}}"
            )
        return self


class Habits(Section):
    """What a run does beside the science: saving, logging, reading. Not part of the fingerprint."""

    root: str = "runs"
    """Folder that holds the run directories."""
    workers: int = Field(default=2, ge=0)
    """Decoding processes per rank; 0 decodes in the training process."""
    decoder: Literal["auto", "turbojpeg", "nvimgcodec", "simplejpeg", "pillow"] = "auto"
    """What decodes JPEGs, to the same pixels; ``auto`` takes the fastest that is installed."""
    cache: str | None = None
    """Folder on this machine for copies of remote shards; ``null`` streams them without touching the disk."""
    cache_gib: PositiveFloat | None = None
    """Most that the cache may hold, GiB; the copies used longest ago go first. ``null`` for no limit."""
    allow_pipe: bool = False
    """Whether ``pipe:`` shards may be read, which run the commands that the index names."""
    log_every_steps: PositiveInt = 20
    save_every_steps: PositiveInt = 1000
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints to keep."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints at multiples of this are kept for good."""
    async_save: bool = True
    """Save in the background: training waits for a copy in host memory (12 bytes per parameter, shared by
    the ranks) instead of for the disk. ``false`` where the hosts have no room for that copy."""
    watchdog_s: PositiveFloat | None = 900.0
    """A rank that has not finished a micro-batch for so long hangs: stacks of all ranks are written, and the
    start ends. More than the longest first step and the longest save; ``null`` for no watch."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps in a row with a loss or gradient that is not finite, which change nothing, before the run stops:
    at its next log line or checkpoint, for no step in between waits to learn of it."""
    probe: str | None = None
    """A folder of labelled shards, a few thousand images, on which kNN, variance explained, rank and drift
    are measured during the run; ``null`` for none."""
    probe_every_steps: PositiveInt = 2000
    """How often, besides step 0 and the last."""
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "fd_scale"
