"""Which implementation of the loss runs for these tensors, and why?"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TARGETS = ("whiten", "l2", "channel", "none")
"""What the kernel can make of a teacher token."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What the kernel reads and writes."""

MAX_CHANNELS = 16384
"""Widest row that a program keeps in registers without spilling."""

MIN_CAPABILITY = 8
"""Major compute capability from which bfloat16 is native."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "y", "yes", "true", "on"}
"""Whether kernels run in Triton's interpreter, on the CPU. Triton reads the variable when it is imported,
too."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Choice:
    """``name`` is ``triton`` or ``reference``; ``reason`` says in a sentence why, for logs and reports."""

    name: Literal["triton", "reference"]
    reason: str


def choose(prediction_BNC: Tensor, teacher_BNC: Tensor, target: str, *, loss_scaled: bool = False) -> Choice:
    """What computes the loss of these tokens: the fused Triton kernel, or the plain reference in PyTorch.

    ``loss_scaled`` says that a loss scale is given, without which the kernel writes no float16 gradient.
    Looks at shapes, dtypes and devices only: it never waits for the device, and traces under
    ``torch.compile``.
    """
    obstacle = _obstacle(prediction_BNC, teacher_BNC, target, loss_scaled)
    if obstacle:
        return Choice("reference", obstacle)
    if INTERPRETED:
        return Choice("triton", "TRITON_INTERPRET=1: the kernel runs in Triton's interpreter, for tests only")
    return Choice("triton", f"{prediction_BNC.dtype} on {prediction_BNC.device}: one pass over the features")


def device_obstacle(device: torch.device) -> str:
    """Why no Triton kernel runs on this device, or an empty string."""
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"the features are on {device}, and the kernel needs a CUDA device"
    found = torch.cuda.get_device_properties(device)
    if found.major < MIN_CAPABILITY:
        return f"{found.name} has compute capability {found.major}.{found.minor}, below {MIN_CAPABILITY}.0"
    return ""


def _obstacle(prediction_BNC: Tensor, teacher_BNC: Tensor, target: str, loss_scaled: bool) -> str:
    """Why the kernel cannot run, or an empty string."""
    if target not in TARGETS:
        return f"no kernel makes target {target!r} (there are {', '.join(TARGETS)})"
    for name, tokens in (("prediction", prediction_BNC), ("teacher", teacher_BNC)):
        if tokens.dtype not in DTYPES:
            return f"the {name} is {tokens.dtype}, and the kernel computes in float32"
    if prediction_BNC.dtype == torch.float16 and not loss_scaled:
        return "a float16 gradient of a mean rounds to zero in the kernel unless a loss scale is given"
    if prediction_BNC.shape[-1] > MAX_CHANNELS:
        return f"{prediction_BNC.shape[-1]} channels are more than the {MAX_CHANNELS} that one program holds"
    return device_obstacle(prediction_BNC.device)
