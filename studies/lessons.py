"""How do teachers learn? One small objective for each kind of teacher that the papers distil.

Supervised by labels, by words that belong to an image (CLIP), by itself (DINO), by what is masked (MAE). All
train the same backbone on the same images; what they add to it, heads and text tower, is kept beside it so
that a teacher can go on learning. They are as small as still teaches the kind of feature, and no
reproductions of those methods.

Shape letters: B images, N tokens, D width, C classes, E joint space, W words of a caption, P values
of a patch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_scale.data import philox
from fd_scale.pixels import IMAGENET_MEAN, IMAGENET_STD, normalise

SMOOTHING = 0.1
EMBED = 64
"""Width of the joint space of images and words."""
VOCABULARY, WORDS_PER_CLASS, CAPTION, NOISE = 24, 3, 2, 0.2
"""Words there are, that fit a class, that a caption has, and the share of words that are any word at all."""
TEMPERATURE = 0.1
"""First temperature of image and text (learnt); CLIP's 0.07 is for batches of tens of thousands."""
PROTOTYPES, MOMENTUM, CENTRE_MOMENTUM = 256, 0.99, 0.9
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
"""Of self-distillation, as DINO's."""
MASKED = 0.6
"""Share of patches that are masked (SimMIM); with grey pixels, since the backbone has no mask token."""


class Lesson(nn.Module, ABC):
    """A backbone and what teaches it; ``forward`` takes views (B, 3, S, S) uint8 and the images' numbers."""

    num_views: ClassVar[int] = 1

    def __init__(self, backbone: nn.Module, labels: Tensor, num_classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels, self.num_classes, self.seed = labels, num_classes, seed
        self.width: int = backbone.embed_dim  # type: ignore[assignment]
        self.build()

    @abstractmethod
    def build(self) -> None:
        """Make the heads."""

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, N, D) of uint8 pixels."""
        return self.backbone(normalise(pixels, IMAGENET_MEAN, IMAGENET_STD, torch.float32))

    def after_step(self) -> None:
        """What follows an optimizer step."""


class Supervised(Lesson):
    """Labels, by the class token."""

    def build(self) -> None:
        self.head = nn.Linear(self.width, self.num_classes)

    def forward(self, views: list[Tensor], index_B: Tensor) -> Tensor:
        """Cross entropy with smoothed labels."""
        logits_BC = self.head(self.tokens(views[0])[:, 0])
        return F.cross_entropy(logits_BC, self.labels[index_B], label_smoothing=SMOOTHING)


class Contrastive(Lesson):
    """A caption of two words per image, against all captions of the batch; equal captions are all right."""

    def build(self) -> None:
        captions_NW = captions(self.labels.cpu(), self.num_classes, self.seed)
        self.register_buffer("captions", captions_NW.to(self.labels.device), persistent=False)
        self.words = nn.EmbeddingBag(VOCABULARY, EMBED, mode="mean")
        self.text = nn.Linear(EMBED, EMBED)
        self.image = nn.Linear(self.width, EMBED, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())

    def forward(self, views: list[Tensor], index_B: Tensor) -> Tensor:
        """InfoNCE in both directions."""
        told_BW = self.captions[index_B]
        image_BE = F.normalize(self.image(self.tokens(views[0])[:, 0]), dim=1)
        text_BE = F.normalize(self.text(self.words(told_BW)), dim=1)
        logits_BB = self.log_scale.exp().clamp(max=100) * image_BE @ text_BE.T
        same_BB = (told_BW[:, None] == told_BW[None]).all(2).float()
        right_BB = same_BB / same_BB.sum(1, keepdim=True)
        return (F.cross_entropy(logits_BB, right_BB) + F.cross_entropy(logits_BB.T, right_BB)) / 2


class SelfDistilled(Lesson):
    """Two views of an image must be sorted alike into prototypes, one by a moving average of the network."""

    num_views = 2

    def build(self) -> None:
        self.head = nn.Linear(self.width, PROTOTYPES, bias=False)
        self.register_buffer("centre", torch.zeros(PROTOTYPES))
        self.mean_backbone = copy.deepcopy(self.backbone).eval().requires_grad_(False)
        self.mean_head = copy.deepcopy(self.head).requires_grad_(False)

    def train(self, mode: bool = True) -> SelfDistilled:
        """The average never drops paths."""
        super().train(mode)
        self.mean_backbone.eval()
        return self

    def forward(self, views: list[Tensor], index_B: Tensor) -> Tensor:
        """Cross entropy of each view's sorting with the average's of the other view."""
        both = torch.cat(views)
        logits = F.linear(F.normalize(self.tokens(both)[:, 0], dim=1), F.normalize(self.head.weight, dim=1))
        with torch.no_grad():
            values = normalise(both, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
            mean = F.normalize(self.mean_backbone(values)[:, 0], dim=1)
            taught = F.linear(mean, F.normalize(self.mean_head.weight, dim=1)).float()
            right = ((taught - self.centre) / TEACHER_TEMPERATURE).softmax(1).roll(len(views[0]), 0)
            self.centre.lerp_(taught.mean(0), 1 - CENTRE_MOMENTUM)
        return F.cross_entropy(logits / STUDENT_TEMPERATURE, right)

    @torch.no_grad()
    def after_step(self) -> None:
        for mean, own in ((self.mean_backbone, self.backbone), (self.mean_head, self.head)):
            torch._foreach_lerp_(list(mean.parameters()), list(own.parameters()), 1 - MOMENTUM)


class MaskedImage(Lesson):
    """Grey patches are told from the others: their pixels, normalised patch by patch."""

    def build(self) -> None:
        self.patch: int = self.backbone.patch_size  # type: ignore[assignment]
        self.head = nn.Linear(self.width, 3 * self.patch**2)

    def forward(self, views: list[Tensor], index_B: Tensor) -> Tensor:
        """Mean absolute error over masked patches."""
        values = normalise(views[0], IMAGENET_MEAN, IMAGENET_STD, torch.float32)
        batch, _, side, _ = values.shape
        grid = side // self.patch
        hidden_BHW = torch.rand(batch, grid, grid, device=values.device) < MASKED
        grey = hidden_BHW.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2)
        tokens_BND = self.backbone(values.masked_fill(grey[:, None], 0.0))
        pixels_BNP = F.unfold(values, self.patch, stride=self.patch).transpose(1, 2)
        right_BNP = F.layer_norm(pixels_BNP, pixels_BNP.shape[-1:])
        error_BN = (self.head(tokens_BND[:, 1:]).float() - right_BNP).abs().mean(2)
        hidden_BN = hidden_BHW.flatten(1)
        return (error_BN * hidden_BN).sum() / hidden_BN.sum().clamp_min(1)


LESSONS: Mapping[str, Callable[[nn.Module, Tensor, int, int], Lesson]] = {
    "supervised": Supervised,
    "contrastive": Contrastive,
    "self_distilled": SelfDistilled,
    "masked_image": MaskedImage,
}


def captions(labels_N: Tensor, num_classes: int, seed: int) -> Tensor:
    """Two words per image (N, W), sorted: of the three that fit its class, a fifth of them wrong.

    Classes share words, as they do in language. The words of an image never change.
    """
    key = philox.key("fd.words", seed)
    fitting_CW = torch.stack(
        [
            torch.from_numpy(philox.permutation(philox.key("fd.fitting", seed, label), VOCABULARY))
            for label in range(num_classes)
        ]
    )[:, :WORDS_PER_CLASS]
    drawn = torch.from_numpy(philox.uniforms(philox.words(key, 4 * len(labels_N)))).view(4, -1)
    first_N = (drawn[0] * WORDS_PER_CLASS).long()
    second_N = (first_N + 1 + (drawn[1] * (WORDS_PER_CLASS - 1)).long()) % WORDS_PER_CLASS
    told = fitting_CW[labels_N[:, None], torch.stack((first_N, second_N), 1)]
    # One uniform decides both whether a word is wrong and which one it is.
    wrong = torch.stack((drawn[2], drawn[3]), 1)
    return torch.where(wrong < NOISE, (wrong / NOISE * VOCABULARY).long(), told).sort(1).values
