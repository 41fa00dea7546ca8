"""What do all images together say of one network? Every question about attention and tokens in one pass.

The questions' sums are kept on the network's device in float64 and added over batches and processes; maps
and tokens are gone as soon as they were looked at. Sums do not depend on how images were divided, so neither
do the answers.

Shape letters: B images times windows, H heads, N tokens, D channels, n images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fd_scale.diagnose import average_map, distance, head_similarity, norms, spectrum, token_similarity
from fd_scale.diagnose.anatomy import OUTPUT, Anatomy, AttentionLayer, TokenLayer
from fd_scale.diagnose.average_map import AverageMap
from fd_scale.diagnose.capture import attention_maps, block_outputs
from fd_scale.diagnose.distance import Distance
from fd_scale.diagnose.head_similarity import HeadSimilarity
from fd_scale.diagnose.norms import Norms
from fd_scale.diagnose.spectrum import Spectrum
from fd_scale.diagnose.subjects import DiagnoseError, Subject
from fd_scale.diagnose.token_similarity import TokenSimilarity
from fd_scale.run.world import World

ATTENTION_QUESTIONS = {
    "distance": distance,
    "head_similarity": head_similarity,
    "average_map": average_map,
}
TOKEN_QUESTIONS = {"token_similarity": token_similarity, "norms": norms, "spectrum": spectrum}
ANSWERS: Mapping[str, type] = {
    "distance": Distance,
    "head_similarity": HeadSimilarity,
    "average_map": AverageMap,
    "token_similarity": TokenSimilarity,
    "norms": Norms,
    "spectrum": Spectrum,
}
POOLED_IMAGES = 1024
"""Images whose pooled tokens are kept for the similarity of layers."""


@dataclass(eq=False)
class Sums:
    """What one process has added up so far."""

    questions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By ``question/layer``."""
    pooled: dict[str, list[Tensor]] = field(default_factory=dict)
    """By layer: mean patch tokens (B, D), float32 on the CPU, of the first images."""
    num_images: int = 0

    def add(self, key: str, more: Mapping[str, Tensor]) -> None:
        """Add the sums of a batch."""
        held = self.questions.get(key)
        if held is None:
            self.questions[key] = dict(more)
            return
        for name, tensor in more.items():
            held[name] += tensor


@dataclass(frozen=True, eq=False)
class Survey:
    """The answers of one network by layer, in order of execution."""

    num_images: int
    distance: dict[str, Distance]
    head_similarity: dict[str, HeadSimilarity]
    average_map: dict[str, AverageMap]
    token_similarity: dict[str, TokenSimilarity]
    norms: dict[str, Norms]
    spectrum: dict[str, Spectrum]
    pooled: dict[str, Tensor]
    """float32 (n, D): mean patch tokens of the first images."""

    def record(self) -> dict[str, Any]:
        """Plain values and tensors, from which ``of_record`` makes the same survey."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Survey:
        """The survey that was recorded."""
        answers = {
            question: {layer: answer(**values) for layer, values in record[question].items()}
            for question, answer in ANSWERS.items()
        }
        return cls(num_images=record["num_images"], pooled=dict(record["pooled"]), **answers)


def survey(
    subject: Subject,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    world: World,
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Show the network all images, this process its share of them, and answer all questions. Collective.

    ``batches`` are uint8 (B, 3, S, S); ``on_batch`` hears how many images of this process are done. Raises
    ``DiagnoseError`` where no image could be read.
    """
    mine = gather_sums(subject, anatomy, batches, on_batch=on_batch)
    return conclude(merged(mine, world), anatomy)


def gather_sums(
    subject: Subject,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    *,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Sums:
    """The sums of one process's images."""
    sums = Sums()
    attention = {layer.name: layer for layer in anatomy.attention}
    blocks = {layer.name: layer for layer in anatomy.tokens if layer.name != OUTPUT}
    output = anatomy.tokens[-1]
    on_attention = partial(_take_attention, sums, attention)
    on_tokens = partial(_take_tokens, sums, blocks)
    with (
        attention_maps(subject.network, on_attention),
        block_outputs(subject.network, list(blocks), on_tokens),
    ):
        for pixels in batches:
            final = subject.backbone.tokens(pixels)
            _take_tokens(sums, {OUTPUT: output}, OUTPUT, final.tokens_BND)
            sums.num_images += len(pixels)
            on_batch(sums.num_images)
    return sums


def merged(sums: Sums, world: World) -> Sums:
    """The sums of all processes. Collective; a process without images may take part."""
    if world.size == 1:
        return sums
    shapes: dict[tuple[str, str], tuple[torch.Size, torch.dtype]] = {}
    for held in world.gather(_shapes(sums)):
        shapes |= held
    total = Sums(num_images=sum(world.gather(sums.num_images)))
    for (key, name), (shape, dtype) in shapes.items():
        mine = sums.questions.get(key, {}).get(name)
        tensor = torch.zeros(shape, dtype=dtype, device=world.device) if mine is None else mine.clone()
        dist.all_reduce(tensor)
        total.questions.setdefault(key, {})[name] = tensor
    for part in world.gather(sums.pooled):
        for layer, rows in part.items():
            total.pooled.setdefault(layer, []).extend(rows)
    return total


def conclude(sums: Sums, anatomy: Anatomy) -> Survey:
    """The answers."""
    if sums.num_images == 0:
        raise DiagnoseError("no image of the data could be read")
    answers: dict[str, dict[str, Any]] = {question: {} for question in ANSWERS}
    for layer in anatomy.attention:
        for question, module in ATTENTION_QUESTIONS.items():
            held = _on_cpu(sums.questions[f"{question}/{layer.name}"])
            answers[question][layer.name] = module.conclude(held, layer)
    for tokens in anatomy.tokens:
        for question, module in TOKEN_QUESTIONS.items():
            held = sums.questions[f"{question}/{tokens.name}"]
            answers[question][tokens.name] = module.conclude(held, tokens)
    pooled = {layer: torch.cat(rows)[:POOLED_IMAGES] for layer, rows in sums.pooled.items()}
    in_order = {layer.name: pooled[layer.name] for layer in anatomy.tokens}
    return Survey(num_images=sums.num_images, pooled=in_order, **answers)


def _take_attention(
    sums: Sums, layers: Mapping[str, AttentionLayer], name: str, attention_BHNN: Tensor
) -> None:
    if name not in layers:
        return
    # Under autocast the networks may run in half precision, sums never.
    with torch.autocast(attention_BHNN.device.type, enabled=False):
        for question, module in ATTENTION_QUESTIONS.items():
            sums.add(f"{question}/{name}", module.sums(attention_BHNN, layers[name]))


def _take_tokens(sums: Sums, layers: Mapping[str, TokenLayer], name: str, tokens_BND: Tensor) -> None:
    layer = layers[name]
    with torch.autocast(tokens_BND.device.type, enabled=False):
        for question, module in TOKEN_QUESTIONS.items():
            sums.add(f"{question}/{name}", module.sums(tokens_BND, layer))
    if sums.num_images < POOLED_IMAGES:
        patches_BPD = tokens_BND[:, layer.num_prefix_tokens :]
        sums.pooled.setdefault(name, []).append(patches_BPD.double().mean(dim=1).float().cpu())


def _shapes(sums: Sums) -> dict[tuple[str, str], tuple[torch.Size, torch.dtype]]:
    return {
        (key, name): (tensor.shape, tensor.dtype)
        for key, held in sums.questions.items()
        for name, tensor in held.items()
    }


def _on_cpu(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in held.items()}
