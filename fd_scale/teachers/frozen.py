"""What a teacher is, and the one way to freeze a network into it.

The libraries' files build networks and load weights; from there on all teachers are alike.

Shape letters: B images, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fd_scale.errors import TeacherError
from fd_scale.objective.features import Features
from fd_scale.pixels import normalise
from fd_scale.teachers.fingerprint import digest, fingerprint

Read = Callable[[nn.Module, Tensor], Features]
"""A network and normalised pixels (B, 3, S, S) to its map, after the final norm on all tokens and before any
projection."""


@dataclass(frozen=True, eq=False)
class Projection:
    """CLIP's last matrix, which no map goes through; kept beside the network, in float32."""

    weight_DE: Tensor

    def __call__(self, tokens_BD: Tensor) -> Tensor:
        """(B, E), in float32."""
        return tokens_BD.float() @ self.weight_DE

    @property
    def width(self) -> int:
        """Channels of the joint embedding."""
        return self.weight_DE.shape[1]

    @property
    def sha256(self) -> str:
        """Digest of the matrix."""
        return digest({"projection": self.weight_DE})


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen network that gives feature maps; made by ``freeze``, whole on its device."""

    name: str
    """For messages."""
    network: nn.Module
    """The network, or the engine that holds it in shares (``sharded``)."""
    read: Read
    dtype: torch.dtype
    input_size: int
    """Side of the square input, pixels."""
    mean: tuple[float, ...]
    """Subtracted from pixels in [0, 1], per colour."""
    std: tuple[float, ...]
    """Divided by after that, per colour."""
    width: int
    """Channels of a token."""
    grid: tuple[int, int]
    """(height, width) in patches."""
    num_prefix_tokens: int
    """Tokens before the grid, the class token first; 0 when there is no class token."""
    fingerprint: dict[str, Any]
    """What decides its features, as JSON (``fingerprint.difference``)."""
    projection: Projection | None = None
    """Where the teacher is a CLIP: from its class token after the norm to the joint embedding."""

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Features:
        """The map of uint8 pixels (B, 3, S, S), in ``dtype``. Raises ``ValueError`` for another size."""
        if pixels.shape[-2:] != (self.input_size, self.input_size):
            raise ValueError(
                f"pixels of shape {tuple(pixels.shape)} reached teacher {self.name}, which takes "
                f"{self.input_size} x {self.input_size}"
            )
        return self.read(self.network, normalise(pixels, self.mean, self.std, self.dtype))


def freeze(
    network: nn.Module,
    read: Read,
    *,
    device: torch.device,
    dtype: torch.dtype,
    library: str,
    architecture: str,
    arguments: Mapping[str, Any],
    weights: str,
    feature_point: str,
    input_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    projection_DE: Tensor | None = None,
    drop_path: float = 0.0,
) -> Teacher:
    """The network as a teacher: fingerprinted as loaded, then in eval mode, without gradients, on its device.

    ``projection_DE`` is a CLIP's projection of its class token. With ``drop_path``, the rate that the network
    was built with, its stochastic depth alone stays active. Width, grid and prefix tokens are read off one
    map. Raises ``TeacherError`` when the network does not take ``input_size``.
    """
    record = fingerprint(
        network.state_dict(),
        library=library,
        architecture=architecture,
        arguments=dict(arguments),
        weights=weights,
        feature_point=feature_point,
        input_size=input_size,
        mean=mean,
        std=std,
        # Absent where it is the default, so that teachers recorded before it was known are still the same.
        **({"drop_path": drop_path} if drop_path else {}),
    )
    network.eval().requires_grad_(False).to(device=device, dtype=dtype)
    try:
        with torch.no_grad():
            grey = torch.zeros(1, 3, input_size, input_size, device=device, dtype=dtype)
            features = read(network, grey)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise TeacherError(
            f"teacher {architecture} gives no map at {input_size} px: {error} (teacher.input_size)"
        ) from error
    if drop_path > 0:
        for module in network.modules():
            if isinstance(module, DropPath):
                module.train()
    return Teacher(
        name=architecture,
        network=network,
        read=read,
        dtype=dtype,
        input_size=input_size,
        mean=tuple(mean),
        std=tuple(std),
        width=features.tokens_BND.shape[2],
        grid=features.grid,
        num_prefix_tokens=features.num_prefix_tokens,
        fingerprint=record,
        projection=None
        if projection_DE is None
        else Projection(projection_DE.detach().to(device, torch.float32).clone()),
    )
