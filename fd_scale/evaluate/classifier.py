"""From a network's map to logits: pooling, norm and one linear layer, in either order that papers use.

The network's own final norm is taken off, as in FD's and FT-CLIP's code, unless the recipe keeps it; norm and
head start anew. Names are ``network.*``, ``norm.*`` and ``head.*``.

Shape letters: B images, N tokens, D channels, C classes, S the side of the input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from fd_scale.engine.layers import Layers, layers_of
from fd_scale.errors import RecipeError
from fd_scale.evaluate.start import Trainable
from fd_scale.run.transfer import Head
from fd_scale.timm_maps import as_features

NORM_EPS = 1e-6
HEAD_STD = 0.02
"""Before ``Head.init_scale``."""
FINAL_NORM = "norm"
"""Name of the final norm in the networks of ``models`` and in timm's."""


class Classifier(nn.Module):
    """Normalised pixels (B, 3, S, S) to logits (B, C). Raises ``RecipeError`` for a head that the network
    cannot have."""

    def __init__(self, start: Trainable, spec: Head, *, num_classes: int) -> None:
        super().__init__()
        if spec.feature == "cls" and not start.form.has_class_token:
            raise RecipeError(
                f"head.feature='cls' needs a class token, and {start.spec.architecture} has none: set gap"
            )
        self.network = start.network
        self.form, self.feature, self.order = start.form, spec.feature, spec.order
        width = start.form.width
        if spec.keep_norm:
            self.norm: nn.Module = nn.Identity()
        else:
            _take_off_norm(self.network, start.spec.architecture)
            self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, num_classes)
        trunc_normal_(self.head.weight, std=HEAD_STD)
        with torch.no_grad():
            self.head.weight.mul_(spec.init_scale)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """(B, C), in the dtype of the parameters (or of autocast)."""
        output = self.network(pixels_B3SS.to(self.head.weight.dtype))
        features = as_features(output, self.form)
        tokens_BND = features.tokens_BND[:, :1] if self.feature == "cls" else features.patches_BND
        if self.order == "norm_pool":
            pooled_BD = self.norm(tokens_BND).mean(dim=1)
        else:
            pooled_BD = self.norm(tokens_BND.mean(dim=1))
        return self.head(pooled_BD)

    @property
    def layers(self) -> Layers:
        """The blocks of the network, for learning rates by layer."""
        return layers_of(name for name, _ in self.network.named_parameters())

    def freeze(self, *, stem: bool, blocks: int) -> None:
        """Keep the patch embedding, or the stem and so many blocks from the input, as they are.

        Raises ``RecipeError`` for more blocks than there are.
        """
        layers = self.layers
        if blocks > sum(layers.depths):
            raise RecipeError(f"start.freeze_blocks={blocks} is more than the {sum(layers.depths)} blocks")
        for name, parameter in self.network.named_parameters():
            frozen = (blocks > 0 and layers.of(name) <= blocks) or (stem and name.startswith("patch_embed."))
            parameter.requires_grad_(not frozen)


def map_head(classifier: Classifier, start: Trainable, classes: Sequence[str] | None) -> int:
    """Begin the head's rows at those of a fine-tuned start whose class has the same name; how many there
    were.

    Raises ``RecipeError`` where the start has no head, a side does not name its classes, or none is common.
    """
    known, head = start.found.classes, start.found.head
    if head is None or known is None:
        raise RecipeError(
            "head.init='mapped' needs a start that was fine-tuned on shards with named classes: set new"
        )
    if classes is None:
        raise RecipeError("head.init='mapped' needs training shards that name their classes")
    place = {name: row for row, name in enumerate(known)}
    pairs = [(row, place[name]) for row, name in enumerate(classes) if name in place]
    if not pairs:
        raise RecipeError(
            f"none of the {len(classes)} classes ({classes[0]}, ...) is among the {len(known)} of the start "
            f"({known[0]}, ...): set head.init=new"
        )
    to, origin = (torch.tensor(rows) for rows in zip(*pairs, strict=True))
    with torch.no_grad():
        classifier.head.weight[to] = head["weight"][origin]
        classifier.head.bias[to] = head["bias"][origin]
    return len(pairs)


def _take_off_norm(network: nn.Module, architecture: str) -> None:
    if not isinstance(getattr(network, FINAL_NORM, None), nn.Module):
        raise RecipeError(
            f"{architecture} has no final norm of the name {FINAL_NORM!r} to put the head's in its place: "
            "set head.keep_norm=true and head.order='norm_pool'"
        )
    setattr(network, FINAL_NORM, nn.Identity())
