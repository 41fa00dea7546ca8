"""What do networks make of single images? Their maps in colours, where they looked, how long tokens are.

Shape letters: B images, h and w a grid, S pixels, N tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_scale.diagnose.anatomy import Anatomy
from fd_scale.diagnose.capture import block_outputs
from fd_scale.diagnose.results import Pictures
from fd_scale.diagnose.rollout import has_rollout, rollout
from fd_scale.diagnose.subjects import Subject
from fd_scale.pictures import pca_colours


def look_at(
    subjects: Sequence[tuple[Subject, Anatomy]], pixels: Callable[[int], Tensor], names: Sequence[str]
) -> Pictures:
    """The same images through every network; ``pixels`` gives them, uint8 (B, 3, S, S), at a size S."""
    sizes = {subject.backbone.input_size for subject, _ in subjects}
    by_size: Mapping[int, Tensor] = {size: pixels(size) for size in sizes}
    colours, norms, rollouts = {}, {}, {}
    for subject, anatomy in subjects:
        shown = by_size[subject.backbone.input_size]
        features = subject.backbone.tokens(shown)
        colours[subject.name] = pca_colours(features.patches_BND.unflatten(1, features.grid))
        norms[subject.name] = norm_maps(subject, anatomy, shown)
        if has_rollout(anatomy):
            rollouts[subject.name] = rollout(subject, anatomy, shown).numpy()
    images = by_size[max(sizes)].permute(0, 2, 3, 1).numpy()
    return Pictures(names[: len(images)], images, colours, norms, rollouts)


def norm_maps(subject: Subject, anatomy: Anatomy, pixels: Tensor) -> NDArray[np.float32]:
    """Lengths of patch tokens (B, h, w) over their median: after the last block, before the final norm evens
    them out, or of the final map where there are no blocks."""
    *blocks, layer = anatomy.tokens
    taken: list[Tensor] = []
    with block_outputs(
        subject.network, [block.name for block in blocks[-1:]], lambda _, tokens_BND: taken.append(tokens_BND)
    ):
        taken.insert(0, subject.backbone.tokens(pixels).tokens_BND)
    if blocks:
        layer = blocks[-1]
    # The block's tokens were taken before the final map was put in front of them.
    norms = torch.linalg.vector_norm(taken[-1][:, layer.num_prefix_tokens :].float(), dim=-1).cpu()
    relative: NDArray[np.float32] = (norms / norms.median()).unflatten(1, layer.grid).numpy()
    return relative
