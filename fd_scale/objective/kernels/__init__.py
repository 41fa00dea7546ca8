"""Fused kernels, each beside the plain reference that is its oracle; ``choose`` says which runs, and why."""

from fd_scale.objective.kernels.choice import Choice, choose
from fd_scale.objective.kernels.whitened_smooth_l1 import (
    ChannelStatistics,
    Loss,
    TeacherNorm,
    loss_and_gradient,
    scaled,
    whitened_smooth_l1,
)

__all__ = [
    "ChannelStatistics",
    "Choice",
    "Loss",
    "TeacherNorm",
    "choose",
    "loss_and_gradient",
    "scaled",
    "whitened_smooth_l1",
]
