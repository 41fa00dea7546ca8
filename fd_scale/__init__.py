"""Large-scale feature distillation of vision foundation models."""

__version__ = "0.1.0"
