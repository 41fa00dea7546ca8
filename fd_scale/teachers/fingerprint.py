"""Which teacher was it? A record that goes into a run, and what differs between two of them.

The record holds everything that decides a feature: architecture, weights, preprocessing and the point where
the map is taken. How the run computes it (device, precision, sharding) is no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PROVENANCE = "weights"
"""The file or tag that weights came from: recorded, but equal tensors under another name are the same
teacher."""

NOT_LOADED = "not loaded"


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of all tensors, in the order of their names; a network
    that was only outlined on the meta device has ``NOT_LOADED``."""
    if any(tensor.is_meta for tensor in state.values()):
        return NOT_LOADED
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # Through one flat dimension, since a scalar cannot be viewed as bytes.
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def fingerprint(state: Mapping[str, Tensor], **facts: Any) -> dict[str, Any]:
    """The record of a teacher with these tensors, in the form that JSON gives back: tuples are lists."""
    record: dict[str, Any] = json.loads(json.dumps(facts))
    return record | {"sha256": digest(state)}


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes two records two teachers, one line each; empty for the same teacher."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        before, after = saved.get(key), now.get(key)
        if before == after or key == PROVENANCE:
            continue
        if key == "sha256":
            origins = saved.get(PROVENANCE), now.get(PROVENANCE)
            lines.append(f"the weights themselves (sha256 {_short(before)} of {origins[0]!r}, ")
            lines[-1] += f"now {_short(after)} of {origins[1]!r})"
        else:
            lines.append(f"{key} was {before!r}, now {after!r}")
    return lines


def _short(sha256: Any) -> str:
    return str(sha256)[:12]
