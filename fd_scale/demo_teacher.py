"""Where does a teacher come from when nothing can be downloaded? It is trained on scenes, in a minute.

Plain supervised PyTorch on one process, for the demo alone. It is written as a file of timm's weights, and
from there on treated like any other teacher.

Shape letters: B images, h and w the grid, S pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from fd_scale import timm_maps
from fd_scale.data.scenes import SHAPES, scene, scene_seed
from fd_scale.pixels import normalise
from fd_scale.run import recipe as recipes

STEPS, BATCH = 192, 32
LR, WEIGHT_DECAY, CLIP_NORM = 1.5e-3, 0.05, 1.0
MIN_COVERED = 0.3
"""Share of a patch that a class must cover for the patch to count as its."""


def pretrain(
    spec: recipes.Teacher,
    weights: Path,
    *,
    num_images: int,
    seed: int,
    cue: float,
    steps: int = STEPS,
    say: Callable[[str], None] = print,
) -> None:
    """Teach a ViT of timm the classes of single-object scenes, and write it, without heads, to ``weights``.

    It is supervised twice: the class token tells the object, each patch what is on it. The latter makes the
    whole map worth distilling, and learning several times faster. ``spec`` names a ViT with ``input_size``
    and ``patch_size``; ``seed`` is that of the scenes, of weights and of order. ``say`` gets a line now and
    then.
    """
    torch.manual_seed(seed)
    size, patch_size = spec.input_size, spec.arguments.get("patch_size")
    if size is None or not isinstance(patch_size, int):
        raise ValueError(f"the teacher of a demo needs input_size and arguments.patch_size, not {spec}")
    # Its library's own calls have no types.
    network: Any = timm_maps.build(
        spec.architecture, input_size=size, arguments=spec.arguments, num_classes=len(SHAPES)
    )
    patch_head = nn.Linear(network.num_features, 1 + len(SHAPES))
    mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    pixels, labels, on_patch = _scenes(num_images, size, patch_size, seed, cue)
    parameters = [*network.parameters(), *patch_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    told_every = max(1, steps // 4)
    num_right = 0
    for step in range(1, steps + 1):
        chosen = torch.randint(num_images, (BATCH,))
        flipped = (-1,) if torch.rand(()) < 0.5 else ()
        tokens = network.forward_features(normalise(pixels[chosen].flip(flipped), mean, std, torch.float32))
        classes = network.forward_head(tokens)
        patches = patch_head(tokens[:, network.num_prefix_tokens :])
        loss = F.cross_entropy(classes, labels[chosen])
        loss = loss + F.cross_entropy(patches.flatten(0, 1), on_patch[chosen].flip(flipped).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
        num_right += int((classes.argmax(dim=1) == labels[chosen]).sum())
        if step % told_every == 0:
            share = num_right / (told_every * BATCH)
            say(f"step {step:>4}/{steps}  loss {loss.item():.3f}  {share:.1%} of its images right")
            num_right = 0
    tensors = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
    save_file(tensors, weights)


def patch_classes(semantic: NDArray[np.uint8], patch_size: int) -> NDArray[np.int64]:
    """What is on each patch (h, w) of a scene's semantic map: 1 + the class that covers most of it, or 0
    where none covers ``MIN_COVERED``."""
    side = len(semantic) // patch_size
    cells = semantic.reshape(side, patch_size, side, patch_size).swapaxes(1, 2).reshape(side, side, -1)
    shares = np.stack([(cells == 1 + label).mean(axis=2) for label in range(len(SHAPES))], axis=2)
    return np.where(shares.max(axis=2) >= MIN_COVERED, 1 + shares.argmax(axis=2), 0)


def _scenes(
    num_images: int, size: int, patch_size: int, seed: int, cue: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels uint8 (B, 3, S, S), labels (B,), and what is on each patch (B, h, w)."""
    scenes = [scene(scene_seed(seed, number), size, cue, num_objects=1) for number in range(num_images)]
    pixels = torch.from_numpy(np.stack([drawn.image for drawn in scenes])).permute(0, 3, 1, 2)
    patches = np.stack([patch_classes(drawn.semantic, patch_size) for drawn in scenes])
    return pixels, torch.tensor([drawn.label for drawn in scenes]), torch.from_numpy(patches)
