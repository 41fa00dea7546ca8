"""Where DeepSpeed keeps the float32 weights and Adam moments of each parameter, for every ZeRO stage alike.

ZeRO flattens parameters into buffers and gives each rank a part. A ``Fragment`` says which elements of which
parameter lie in which buffer of this rank; checkpoints, export and averages read and write through it and
know no stage. With ``ahead.py`` it is all that looks into DeepSpeed's optimizers; it was written against
0.19.8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ADAM = ("exp_avg", "exp_avg_sq")
"""Adam's state per element."""


@dataclass(frozen=True)
class Fragment:
    """Elements ``start : start + numel`` of a flattened parameter, held by this rank in ``buffer`` at
    ``offset``.

    ``buffer`` is the float32 tensor that the inner optimizer updates, and the key of its state.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    buffer: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The fragment's elements of ``buffer`` or of a state tensor shaped like it; a flat view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was handed to DeepSpeed."""
    return engine.basic_optimizer


def moments(engine: Any) -> tuple[str, ...]:
    """Names of the optimizer's state per element: Adam's, or what another optimizer says of itself."""
    return getattr(inner_optimizer(engine), "moments", ADAM)


def fragments(engine: Any) -> list[Fragment]:
    """Every fragment of this rank, in the order of the module's parameters; frozen parameters have none."""
    names = {
        id(parameter): name for name, parameter in engine.module.named_parameters() if parameter.requires_grad
    }
    found = {fragment.name: fragment for fragment in _locate(engine, names)}
    return [found[name] for name in names.values() if name in found]


def replicated(engine: Any) -> bool:
    """Whether every rank holds every fragment (stage 0), so that one rank's copy is the whole."""
    return engine.zero_optimization_stage() == 0


def _locate(engine: Any, names: dict[int, str]) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        yield from _stage_3(optimizer, names, engine.global_rank)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        yield from _partitioned(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    elif hasattr(optimizer, "fp32_groups_flat_partition"):
        yield from _partitioned(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    elif hasattr(optimizer, "fp32_groups"):
        yield from _replicated_bf16(optimizer.fp16_groups, optimizer.fp32_groups, names)
    else:
        yield from _plain(optimizer, names)


def _stage_3(optimizer: Any, names: dict[int, str], rank: int) -> Iterator[Fragment]:
    for group in optimizer.fp16_groups:
        for parameter in group:
            index, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = rank * share
            numel = min(share, parameter.ds_numel - start)
            if numel > 0:
                buffer = optimizer.fp32_partitioned_groups_flat[index]
                yield Fragment(names[id(parameter)], tuple(parameter.ds_shape), start, numel, buffer, offset)


def _partitioned(groups: list[Any], buffers: list[Tensor], names: dict[int, str]) -> Iterator[Fragment]:
    for group, buffer in zip(groups, buffers, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Fragment(
                    names[id(parameter)], tuple(parameter.shape), low.start, low.numel, buffer, high.start
                )


def _replicated_bf16(groups: list[Any], masters: list[Any], names: dict[int, str]) -> Iterator[Fragment]:
    for group, buffers in zip(groups, masters, strict=True):
        for parameter, buffer in zip(group, buffers, strict=True):
            yield Fragment(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), buffer, 0)


def _plain(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[Fragment]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield Fragment(names[id(parameter)], tuple(parameter.shape), 0, parameter.numel(), parameter, 0)


def create_moments(engine: Any, steps_taken: int) -> None:
    """Give every buffer zero moments and its own step counter, as if ``steps_taken`` Adam steps had been
    made."""
    inner = inner_optimizer(engine)
    for fragment in fragments(engine):
        buffer = fragment.buffer
        inner.state[buffer] = {
            "step": torch.tensor(float(steps_taken), device=buffer.device),
            **{key: torch.zeros_like(buffer, memory_format=torch.preserve_format) for key in moments(engine)},
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def steps_taken(engine: Any) -> int:
    """How many Adam steps were applied: every buffer agrees, or the optimizer is broken."""
    counts = {int(state["step"]) for state in inner_optimizer(engine).state.values()}
    if len(counts) > 1:
        raise RuntimeError(f"Adam step counters differ between buffers: {sorted(counts)}")
    return counts.pop() if counts else 0


def refresh_parameters(engine: Any) -> None:
    """Copy the float32 weights into the parameters of the module, on every rank. Collective."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        _refresh_stage_3(optimizer)
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        parameters = dict(engine.module.named_parameters())
        for fragment in fragments(engine):
            parameters[fragment.name].data.copy_(fragment.of(fragment.buffer).view(fragment.shape))


def _refresh_stage_3(optimizer: Any) -> None:
    optimizer.checkpoint_event_prologue()
    for index, buffer in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(buffer.data)
        optimizer._unflatten_partitioned_parameters(index)
    optimizer.checkpoint_event_epilogue()
