"""What is regressed on what: feature maps, their normalised targets, and the loss between them."""

from fd_scale.objective.features import Features
from fd_scale.objective.losses import Objective, whitened_smooth_l1

__all__ = ["Features", "Objective", "whitened_smooth_l1"]
