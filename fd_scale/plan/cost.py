"""What does a run cost: hours, GPU-hours, energy, money, and what its checkpoints take?"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fd_scale.plan.cluster import Cluster
from fd_scale.run.recipe import Recipe

CHECKPOINT_BYTES = 12
"""Per trainable parameter: weights and both moments of Adam in float32."""
EMA_BYTES = 4


@dataclass(frozen=True)
class Prices:
    """What the user pays, and what is assumed where nobody says."""

    gpu_hour: float | None = None
    """Money per GPU-hour, in any currency."""
    kwh: float | None = None
    """Money per kWh."""
    overhead: float = 1.3
    """Energy of the whole, hosts and cooling included, over that of the GPUs at their limit."""
    disk_gb_s: float = 2.0
    """Rate at which all processes together write a checkpoint, GB/s."""
    decode_images_per_core_s: float = 150.0
    """Photographs that one CPU core decodes, crops and resizes, images/s."""


@dataclass(frozen=True)
class Cost:
    """The whole run."""

    images_per_s: float
    hours: float
    gpu_hours: float
    energy_kwh: float
    rent: float | None
    energy_price: float | None
    num_starts: int | None
    """How often the batch script's time limit makes it start."""
    decode_cores_per_gpu: float
    checkpoint_bytes: int
    checkpoint_s: float


def cost(
    recipe: Recipe, cluster: Cluster, step_s: float, num_parameters: int, prices: Prices, *, ema: bool
) -> Cost:
    """From the time of one optimizer step, seconds."""
    hours = recipe.steps * step_s / 3600
    gpu_hours = hours * cluster.num_gpus
    energy = gpu_hours * cluster.gpu.power_w / 1000 * prices.overhead
    rate = recipe.global_batch / step_s
    size = (CHECKPOINT_BYTES + (EMA_BYTES if ema else 0)) * num_parameters
    limit = cluster.time_limit_s
    return Cost(
        images_per_s=rate,
        hours=hours,
        gpu_hours=gpu_hours,
        energy_kwh=energy,
        rent=None if prices.gpu_hour is None else gpu_hours * prices.gpu_hour,
        energy_price=None if prices.kwh is None else energy * prices.kwh,
        num_starts=None if not limit else math.ceil(hours * 3600 / limit),
        decode_cores_per_gpu=rate / cluster.num_gpus / prices.decode_images_per_core_s,
        checkpoint_bytes=size,
        checkpoint_s=size / (prices.disk_gb_s * 1e9),
    )
