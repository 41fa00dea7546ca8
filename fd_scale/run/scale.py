"""How does a run fit the hardware: a file of ``ds_configs`` and a recipe become the dict that DeepSpeed gets.

A scale is a legal DeepSpeed file with one section of ours, ``"fd_scale"``, taken out before DeepSpeed sees
it. It says nothing that belongs to the recipe, and nothing that follows from the two: accumulation, train
batch size and clipping are derived here. Which keys it may hold is said in ``ds_keys.py``, and what they mean
in ``ds_configs/README.md``. DeepSpeed is not imported: a dry run needs none of it.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from fd_scale.errors import ScaleError, near_misses
from fd_scale.run.ds_keys import OWN_SECTION, problems
from fd_scale.run.recipe import RunRecipe, streams_of

MICRO_BATCH = "train_micro_batch_size_per_gpu"

Placement = Literal["replicate", "shard"]
AskedPlacement = Literal["replicate", "shard", "auto"]

FIXED: Mapping[str, Any] = {
    # The optimizer is built by fd_scale: torch's AdamW, also when its state is offloaded.
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
    # On by default, and then it synchronises the device in every forward and backward pass.
    "timers": {"throughput": {"enabled": False}},
}
"""What every run tells DeepSpeed."""


@dataclass(frozen=True)
class Scale:
    """A checked file of ``ds_configs``: ``deepspeed`` is its part for DeepSpeed, ``source`` its path."""

    name: str
    source: str
    deepspeed: Mapping[str, Any]
    activation_checkpointing: bool
    granularity: Mapping[str, Any] = field(default_factory=dict)
    teacher: AskedPlacement = "replicate"
    compile: bool = False
    loss_chunk_tokens: int | None = None


@dataclass(frozen=True)
class Resolved:
    """What DeepSpeed gets for a recipe on so many processes, and the facts in it that others ask for."""

    ds_config: dict[str, Any]
    micro_batch: int
    """Images per process in one forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    zero_stage: int
    bf16: bool
    """Whether the engine computes in bf16 (with float32 master weights), or in float32."""
    activation_checkpointing: bool
    granularity: Mapping[str, Any] = field(default_factory=dict)
    """Which blocks are recomputed: arguments of a model's ``set_grad_checkpointing``."""
    teacher: AskedPlacement = "replicate"
    """Whether each process holds the whole teacher or a share of it; ``auto`` until ``plan.placement`` has
    decided."""
    compile: bool = False
    """Whether the blocks of student and teacher are compiled."""
    loss_chunk_tokens: int | None = None
    """How many tokens of a projected map exist at a time; None for the whole map."""
    averages: bool = False
    """Whether a float32 moving average of the weights is kept beside them (the recipe's)."""

    @property
    def own(self) -> dict[str, Any]:
        """What the section of ours came to, as it could be written there."""
        recomputed = dict(self.granularity) if self.activation_checkpointing and self.granularity else None
        pieces = {} if self.loss_chunk_tokens is None else {"loss_chunk_tokens": self.loss_chunk_tokens}
        return {
            "activation_checkpointing": recomputed or self.activation_checkpointing,
            "teacher": self.teacher,
            "compile": self.compile,
            **pieces,
        }


def names() -> list[str]:
    """The scales that come with fd_scale."""
    files = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in files if name.endswith(".json"))


def load(name_or_path: str) -> Scale:
    """The scale of this name in ``ds_configs``, or at a path that ends in ``.json``; fully checked.

    Raises ``ScaleError`` for an unknown name, a file that is not JSON, and each key or value that may not be.
    """
    source = _locate(name_or_path)
    values = _read(source)
    wrong = [*problems(values), *_impossible_pairs(values)]
    if MICRO_BATCH not in values:
        wrong.append(f"{MICRO_BATCH} is missing: images per process in one forward pass")
    if wrong:
        raise ScaleError("\n".join(f"{source}: {problem}" for problem in wrong))
    own = values.pop(OWN_SECTION, {})
    recomputed = own.get("activation_checkpointing", False)
    return Scale(
        name=source.name.removesuffix(".json"),
        source=str(source),
        deepspeed=values,
        activation_checkpointing=bool(recomputed),
        granularity=recomputed if isinstance(recomputed, dict) else {},
        teacher=own.get("teacher", "replicate"),
        compile=own.get("compile", False),
        loss_chunk_tokens=int(own["loss_chunk_tokens"]) if "loss_chunk_tokens" in own else None,
    )


def resolve(scale: Scale, recipe: RunRecipe, world_size: int) -> Resolved:
    """The DeepSpeed dict of ``recipe`` at ``scale`` on ``world_size`` processes.

    Accumulation is global batch / (micro-batch x world size). Raises ``ScaleError`` where that is not whole,
    or where the streams of the data cannot be dealt out evenly; the message lists the sizes that work.
    """
    micro_batch = int(scale.deepspeed[MICRO_BATCH])
    if not _fits(scale, recipe.global_batch, world_size, micro_batch):
        raise ScaleError(_what_works(scale, recipe.global_batch, world_size, micro_batch))
    accumulation = recipe.global_batch // (micro_batch * world_size)
    own_copy = json.loads(json.dumps({**scale.deepspeed, **FIXED}))
    return Resolved(
        ds_config=own_copy
        | {
            MICRO_BATCH: micro_batch,
            "train_batch_size": recipe.global_batch,
            "gradient_accumulation_steps": accumulation,
            # DeepSpeed's default is 1.0, and 0 its word for no clip.
            "gradient_clipping": recipe.optim.clip_norm or 0.0,
        },
        micro_batch=micro_batch,
        accumulation=accumulation,
        zero_stage=_zero_stage(scale.deepspeed),
        bf16=_bf16(scale.deepspeed),
        activation_checkpointing=scale.activation_checkpointing,
        granularity=scale.granularity,
        teacher=scale.teacher,
        compile=scale.compile,
        loss_chunk_tokens=scale.loss_chunk_tokens,
        averages=recipe.optim.average_decay is not None,
    )


def _folder() -> Traversable:
    return importlib.resources.files("ds_configs")


def _locate(name_or_path: str) -> Traversable:
    if name_or_path.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            raise ScaleError(f"scale file {path} does not exist (scales by name: {', '.join(names())})")
        return path
    if name_or_path not in names():
        guess = near_misses(name_or_path, names())
        raise ScaleError(
            f"unknown scale {name_or_path!r}{guess} (scales: {', '.join(names())}; a path ends in .json)"
        )
    return _folder() / f"{name_or_path}.json"


class _DuplicateKeyError(Exception):
    """A key that occurs twice in one object."""


def _read(source: Traversable) -> dict[str, Any]:
    try:
        values = json.loads(source.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (json.JSONDecodeError, UnicodeDecodeError, _DuplicateKeyError) as error:
        raise ScaleError(f"{source} is not proper JSON: {error}") from None
    except OSError as error:
        raise ScaleError(f"{source} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise ScaleError(f"{source} holds {type(values).__name__}, expected an object")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _DuplicateKeyError(f"key {key!r} occurs twice in one object")
        values[key] = value
    return values


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section, or nothing where it is absent or (reported elsewhere) no object."""
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _zero_stage(values: Mapping[str, Any]) -> int:
    return int(_section(values, "zero_optimization").get("stage", 0))


def _bf16(values: Mapping[str, Any]) -> bool:
    return _section(values, "bf16").get("enabled", False) is True


def _impossible_pairs(values: Mapping[str, Any]) -> Iterator[str]:
    """Values that are legal one by one and not together."""
    zero = _section(values, "zero_optimization")
    stage, bf16 = zero.get("stage", 0), _bf16(values)
    accumulates = _section(values, "data_types").get("grad_accum_dtype")
    if stage != 3 and zero.get("zero_hpz_partition_size", 1) != 1:
        yield f"zero_optimization.zero_hpz_partition_size needs stage=3, not stage={stage}"
    if stage != 3 and _section(zero, "offload_param").get("device") == "cpu":
        yield f"zero_optimization.offload_param needs stage 3, not stage={stage}"
    own = _section(values, OWN_SECTION)
    if own.get("compile") is True and (stage == 3 or own.get("teacher", "replicate") != "replicate"):
        yield (
            f"{OWN_SECTION}.compile=true goes with whole parameters: stage 0, 1 or 2 and "
            f'{OWN_SECTION}.teacher="replicate"; the hooks by which DeepSpeed gathers shares break the '
            "compiled code into pieces"
        )
    if stage == 0 and _section(zero, "offload_optimizer").get("device") == "cpu":
        yield "zero_optimization.offload_optimizer needs stage 1, 2 or 3, not stage=0"
    if accumulates == "bf16" and not bf16:
        yield 'data_types.grad_accum_dtype="bf16" needs bf16.enabled=true'
    if accumulates == "fp32" and bf16 and stage == 0:
        yield 'data_types.grad_accum_dtype="fp32" with bf16.enabled=true needs stage 1, 2 or 3, not stage=0'


def _fits(scale: Scale, global_batch: int, world_size: int, micro_batch: int) -> bool:
    replicas = int(_section(scale.deepspeed, "zero_optimization").get("zero_hpz_partition_size", 1))
    return (
        global_batch % (world_size * micro_batch) == 0
        and streams_of(global_batch) % world_size == 0
        and world_size % min(replicas, world_size) == 0
    )


def _what_works(scale: Scale, global_batch: int, world_size: int, micro_batch: int) -> str:
    sizes = _divisors(global_batch)
    worlds = [size for size in sizes if _fits(scale, global_batch, size, micro_batch)]
    micro_batches = [size for size in sizes if _fits(scale, global_batch, world_size, size)]
    return (
        f"global_batch={global_batch} cannot be shared evenly by {world_size} processes with "
        f"{MICRO_BATCH}={micro_batch} ({scale.source})\n"
        f"  with this micro-batch, numbers of processes that work: {_listed(worlds)}\n"
        f"  with {world_size} processes, micro-batches that work: {_listed(micro_batches)}\n"
        "change the number of processes, the micro-batch in that file, or the recipe's scale or global_batch"
    )


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})
