"""Which parameters are decayed: an explicit rule by name and shape, decided before an engine shards anything.

The rule is that of the released code (FD ``optimizer.py``): vectors, biases, class token and absolute
positions are not decayed, nor what Swin V2 learns of positions and logit scales; the projector's weight is.
Relative position tables are the recipe's choice.
"""

from __future__ import annotations

from typing import Any

from torch import nn

TOKENS = {"cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "absolute_pos_embed"}
"""Last names of learned tokens and absolute positions."""

POSITION_NETWORKS = ("cpb_mlp", "rpe_mlp", "meta_mlp", "rel_pos.mlp", "logit_scale")
"""In names of what makes a position bias, or scales logits: Swin V2, the released code, Swin V2-CR, timm's
ViTs."""

POSITION_TABLE = "relative_position_bias_table"


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_position: bool) -> list[dict[str, Any]]:
    """Trainable parameters in one group with ``weight_decay`` and one without, those that are empty left out.

    A group holds ``params``, their ``names`` in the same order, ``name`` (``decay`` or ``no_decay``) and
    its ``weight_decay``. Modules that name parameters in ``no_weight_decay()`` are heard, except for
    relative position tables, which ``decay_position`` decides. Raises ``ValueError`` for a model whose
    parameters are sharded away.
    """
    exempt = _exempt(model)
    groups: dict[bool, list[tuple[str, nn.Parameter]]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            raise ValueError(f"{name} is empty: group parameters before an engine shards them")
        if parameter.requires_grad:
            decay = is_decayed(name, parameter.ndim, exempt=exempt, decay_position=decay_position)
            groups[decay].append((name, parameter))
    return [
        {
            "name": "decay" if decay else "no_decay",
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": weight_decay if decay else 0.0,
        }
        for decay, members in groups.items()
        if members
    ]


def is_decayed(name: str, num_dimensions: int, *, exempt: set[str], decay_position: bool) -> bool:
    """Whether a parameter of this name and number of dimensions is decayed; ``exempt`` are names that never
    are."""
    last = name.rpartition(".")[2]
    if last == POSITION_TABLE:
        return decay_position
    if num_dimensions <= 1 or last == "bias" or last in TOKENS:
        return False
    return name not in exempt and not any(part in name for part in POSITION_NETWORKS)


def _exempt(model: nn.Module) -> set[str]:
    """What the modules themselves keep from decay, under the model's names."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        own = getattr(module, "no_weight_decay", None)
        if callable(own):
            names |= {f"{prefix}.{name}" if prefix else name for name in own()}
    return names
