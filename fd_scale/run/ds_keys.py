"""What may a scale say to DeepSpeed: the keys that are allowed, and the reason for each one that is refused.

DeepSpeed 0.19 ignores unknown top-level keys and takes its default for ``"auto"``, both in silence, so every
key at every level is looked up here. ``ds_configs/README.md`` explains the allowed ones; a test compares
both lists with the installed DeepSpeed, which this module does not import. How values fit together, and the
recipe, is left to ``scale.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fd_scale.errors import near_misses

OWN_SECTION = "fd_scale"
"""Section of a scale for what DeepSpeed has no key for."""


@dataclass(frozen=True)
class Kind:
    """What a value may be: its words for a message, and a test."""

    words: str
    holds: Callable[[Any], bool]


Keys = Mapping[str, "Kind | Keys"]


def _one_of(*choices: str | int) -> Kind:
    words = ", ".join(json.dumps(choice) for choice in choices[:-1]) + f" or {json.dumps(choices[-1])}"
    return Kind(words, lambda value: not isinstance(value, bool | float | list | dict) and value in choices)


def _is_whole(value: Any) -> bool:
    """Whether a number is whole and not negative; ``5e7`` is, as DeepSpeed reads it so."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0 and value == int(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_granularity(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    if not isinstance(value, dict) or not value or not value.keys() <= {"every", "stages"}:
        return False
    stages = value.get("stages", [])
    every = value.get("every", 1)
    return (
        isinstance(stages, list)
        and all(_is_whole(stage) for stage in stages)
        and _is_whole(every)
        and every >= 1
    )


FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number, 0 or more", _is_whole)
POSITIVE = Kind("a whole number, 1 or more", lambda value: _is_whole(value) and value >= 1)
NAMES = Kind("a list of names", _are_names)
OFFLOAD = Kind(
    '"none" or "cpu" (fd_scale\'s checkpoints could not find what is kept on NVMe)',
    lambda value: value in ("none", "cpu"),
)
GRANULARITY = Kind(
    'true, false, or which blocks: {"every": 2} (one block of each two), {"stages": [0, 1]}, or both',
    _is_granularity,
)

ALLOWED: Keys = {
    "train_micro_batch_size_per_gpu": POSITIVE,
    "bf16": {"enabled": FLAG, "immediate_grad_update": FLAG},
    "data_types": {"grad_accum_dtype": _one_of("fp32", "bf16")},
    "communication_data_type": _one_of("fp32", "bf16"),
    "zero_optimization": {
        "stage": _one_of(0, 1, 2, 3),
        "allgather_bucket_size": WHOLE,
        "allgather_partitions": FLAG,
        "contiguous_gradients": FLAG,
        "enable_sanity_checks": FLAG,
        "log_trace_cache_warnings": FLAG,
        "memory_efficient_linear": FLAG,
        "offload_optimizer": {"device": OFFLOAD, "pin_memory": FLAG},
        "offload_param": {"device": OFFLOAD, "pin_memory": FLAG},
        "overlap_comm": FLAG,
        "parameter_alignment": FLAG,
        "reduce_bucket_size": POSITIVE,
        "reduce_scatter": FLAG,
        "round_robin_gradients": FLAG,
        "stage3_allgather_sequential": FLAG,
        "stage3_max_live_parameters": WHOLE,
        "stage3_max_reuse_distance": WHOLE,
        "stage3_model_persistence_threshold": WHOLE,
        "stage3_param_persistence_threshold": WHOLE,
        "stage3_prefetch_bucket_size": WHOLE,
        "stage3_use_all_reduce_for_fetch_params": FLAG,
        "sub_group_size": POSITIVE,
        "use_multi_rank_bucket_allreduce": FLAG,
        "zero_hpz_partition_size": POSITIVE,
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "debug": FLAG, "prof_ops": NAMES},
    "disable_python_gc": FLAG,
    "memory_breakdown": FLAG,
    "wall_clock_breakdown": FLAG,
    OWN_SECTION: {
        "activation_checkpointing": GRANULARITY,
        "compile": FLAG,
        "loss_chunk_tokens": POSITIVE,
        "teacher": _one_of("replicate", "shard", "auto"),
    },
}
"""Every key that a scale may hold, by its place, with the kind of its value."""

_SCIENCE = "it is science, set in the recipe"

_REFUSED_FOR: Mapping[str, str] = {
    "it is derived from the recipe, the micro-batch and the world size, or fixed by fd_scale": """
        train_batch_size gradient_accumulation_steps managed_gradient_accumulation steps_per_print
        zero_allow_untested_optimizer zero_force_ds_cpu_optimizer""",
    f"{_SCIENCE} (optim)": "optimizer",
    f"{_SCIENCE} (schedule)": "scheduler",
    f"{_SCIENCE} (optim.clip_norm)": "gradient_clipping",
    f"{_SCIENCE} (seed)": "seed",
    "training is in bf16 with float32 master weights (bf16.enabled=true), or in float32": """
        fp16 torch_autocast bfloat16 bf16.bf16_master_weights_and_grads bf16.bf16_optimizer_states
        data_types.param_dtype data_types.buffer_dtype data_types.keep_in_fp32_modules""",
    "fd_scale counts the steps that are not finite, see run.max_nonfinite_steps of the recipe": """
        bf16.check_grad_overflow""",
    f"DeepSpeed's breaks where blocks share a parameter; use {OWN_SECTION}.activation_checkpointing": """
        activation_checkpointing""",
    "the throughput timer waits for the device in every forward and backward pass": "timers",
    "fd_scale reports metrics itself, see run.wandb of the recipe": "tensorboard wandb csv_monitor comet",
    "the order of the data is fd_scale's own": "dataloader_drop_last data_efficiency",
    "fd_scale writes and reads its own checkpoints": """
        checkpoint datastates zero_optimization.load_from_fp32_weights zero_optimization.elastic_checkpoint
        zero_optimization.pipeline_loading_checkpoint
        zero_optimization.stage3_gather_16bit_weights_on_model_save
        zero_optimization.stage3_gather_fp16_weights_on_model_save""",
    "fd_scale's checkpoints could not find what is kept on NVMe; offload to the host's memory": """
        aio""",
    "DeepSpeed has replaced it, use offload_param.device": "zero_optimization.cpu_offload_param",
    "parameters are on the device or in the host's memory, whole; use offload_param.device": """
        zero_optimization.offload_param.nvme_path zero_optimization.offload_param.buffer_count
        zero_optimization.offload_param.buffer_size zero_optimization.offload_param.max_in_cpu""",
    "the optimizer is on the device or in the host's memory, whole; use offload_optimizer.device": """
        zero_optimization.cpu_offload zero_optimization.cpu_offload_use_pin_memory
        zero_optimization.offload_optimizer.nvme_path zero_optimization.offload_optimizer.buffer_count
        zero_optimization.offload_optimizer.fast_init zero_optimization.offload_optimizer.pipeline_read
        zero_optimization.offload_optimizer.pipeline_write zero_optimization.offload_optimizer.ratio
        zero_optimization.offload_optimizer.super_offload
        zero_optimization.offload_optimizer.cpuadam_cores_perc""",
    "the norm of the gradient is reported, and clipped by": "zero_optimization.compute_grad_norm",
    "it breaks convolutions in DeepSpeed 0.19": "zero_optimization.stage3_module_granularity_threshold",
    "quantised communication changes the result, and training with it is known to diverge": """
        zero_optimization.zero_quantized_weights zero_optimization.zero_quantized_nontrainable_weights
        zero_optimization.zero_quantized_gradients""",
    "fd_scale does not use this part of DeepSpeed": """
        autotuning compile disable_allgather dump_state expert_parallel flops_profiler gradient_allreduce_op
        gradient_predivide_factor hybrid_engine log_level pipeline prescale_gradients
        seq_parallel_communication_data_type sequence_parallel_size tensor_parallel
        use_data_before_expert_parallelism vocabulary_size weight_quantization
        zero_optimization.ignore_unused_parameters zero_optimization.leaf_module
        zero_optimization.override_module_apply zero_optimization.save_muon_momentum_buffer_in_memory
        zero_optimization.zenflow""",
    "DeepSpeed has removed it": """
        amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
        progressive_layer_drop quantize_training sparse_attention sparse_gradients
        zero_optimization.legacy_stage1 zero_optimization.mics_hierarchical_params_gather
        zero_optimization.mics_shard_size zero_optimization.zeropp_loco_param""",
}

REFUSED: Mapping[str, str] = {
    place: reason for reason, places in _REFUSED_FOR.items() for place in places.split()
}
"""Keys that DeepSpeed has or had and a scale may not hold, by dotted place, with the reason."""


def problems(
    values: Mapping[str, Any], allowed: Keys = ALLOWED, parents: tuple[str, ...] = ()
) -> Iterator[str]:
    """What is wrong with the keys and values of a scale, one by one and at every level; a message each."""
    for key, value in values.items():
        place = ".".join((*parents, key))
        kind = allowed.get(key)
        if place in REFUSED:
            yield f"{place} may not be in a scale: {REFUSED[place]}; remove it"
        elif kind is None:
            where = f"keys of {'.'.join(parents)}" if parents else "top-level keys"
            yield f"unknown key {place!r}{near_misses(key, allowed)} ({where}: {', '.join(allowed)})"
        elif value == "auto" and not (isinstance(kind, Kind) and kind.holds(value)):
            yield f'{place}="auto" is refused: DeepSpeed would take its default in silence; write the value'
        elif isinstance(kind, Kind):
            if not kind.holds(value):
                yield f"{place}={json.dumps(value)} must be {kind.words}"
        elif not isinstance(value, dict):
            yield f"{place}={json.dumps(value)} must be an object with keys among {', '.join(kind)}"
        else:
            yield from problems(value, kind, (*parents, key))
