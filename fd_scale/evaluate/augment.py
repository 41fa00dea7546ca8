"""What is done to labelled training images: RandAug per image, erasing and mixing per batch, all by timm.

RandAug happens where images are decoded, from the sample's own key; erasing and mixing happen on the device,
from the generators that the loop seeds for every step. So an interrupted run sees the same images.

Shape letters: B images, C classes, S the side of the input.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fd_scale.errors import RecipeError
from fd_scale.run.transfer import Augment

TRANSLATE = 0.45
"""Largest shift of RandAug, share of the side (timm)."""


@dataclass(frozen=True)
class RandAug:
    """A policy of timm's on uint8 views (3, S, S) by size, drawn from the sample's key; it pickles."""

    policy: str
    mean: tuple[float, ...]
    """Of the network's pixels, in [0, 1]: what shifts and turns uncover."""

    def __call__(self, views: dict[int, Tensor], key: np.ndarray) -> dict[int, Tensor]:
        """The same change to every size."""
        changed = {}
        for size, view in views.items():
            transform = self._transform(size)
            with _drawn_from(key):
                image = transform(Image.fromarray(view.permute(1, 2, 0).contiguous().numpy()))
            changed[size] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return changed

    def _transform(self, size: int) -> Any:
        grey = tuple(min(255, round(255 * value)) for value in self.mean)
        how = {
            "translate_const": int(size * TRANSLATE),
            "img_mean": grey,
            "interpolation": Image.Resampling.BICUBIC,
        }
        transform = rand_augment_transform(self.policy, how)
        for change in transform.ops:
            if change.name.startswith("Posterize"):
                change.level_fn = partial(_at_least_one_bit, change.level_fn)
        return transform


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, how: Any) -> tuple[int]:
    """timm's strongest posterisation keeps no bit, which Pillow once made black and now refuses."""
    return (max(1, level_fn(level, how)[0]),)


def randaug(spec: Augment, mean: Sequence[float]) -> RandAug | None:
    """The recipe's RandAug, or None. Raises ``RecipeError`` for a policy that timm does not understand."""
    if spec.randaug is None:
        return None
    try:
        made = RandAug(spec.randaug, tuple(mean))
        made({16: torch.zeros(3, 16, 16, dtype=torch.uint8)}, np.zeros(2, dtype=np.uint64))
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise RecipeError(
            f"augment.randaug={spec.randaug!r} is no policy of timm's ({error!r}); one is "
            "rand-m9-mstd0.5-inc1"
        ) from None
    return made


class Mixer:
    """Erasing and mixing of normalised pixels, and the soft labels that belong to them."""

    def __init__(self, spec: Augment, *, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.smoothing = num_classes, spec.smoothing
        self.erase = RandomErasing(spec.erase, mode="pixel", device=str(device)) if spec.erase else None
        self.mix = None
        if spec.mixes:
            self.mix = Mixup(
                mixup_alpha=spec.mixup,
                cutmix_alpha=spec.cutmix,
                prob=spec.mix_prob,
                switch_prob=spec.switch_prob,
                label_smoothing=spec.smoothing,
                num_classes=num_classes,
            )

    def __call__(
        self, pixels_B3SS: Tensor, labels_B: Tensor, valid_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, soft labels (B, C) and validity, of the generators' present state.

        A sample that is mixed with one that is not valid is not valid. Raises ``RecipeError`` for an odd
        batch that is to be mixed.
        """
        if self.erase is not None:
            pixels_B3SS = self.erase(pixels_B3SS)
        labels_B = labels_B.clamp_min(0)
        if self.mix is None:
            return pixels_B3SS, smoothed(labels_B, self.num_classes, self.smoothing), valid_B
        if len(pixels_B3SS) % 2:
            raise RecipeError(
                f"a micro-batch of {len(pixels_B3SS)} cannot be mixed in pairs: choose an even one in the "
                "scale file, or set augment.mixup=0 and augment.cutmix=0"
            )
        pixels_B3SS, soft_BC = self.mix(pixels_B3SS, labels_B)
        return pixels_B3SS, soft_BC, valid_B & valid_B.flip(0)


def smoothed(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot labels (B, C) with ``smoothing`` spread over all classes, float32."""
    low = smoothing / num_classes
    soft_BC = torch.full((len(labels_B), num_classes), low, device=labels_B.device)
    return soft_BC.scatter_(1, labels_B[:, None], 1 - smoothing + low)


@contextmanager
def _drawn_from(key: np.ndarray) -> Iterator[None]:
    """Python's and NumPy's global generators, which timm draws from, seeded by a sample's key; as before
    afterwards."""
    before = random.getstate(), np.random.get_state()
    seed = int.from_bytes(np.asarray(key, dtype=np.uint64).tobytes(), "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
