"""Teachers small enough for a test, and the pixels they see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torchvision.transforms.functional as TF
from safetensors.torch import save_file
from torch import Tensor, nn

from fd_scale.run import recipe as recipes
from fd_scale.teachers import Teacher, load

VIT: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
CLIP_VISION: dict[str, Any] = {"width": 24, "layers": 2, "head_width": 12, "patch_size": 16}


def spec(
    architecture: str, weights: object = "random", library: str = "timm", **more: Any
) -> recipes.Teacher:
    return recipes.Teacher(library=library, architecture=architecture, weights=str(weights), **more)  # type: ignore[arg-type]


def loaded(asked: recipes.Teacher, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    teacher: Teacher = load(asked, device="cpu", dtype=dtype, seed=seed)
    return teacher


def pixels(side: int, batch: int = 2, seed: int = 0) -> Tensor:
    """uint8 (B, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)


def as_upstream(values: Tensor, mean: Any, std: Any) -> Tensor:
    """Pixels as torchvision's ToTensor and Normalize give them."""
    return TF.normalize(values.float() / 255, list(mean), list(std))


def shaken(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, with every weight and running statistic moved, so that no initial zero or one
    hides a fault."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point() and not name.endswith("relative_coords_table"):
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.add_(noise.abs() if "running_var" in name else noise)
    return network.eval()


def saved(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path
